"""What the kernel says of this process, for tests that prove by it."""

from __future__ import annotations

import mmap
import os
import struct

import numpy as np

from helpers.memory import extent
from ksmcore._engine.stats import STORE_PATH
from ksmcore._kernel import smaps


def pss_bytes() -> int:
    # Without files: the share of a library changes whenever another process starts or ends. And a
    # page that the kernel is moving just now counts in full at each of its mappings.
    def own() -> int:
        totals = smaps.smaps_rollup()
        return totals["Pss"] - totals.get("Pss_File", 0)

    return min(own() for _ in range(3))


def pss_of(*arrays: np.ndarray) -> int:
    """Of the mappings that these arrays lie in, and of the stores; nothing of what else the process
    holds, or a library keeps for later. The least of three, as above."""
    extents = [extent(array) for array in arrays]

    def own() -> int:
        return sum(
            vma.pss
            for vma in smaps.Snapshot().vmas_in(0, 1 << 64)
            if vma.path.startswith(STORE_PATH)
            or any(vma.start < end and vma.end > start for start, end in extents)
        )

    return min(own() for _ in range(3))


def present_pages(addr: int, n_pages: int) -> list[bool]:
    """For each page whether it is present or swapped, from /proc/self/pagemap; exact, whatever
    mapping the pages share with others."""
    with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        entries = os.pread(pagemap.fileno(), 8 * n_pages, addr // mmap.PAGESIZE * 8)
    return [entry >> 62 != 0 for (entry,) in struct.iter_unpack("=Q", entries)]


def store_mappings(start: int = 0, end: int = 1 << 64) -> list[smaps.Vma]:
    """The mappings of stores that overlap [start, end)."""
    found = smaps.Snapshot(start, end).vmas_in(start, end)
    return [vma for vma in found if vma.path.startswith(STORE_PATH)]


def store_bytes(start: int, end: int) -> int:
    """How many bytes of [start, end) map a store."""
    return sum(min(vma.end, end) - max(vma.start, start) for vma in store_mappings(start, end))


def is_plain(start: int, end: int) -> bool:
    """Whether [start, end) is plain private anonymous memory without a hole."""
    mappings = smaps.vmas_in(start, end)
    covered = sum(min(vma.end, end) - max(vma.start, start) for vma in mappings)
    return covered == end - start and all(
        vma.inode == 0 and vma.path in ("", "[heap]") and vma.writable and not vma.shared
        for vma in mappings
    )


def descriptors(kind: str = "") -> dict[int, str]:
    """The open descriptors of this process, and the name of each; only those with `kind` in it."""
    found = {}
    for fd in map(int, os.listdir("/proc/self/fd")):
        try:
            name = os.readlink(f"/proc/self/fd/{fd}")
        except FileNotFoundError:  # that of the listing itself
            continue
        if kind in name:
            found[fd] = name
    return found
