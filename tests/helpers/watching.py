"""What others may do to memory: a userfaultfd of their own, a NUMA policy, a protection key."""

from __future__ import annotations

import ctypes
import fcntl
import os
import platform
import struct

import pytest

from helpers.libc import libc, why_failed

MISSING, PROTECTED = 1, 2

_MACHINE = platform.machine()
_NR_USERFAULTFD = {"x86_64": 323, "aarch64": 282}.get(_MACHINE)
_NR_MBIND = {"x86_64": 237, "aarch64": 235}.get(_MACHINE)
_USER_MODE_ONLY = 1
_MPOL_BIND = 2
_READ_WRITE = 3


def _ioctl(number: int, n_bytes: int, direction: int = 3) -> int:
    return direction << 30 | n_bytes << 16 | 0xAA << 8 | number


class Watcher:
    """Another's userfaultfd, that answers no fault."""

    def __init__(self) -> None:
        if _NR_USERFAULTFD is None:
            pytest.skip(f"the number of userfaultfd is not known for {_MACHINE}")
        self.fd = libc.syscall(_NR_USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK | _USER_MODE_ONLY)
        if self.fd < 0:
            pytest.skip(why_failed("userfaultfd"))
        self._call(_ioctl(0x3F, 24), 0xAA, 0, 0)

    def _call(self, request: int, *words: int) -> None:
        fcntl.ioctl(self.fd, request, bytearray(struct.pack(f"={len(words)}Q", *words)))

    def watch(self, addr: int, len_bytes: int, mode: int = MISSING) -> None:
        self._call(_ioctl(0x00, 32), addr, len_bytes, mode, 0)

    def leave(self, addr: int, len_bytes: int) -> None:
        self._call(_ioctl(0x01, 16, direction=2), addr, len_bytes)

    def n_faults(self) -> int:
        """That wait for an answer."""
        try:
            return len(os.read(self.fd, 32 * 64)) // 32
        except BlockingIOError:
            return 0

    def close(self) -> None:
        os.close(self.fd)


def bind_to_node(addr: int, len_bytes: int, bound: bool = True) -> None:
    """A NUMA policy of its own, or none any more."""
    if _NR_MBIND is None:
        pytest.skip(f"the number of mbind is not known for {_MACHINE}")
    nodes = ctypes.c_ulong(1)
    result = libc.syscall(
        _NR_MBIND,
        ctypes.c_void_p(addr),
        ctypes.c_ulong(len_bytes),
        _MPOL_BIND if bound else 0,
        ctypes.byref(nodes) if bound else None,
        ctypes.c_ulong(64 if bound else 0),
        0,
    )
    if result != 0:
        pytest.skip(why_failed("mbind"))


def protection_key() -> int:
    """A new one; give it back with pkey_free."""
    if not hasattr(libc, "pkey_alloc"):
        pytest.skip("this C library has no pkey_alloc")
    key: int = libc.pkey_alloc(0, 0)
    if key < 0:
        pytest.skip(why_failed("pkey_alloc"))
    return key


def give_key(addr: int, len_bytes: int, key: int) -> None:
    result = libc.pkey_mprotect(ctypes.c_void_p(addr), ctypes.c_size_t(len_bytes), _READ_WRITE, key)
    assert result == 0, why_failed("pkey_mprotect")
