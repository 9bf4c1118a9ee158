"""Seccomp filters for this process, as sandboxes and container runtimes have them: calls that are
answered by an errno of the filter's choice. They cannot be taken back, so: in a child."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from collections.abc import Sequence

from helpers.libc import libc, why_failed

# Numbers of system calls: x86-64, aarch64.
NUMBERS = {
    "ioctl": (16, 29),
    "fcntl": (72, 25),
    "fallocate": (285, 47),
    "ftruncate": (77, 46),
    "madvise": (28, 233),
    "memfd_create": (319, 279),
    "mincore": (27, 232),
    "openat": (257, 56),
    "pread": (17, 67),
    "pwrite": (18, 68),
    "userfaultfd": (323, 282),
}
# Calls that are told apart by an argument: which call, which argument, its value.
PARTS = {
    "PAGEMAP_SCAN": ("ioctl", 1, 0xC0606610),
    "PROCMAP_QUERY": ("ioctl", 1, 0xC0686611),
    "UFFDIO_API": ("ioctl", 1, 0xC018AA3F),
    "UFFDIO_REGISTER": ("ioctl", 1, 0xC020AA00),
    "UFFDIO_UNREGISTER": ("ioctl", 1, 0x8010AA01),
    "UFFDIO_WAKE": ("ioctl", 1, 0x8010AA02),
    "UFFDIO_COPY": ("ioctl", 1, 0xC028AA03),
    "UFFDIO_MOVE": ("ioctl", 1, 0xC028AA05),
    "UFFDIO_WRITEPROTECT": ("ioctl", 1, 0xC018AA06),
    "F_ADD_SEALS": ("fcntl", 1, 1033),
    "MADV_DONTFORK": ("madvise", 2, 10),
    "MADV_HUGEPAGE": ("madvise", 2, 14),
    "MADV_NOHUGEPAGE": ("madvise", 2, 15),
    "MADV_DONTDUMP": ("madvise", 2, 16),
    "MADV_POPULATE_WRITE": ("madvise", 2, 23),
}

_LOAD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 22, 38


class _Program(ctypes.Structure):
    """struct sock_fprog"""

    _fields_ = [("n", ctypes.c_ushort), ("instructions", ctypes.c_void_p)]


def _instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)


def refuse(names: Sequence[str], code: int) -> None:
    """Have these calls fail from here on, in this thread and those that it begins, with that errno;
    with errno 0 they seem to have worked, and do nothing."""
    column = {"x86_64": 0, "aarch64": 1}[platform.machine()]
    program = b""
    for name in names:
        call, argument, value = PARTS.get(name, (name, None, 0))
        # In the kernel's struct the number comes first, and the arguments, of 8 bytes, from 16 on.
        # Each jump is past what is left of this call.
        n_left = 1 if argument is None else 3
        program += _instruction(_LOAD, 0)
        program += _instruction(_JUMP_IF_EQUAL, NUMBERS[call][column], 0, n_left)
        if argument is not None:
            program += _instruction(_LOAD, 16 + 8 * argument)
            program += _instruction(_JUMP_IF_EQUAL, value, 0, 1)
        program += _instruction(_RETURN, _ERRNO | code)
    program += _instruction(_RETURN, _ALLOW)
    kept = ctypes.create_string_buffer(program)
    filter_ = _Program(len(program) // 8, ctypes.addressof(kept))
    assert libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0, why_failed("prctl")
    assert libc.prctl(_PR_SET_SECCOMP, 2, ctypes.byref(filter_)) == 0, why_failed("prctl")


def is_possible() -> bool:
    """Can a filter be had here at all?"""
    pid = os.fork()
    if pid == 0:
        try:
            refuse(["UFFDIO_COPY"], errno.EPERM)
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
