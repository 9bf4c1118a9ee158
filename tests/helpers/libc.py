"""Functions of the C library that go past the objects that own memory."""

import ctypes
import os

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.mremap.argtypes = [ctypes.c_void_p, *[ctypes.c_size_t] * 2, ctypes.c_int, ctypes.c_void_p]
for _name in ("munmap", "mlock", "munlock"):
    getattr(libc, _name).argtypes = [ctypes.c_void_p, ctypes.c_size_t]
for _name in ("mprotect", "madvise"):
    getattr(libc, _name).argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]

MAP_FIXED = 0x10
MAP_FAILED = ctypes.c_void_p(-1).value


def why_failed(call: str) -> str:
    """The name of the call that just failed, and its error."""
    return f"{call}: {os.strerror(ctypes.get_errno())}"


class _Stretch(ctypes.Structure):
    """struct iovec"""

    _fields_ = [("addr", ctypes.c_void_p), ("len_bytes", ctypes.c_size_t)]


def process_vm_writev(source: int, target: int, len_bytes: int) -> int:
    """Have the kernel copy bytes between two addresses; how many it copied, -1 if it failed."""
    here, there = _Stretch(source, len_bytes), _Stretch(target, len_bytes)
    return libc.process_vm_writev(
        os.getpid(), ctypes.byref(here), 1, ctypes.byref(there), 1, ctypes.c_ulong(0)
    )
