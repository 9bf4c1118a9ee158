"""What the kernel says of this process's memory mappings, read from ``/proc/self``.

Owns the parsing of ``smaps`` and ``smaps_rollup``, and counts the lines of ``maps``; holds no state
between calls and changes no mapping. All addresses and sizes are in bytes.

Why every question about flags reads ``smaps`` from its start. Measured on Linux 6.18 in a virtual
machine with slow page tables:

* One pass over ``smaps`` costs 2.5-3 us per mapping, and a walk over the page tables of what is
  resident: 1.2 ms for an interpreter with NumPy and 195 mappings, 10-15 ms more for each GiB of
  small resident pages, 145-175 ms for 60,000 mappings.
* ``smaps`` cannot be entered in the middle: a file offset is a number of bytes of text, and the
  kernel produces all text before it (114 ms for an offset behind the end).
* The ioctl PROCMAP_QUERY (Linux 6.11) finds a mapping in 1.3-2 us, but tells neither no-fork,
  no-dump, wipe-on-fork, huge page advice, protection key nor userfaultfd. No other call tells them
  without changing something, so a "good" answer from it would be a guess.

What remains is to stop at the end of the range in question, and not to read twice: `Snapshot`
answers for any number of buffers after one read.
"""

from __future__ import annotations

import bisect
import mmap
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ksmcore._kernel import files, procfs
from ksmcore._kernel.numa import own_numa_policy
from ksmcore._kernel.procfs import locked_bytes, max_map_count

__all__ = [
    "Snapshot",
    "Vma",
    "count_maps",
    "locked_bytes",
    "max_map_count",
    "own_numa_policy",
    "parse_smaps",
    "smaps_rollup",
    "vmas_in",
]

# One read() of smaps returns whole records, as many as fit into a buffer of one page inside the
# kernel; asking for more only wastes the allocation on this side.
_SMAPS_READ_BYTES = 16 << 10
# maps has records of some 100 bytes, and is treated alike.
_MAPS_READ_BYTES = 64 << 10

_ADDRESS_END = 1 << 64

_HEADER = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S+) ([0-9a-f]+) \S+ ([0-9]+)(?: +(.*))?")
_HEADER_START = re.compile(rb"([0-9a-f]+)-[0-9a-f]+ ")

# Sizes of one mapping: our field name for the kernel's.
_SIZE_FIELDS = {
    "Rss": "rss",
    "Pss": "pss",
    "Anonymous": "anonymous",
    "Swap": "swap",
    "Locked": "locked",
}


@dataclass(frozen=True, slots=True)
class Vma:
    """One mapping as ``/proc/self/smaps`` shows it; every size is in bytes.

    A field that the running kernel does not print holds its neutral value: 0, an empty set, or
    the system page size for `page_bytes`.
    """

    start: int
    """Address of the first byte."""
    end: int
    """Address after the last byte."""
    readable: bool
    writable: bool
    executable: bool
    shared: bool
    offset: int
    """Offset in the mapped file."""
    inode: int
    """Inode of the mapped file; 0 for private anonymous memory."""
    path: str
    """File name, or a name in brackets, or "" for plain anonymous memory."""
    flags: frozenset[str]
    """Two-letter codes of the VmFlags line."""
    page_bytes: int
    """KernelPageSize; differs from the system page for hugetlb only, not for huge page advice."""
    protection_key: int
    rss: int
    pss: int
    anonymous: int
    swap: int
    locked: int
    """PSS of what mlock(2) holds; the ``lo`` flag says whether it applies at all."""


def parse_smaps(lines: Iterable[str]) -> Iterator[Vma]:
    """Turn the text of an smaps file into mappings, in the order of the text; or that of a maps
    file, which has the first line of each.

    Unknown lines are passed over, and missing ones leave the neutral value, so that older and
    newer kernels are both understood.

    Raises:
        ValueError: the first line is not the head of a mapping.
    """
    head: re.Match[str] | None = None
    below: list[str] = []
    for line in lines:
        match = _HEADER.fullmatch(line.removesuffix("\n"))
        if match is not None:
            if head is not None:
                yield _make_vma(head, below)
            head, below = match, []
            continue
        if head is None:
            raise ValueError(f"not the text of an smaps file, which begins {line[:80]!r}")
        below.append(line)
    if head is not None:
        yield _make_vma(head, below)


def _make_vma(head: re.Match[str], lines: list[str]) -> Vma:
    start, end, permissions, offset, inode, path = head.groups()
    fields = dict(procfs.fields(lines))
    sizes = {
        ours: procfs.size_bytes(fields.get(theirs)) or 0 for theirs, ours in _SIZE_FIELDS.items()
    }
    key = fields.get("ProtectionKey", "")
    return Vma(
        start=int(start, 16),
        end=int(end, 16),
        readable="r" in permissions,
        writable="w" in permissions,
        executable="x" in permissions,
        shared="s" in permissions,
        offset=int(offset, 16),
        inode=int(inode),
        path=path or "",
        flags=frozenset(fields.get("VmFlags", "").split()),
        page_bytes=procfs.size_bytes(fields.get("KernelPageSize")) or mmap.PAGESIZE,
        protection_key=int(key) if key.isdigit() else 0,
        **sizes,
    )


