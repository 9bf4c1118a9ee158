"""What the pages of this process show: which page of which file, or nothing, where that can be told
without reading them.

From Linux 6.11 on the kernel is asked for single mappings (PROCMAP_QUERY); before, all text of
``/proc/self/maps`` up to the range is read, which takes longer the more mappings there are.
"""

from __future__ import annotations

import errno
import fcntl
import re
import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ksmcore._kernel import files, procfs
from ksmcore._kernel.pagemap_entries import ABSENT, OF_FILE, PRESENT, own_entries
from ksmcore._kernel.syscalls import page_bytes

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["NOTHING", "UNKNOWN", "Shown"]

# size, flags, address asked for | start, end, flags, page size, offset, inode | major, minor, sizes
# of name and build id | where these go
QUERY = struct.Struct("=9Q4I2Q")
PROCMAP_QUERY = 3 << 30 | QUERY.size << 16 | ord("f") << 8 | 17
COVERING_OR_NEXT = 0x10
SHARED = 0x08

HEAD = re.compile(r"([0-9a-f]+)-([0-9a-f]+) ..(.)(.) ([0-9a-f]+) (\S+) ([0-9]+)")

UNKNOWN, NOTHING = 0, 1
FIRST_FILE = 2
MOST_PAGES_OF_A_FILE = 1 << 40


class Mapping(NamedTuple):
    start: int
    end: int
    is_shared: bool
    offset: int
    file: tuple[object, int] | None
    """Device and inode; None: anonymous."""


class Shown:
    """Numbers for what pages show, the same for the same as long as this object lives, and as the
    caller sees to it that no page of a file is exchanged for another meanwhile."""

    def __init__(self) -> None:
        self._files: dict[tuple[object, int], int] = {}

    def of(self, addr: int, n_pages: int) -> NDArray[np.int64]:
        """UNKNOWN, NOTHING (zeros without memory), or a page of a file; of pages from `addr` on.

        Raises OSError.
        """
        size, end = page_bytes(), addr + n_pages * page_bytes()
        shown = np.zeros(n_pages, np.int64)
        # Mappings first: a page that is written after that is no page of a file any more, which the
        # entries tell.
        for mapping in _mappings(addr, end):
            start, stop = max(mapping.start, addr), min(mapping.end, end)
            part = slice((start - addr) // size, (stop - addr) // size)
            if mapping.is_shared:
                continue
            if mapping.file is None:
                shown[part] = NOTHING
                continue
            number = self._files.setdefault(mapping.file, FIRST_FILE + len(self._files))
            first = (mapping.offset + start - mapping.start) // size
            shown[part] = number * MOST_PAGES_OF_A_FILE + first + np.arange(part.stop - part.start)
        entries = own_entries(addr, n_pages)
        is_absent = (entries & ABSENT) == 0
        is_of_file = (entries & (PRESENT | OF_FILE)) == (PRESENT | OF_FILE)
        # An absent page of a file was not read since it was mapped: a written one would be there,
        # or swapped out. An absent page of no file has never been, and holds zeros.
        is_known = is_absent | (is_of_file & (shown != NOTHING))
        return np.where(is_known, shown, UNKNOWN)


def _mappings(addr: int, end: int) -> Iterator[Mapping]:
    """Those that overlap a range, lowest first."""
    fd = files.open_read("/proc/self/maps")
    try:
        found = _query(fd, addr)
        while found is not None and found.start < end:
            yield found
            found = _query(fd, found.end) if found.end < end else None
    except OSError as error:
        if error.errno not in (errno.ENOTTY, errno.EINVAL):
            raise
    else:
        return
    finally:
        files.close(fd)
    yield from _mappings_of_text(addr, end)


def _query(fd: int, addr: int) -> Mapping | None:
    """The mapping there, or the next one. Raises OSError where the kernel does not know this."""
    asked = bytearray(QUERY.pack(QUERY.size, COVERING_OR_NEXT, addr, *[0] * 12))
    try:
        fcntl.ioctl(fd, PROCMAP_QUERY, asked)
    except OSError as error:
        if error.errno == errno.ENOENT:
            return None
        raise
    _, _, _, start, end, flags, _, offset, inode, major, minor, _, _, _, _ = QUERY.unpack(asked)
    file = ((major, minor), inode) if inode else None
    return Mapping(start, end, bool(flags & SHARED), offset, file)


def _mappings_of_text(addr: int, end: int) -> Iterator[Mapping]:
    for line in procfs.read("/proc/self/maps").split("\n"):
        found = HEAD.match(line)
        if found is None or int(found[2], 16) <= addr:
            continue
        start = int(found[1], 16)
        if start >= end:
            return
        file = (found[6], int(found[7])) if found[7] != "0" else None
        yield Mapping(start, int(found[2], 16), found[4] == "s", int(found[5], 16), file)
