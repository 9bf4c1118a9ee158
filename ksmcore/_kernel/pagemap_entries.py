"""Entries of ``/proc/PID/pagemap``, as numbers of NumPy. For passes there is `pagemap`, in C."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np

from ksmcore._kernel import files
from ksmcore._kernel.syscalls import page_bytes

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["ABSENT", "EXCLUSIVE", "FRAME", "OF_FILE", "PRESENT", "entries_from", "own_entries"]

PRESENT = np.uint64(1 << 63)
# None of these bits: nothing is there, in memory or swapped out.
ABSENT = np.uint64(3 << 62)
OF_FILE = np.uint64(1 << 61)  # or of shared memory
EXCLUSIVE = np.uint64(1 << 56)
FRAME = np.uint64((1 << 55) - 1)  # 0 for those who may not know


def entries_from(fd: int, addr: int, n_pages: int) -> NDArray[np.uint64]:
    """Of so many pages, from an open pagemap; fewer where the memory ends, or is gone."""
    try:
        found = os.pread(fd, n_pages * 8, addr // page_bytes() * 8)
    except ProcessLookupError:
        found = b""
    return np.frombuffer(found[: len(found) // 8 * 8], np.uint64)


def own_entries(addr: int, n_pages: int) -> NDArray[np.uint64]:
    """Of this process. Raises OSError."""
    fd = files.open_read("/proc/self/pagemap")
    try:
        parts = []
        while n_pages > 0:
            part = entries_from(fd, addr, n_pages)
            if not len(part):
                raise OSError("pagemap ends before the memory does")
            parts.append(part)
            addr, n_pages = addr + len(part) * page_bytes(), n_pages - len(part)
    finally:
        files.close(fd)
    return np.concatenate([np.zeros(0, np.uint64), *parts])
