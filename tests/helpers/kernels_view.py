"""What the kernel says of this process's memory, for tests that prove by it."""

import mmap
import os
import struct

import numpy as np

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
    ranges = [(a.__array_interface__["data"][0], a.nbytes) for a in arrays]

    def own() -> int:
        return sum(
            vma.pss
            for vma in smaps.Snapshot().vmas_in(0, 1 << 64)
            if vma.path.startswith(STORE_PATH)
            or any(vma.start < start + size and vma.end > start for start, size in ranges)
        )

    return min(own() for _ in range(3))


def present_pages(addr: int, n_pages: int) -> list[bool]:
    """For each page whether it is present or swapped, from /proc/self/pagemap; exact, whatever
    mapping the pages share with others."""
    with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        entries = os.pread(pagemap.fileno(), 8 * n_pages, addr // mmap.PAGESIZE * 8)
    return [entry >> 62 != 0 for (entry,) in struct.iter_unpack("=Q", entries)]