class Snapshot:
    """The text of smaps for a stretch of addresses, parsed only where it is asked about.

    Other threads may change mappings at any time, also while the text is read: a mapping that
    grows meanwhile can appear twice. Ranges whose owner keeps them mapped (a held buffer export)
    are always covered by what is really there.
    """

    __slots__ = ("_chunks", "_parsed", "_parsed_range", "_starts")

    def __init__(self, start: int = 0, end: int = _ADDRESS_END) -> None:
        """Read what the kernel says of the mappings that overlap [start, end).

        Raises:
            OSError: smaps cannot be opened or read (a sandbox without it, no descriptor left).
        """
        # Each chunk begins with the head of a record, whose address stands in _starts; so a
        # mapping is found by bisection, and 60,000 of them are never parsed for the sake of one.
        self._chunks: list[bytes] = []
        self._starts: list[int] = []
        # The last stretch of chunks that was parsed: many buffers lie in one mapping.
        self._parsed_range = (0, 0)
        self._parsed: list[Vma] = []
        for first, chunk in _chunks_of("/proc/self/smaps"):
            if first >= end:
                break
            if first <= start:
                # Everything before this chunk lies below the range.
                self._chunks.clear()
                self._starts.clear()
            self._chunks.append(chunk)
            self._starts.append(first)

    def vmas_in(self, start: int, end: int) -> list[Vma]:
        """The mappings that overlap [start, end), lowest first."""
        low = max(bisect.bisect_right(self._starts, start) - 1, 0)
        high = bisect.bisect_left(self._starts, end)
        if self._parsed_range != (low, high):
            self._parsed = _parsed(self._chunks[low:high])
            self._parsed_range = (low, high)
        return [vma for vma in self._parsed if vma.start < end and vma.end > start]

    def vmas_of(self, path: str) -> list[Vma]:
        """The mappings of files whose path begins so, lowest first: few, of many."""
        sought = os.fsencode(path)
        found = _parsed([chunk for chunk in self._chunks if sought in chunk])
        return [vma for vma in found if vma.path.startswith(path)]


def _parsed(chunks: list[bytes]) -> list[Vma]:
    text = os.fsdecode(b"".join(chunks))
    # The kernel writes a newline in a file name as \012, but leaves alone other characters at
    # which splitlines() would break.
    return list(parse_smaps(text.removesuffix("\n").split("\n") if text else []))


def _chunks_of(path: str) -> Iterator[tuple[int, bytes]]:
    """Pieces of an smaps file that begin at the head of a record, each with the address there."""
    fd = files.open_read(path)
    try:
        pending = b""
        while chunk := os.read(fd, _SMAPS_READ_BYTES):
            # A read normally gives whole records; where it does not, the pieces are joined.
            if pending.endswith(b"\n") and _HEADER_START.match(chunk):
                yield _first_address(pending), pending
                pending = chunk
            else:
                pending += chunk
        if pending:
            yield _first_address(pending), pending
    finally:
        files.close(fd)


def _first_address(chunk: bytes) -> int:
    """Address in the head that `chunk` begins with; 0 for other text, which the parser refuses."""
    head = _HEADER_START.match(chunk)
    return int(head[1], 16) if head else 0


def vmas_in(start: int, end: int) -> list[Vma]:
    """The mappings that overlap [start, end), lowest first; gaps are simply absent.

    Reads smaps from its start up to `end`, about 2.5 us per mapping on the way.

    Raises:
        OSError: smaps cannot be opened or read.
    """
    return Snapshot(start, end).vmas_in(start, end)


def count_maps(process: str | os.PathLike[str] = "/proc/self") -> int:
    """Number of mappings of this process, about 0.35 us each (21 ms for 60,000), or of another.

    Raises:
        OSError: maps cannot be opened or read.
    """
    n_lines = 0
    fd = files.open_read(os.path.join(process, "maps"))
    try:
        while chunk := os.read(fd, _MAPS_READ_BYTES):
            n_lines += chunk.count(b"\n")
    finally:
        files.close(fd)
    return n_lines


def smaps_rollup(process: str | os.PathLike[str] = "/proc/self") -> dict[str, int]:
    """Sums over all mappings of this process, or of another: the kernel's names (Rss, Pss, Swap,
    ...) to bytes.

    About 16 ms with 60,000 mappings. Kernels before 4.14 have no smaps_rollup; there the fields
    of smaps are added up, ten times slower. The sizes that are not sums (Size of the mapping,
    page sizes) are left out in both cases.

    Raises:
        OSError: neither file can be read.
    """
    try:
        text = procfs.read(os.path.join(process, "smaps_rollup"))
    except FileNotFoundError:
        text = procfs.read(os.path.join(process, "smaps"))
    sums: dict[str, int] = {}
    for name, n_bytes in procfs.sizes(text.split("\n")):
        if name not in ("Size", "KernelPageSize", "MMUPageSize"):
            sums[name] = sums.get(name, 0) + n_bytes
    return sums
