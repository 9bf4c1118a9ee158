"""What the pages of this process show: which page of which file, or nothing, where that can be told
without reading them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ksmcore._kernel.mappings import Mappings
from ksmcore._kernel.pagemap_entries import ABSENT, OF_FILE, PRESENT, own_entries
from ksmcore._kernel.syscalls import page_bytes

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["NOTHING", "UNKNOWN", "Shown"]

UNKNOWN, NOTHING = 0, 1
FIRST_FILE = 2
MOST_PAGES_OF_A_FILE = 1 << 40


class Shown:
    """Numbers for what pages show, the same for the same as long as this object lives, and as the
    caller sees to it that no page of a file is exchanged for another meanwhile."""

    def __init__(self) -> None:
        self._files: dict[tuple[tuple[int, int], int], int] = {}

    def of(self, addr: int, n_pages: int) -> NDArray[np.int64]:
        """UNKNOWN, NOTHING (zeros without memory), or a page of a file; of pages from `addr` on.

        Raises OSError.
        """
        size, end = page_bytes(), addr + n_pages * page_bytes()
        shown = np.zeros(n_pages, np.int64)
        # Mappings first: a page that is written after that is no page of a file any more, which the
        # entries tell.
        for mapping in Mappings().overlapping(addr, end):
            start, stop = max(mapping.start, addr), min(mapping.end, end)
            part = slice((start - addr) // size, (stop - addr) // size)
            if mapping.permissions.endswith("s"):
                continue
            if mapping.inode == 0:
                shown[part] = NOTHING
                continue
            file = (mapping.device, mapping.inode)
            number = self._files.setdefault(file, FIRST_FILE + len(self._files))
            first = (mapping.offset + start - mapping.start) // size
            shown[part] = number * MOST_PAGES_OF_A_FILE + first + np.arange(part.stop - part.start)
        entries = own_entries(addr, n_pages)
        is_absent = (entries & ABSENT) == 0
        is_of_file = (entries & (PRESENT | OF_FILE)) == (PRESENT | OF_FILE)
        # An absent page of a file was not read since it was mapped: a written one would be there,
        # or swapped out. An absent page of no file has never been, and holds zeros.
        is_known = is_absent | (is_of_file & (shown != NOTHING))
        return np.where(is_known, shown, UNKNOWN)
