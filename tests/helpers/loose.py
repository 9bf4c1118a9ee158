"""Memory that nobody owns and misses, and calls that change what is mapped there."""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Iterator

import numpy as np

from helpers.libc import MAP_FAILED, MAP_FIXED, libc, why_failed
from helpers.memory import PAGE, PRIVATE

MREMAP_MAYMOVE, MREMAP_FIXED, MREMAP_DONTUNMAP = 1, 2, 4
MAP_NORESERVE = 0x4000


def call(name: str, *args: int) -> int:
    result: int = getattr(libc, name)(*args)
    assert result not in (-1, MAP_FAILED), why_failed(name)
    return result


def map_at(addr: int, n_pages: int, prot: int = 3, flags: int = PRIVATE, fd: int = -1) -> int:
    return call("mmap", addr, n_pages * PAGE, prot, flags | (MAP_FIXED if addr else 0), fd, 0)


def pieces(start: int, end: int) -> Iterator[tuple[int, int]]:
    """The mappings in this range, cut off at its ends."""
    with open("/proc/self/maps") as maps:
        for line in maps.readlines():
            first, last = (int(addr, 16) for addr in line.split(maxsplit=1)[0].split("-"))
            if first < end and last > start:
                yield max(first, start), min(last, end)


def move(source: int, target: int, n_pages: int, more: int = 0) -> None:
    """Whatever is at the target is gone then. Mapping by mapping: older kernels move one at a time.
    Where a mapping ends may change meanwhile."""
    flags = MREMAP_MAYMOVE | MREMAP_FIXED | more
    at, last = source, source + n_pages * PAGE
    while at < last:
        start, end = next(pieces(at, last), (last, last))
        if start == last:
            return
        n_bytes = end - start
        where = libc.mremap(start, n_bytes, n_bytes, flags, target + start - source)
        if where != MAP_FAILED:
            at = end
        else:
            assert ctypes.get_errno() == errno.EFAULT, why_failed("mremap")


def under_a_gap(n_pages: int, gap_bytes: int = 4 << 30) -> int:
    """Pages that nobody has mapped, with a large gap above. The kernel maps at the highest place
    that is free: so it takes that gap, and not the holes which moving leaves here, whatever other
    threads map meanwhile."""
    addr = call("mmap", 0, n_pages * PAGE + gap_bytes, 0, PRIVATE | MAP_NORESERVE, -1, 0)
    call("munmap", addr, n_pages * PAGE + gap_bytes)
    return addr


class Loose:
    """An array over bare pages, anywhere or at an address."""

    def __init__(self, source: np.ndarray, addr: int = 0) -> None:
        self.n_pages = len(source)
        self.addr = map_at(addr, self.n_pages)
        self.pages = self.view(self.addr)
        self.pages[:] = source

    def view(self, addr: int) -> np.ndarray:
        raw = (ctypes.c_uint8 * (self.n_pages * PAGE)).from_address(addr)
        return np.frombuffer(raw, np.uint8).reshape(-1, PAGE)

    def at(self, page: int) -> int:
        return self.addr + page * PAGE

    def unmap(self) -> None:
        call("munmap", self.addr, self.n_pages * PAGE)


def rotate(*buffers: Loose, pages: slice = slice(None)) -> None:
    """These pages of each buffer go to the next one, those of the last to the first."""
    start, stop, _ = pages.indices(buffers[0].n_pages)
    n_pages = stop - start
    aside = map_at(0, n_pages)
    move(buffers[-1].at(start), aside, n_pages)
    for one, other in zip(buffers[-2::-1], buffers[:0:-1], strict=True):
        move(one.at(start), other.at(start), n_pages)
    move(aside, buffers[0].at(start), n_pages)
