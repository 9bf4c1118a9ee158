"""The inventory: equal pages in the whole memory of processes, by mapping, inside each and across.

Nothing is registered or merged. Pages are told apart by 64 bits made of two checksums: of a hundred
million different pages a pair would be taken for equal about once in four thousand inventories.
Bytes are not kept, and processes go on meanwhile: it is an estimate.

What is counted is memory: pages that a fork left two processes in common are one until they are
written, and so are the pages that the kernel's zero page backs, which need none at all. Where the
kernel hides the numbers of frames, pages in common are known by their address and content.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from ksmcore._kernel.outside import CannotLookError, Outside, Pages, Place
from ksmcore._kernel.pagemap_entries import EXCLUSIVE, FRAME
from ksmcore._kernel.syscalls import page_bytes
from ksmcore._pages import checksum_many, is_zero

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "Elsewhere",
    "Inventory",
    "InventoryOfProcess",
    "PlaceCounts",
    "look_elsewhere",
    "take_inventory",
]

# Apart from each other, so that a page and what it is called differ: of what is shared by a fork.
SHARED = np.uint64(1 << 63)
ZERO = np.uint64(0)  # the key of a page of zeros
PIECE_PAGES = 256
# Between two looks at the clock: much may be mapped of which nothing is there.
STRIDE_BYTES = 1 << 30
# Anonymous mappings of this size have a line of their own.
LARGE_BYTES = 1 << 20
LIBRARY = re.compile(r"\.so(\.[\d.]+)?$")


@dataclass(frozen=True)
class PlaceCounts:
    """The pages of one mapping, or of all mappings of one name."""

    name: str
    """A file's path, a name in brackets, or "[anon]" for anonymous memory, with its address where
    it is large."""
    kind: str
    """One of "library", "file", "heap", "stack" or "anonymous"."""
    bytes: int
    """Size of the pages that are the process's own."""
    equal_bytes: int
    """How much of it is equal to another page of that process, zeros included."""
    zero_bytes: int
    inside_bytes: int
    """What merging the pages of this place alone would save."""
    across_bytes: int
    """How much of it is equal to a page of another process."""


@dataclass(frozen=True)
class InventoryOfProcess:
    """One process."""

    pid: int
    command: list[str]
    bytes: int
    """Memory of its own that was looked at."""
    saveable_bytes: int
    """What merging its pages with each other would save."""
    zero_bytes: int
    across_bytes: int
    """How much of it is equal to a page of another process."""
    elsewhere_bytes: int
    """Of files and of shared memory, not looked at; merged pages of ksmcore are there too."""
    n_gone: int
    """Pages that were gone before they could be read."""
    ended: bool
    """It ended, or became another program, while it was looked at."""
    places: list[PlaceCounts]


@dataclass(frozen=True)
class Inventory:
    """What all of them have."""

    page_bytes: int
    bytes: int
    """Memory of their own; what a fork left them in common counts once."""
    saveable_bytes: int
    """What merging all their pages with each other would save."""
    within_bytes: int
    """What merging inside each of them would save: the sum."""
    processes: list[InventoryOfProcess]
    failures: dict[int, str]
    """Why others could not be looked at, by process."""


@dataclass(frozen=True)
class Elsewhere:
    """Private memory of this process, of no file, that lies outside of some ranges."""

    bytes: int
    """How much was looked at."""
    saveable_bytes: int
    """What merging its pages with each other would save."""
    is_all: bool
    """The time was enough to look at all of it."""


@dataclass
class _Found:
    """The pages of one process, a number of each kind per page."""

    keys: list[NDArray[np.uint64]] = field(default_factory=list)
    homes: list[NDArray[np.uint64]] = field(default_factory=list)
    """Where in physical memory: pages of equal homes are one. 0: nowhere, by the zero page."""
    names: list[NDArray[np.uint32]] = field(default_factory=list)

    def add(self, pages: Pages, name: int, size: int) -> None:
        keys = _keys(pages.data, size)
        addresses = np.uint64(pages.addr) + np.arange(len(keys), dtype=np.uint64) * np.uint64(size)
        is_common = (pages.entries & EXCLUSIVE) == 0
        frames = pages.entries & FRAME
        # Of its own, and so equal to no other's: filled in when all are there.
        homes = np.where(is_common, _mixed(addresses ^ keys) | SHARED, np.uint64(1))
        homes = np.where(is_common & (frames != 0), frames << np.uint64(1), homes)
        homes[is_common & (keys == ZERO)] = 0
        self.keys.append(keys)
        self.homes.append(homes)
        self.names.append(np.full(len(keys), name, np.uint32))

    def joined(self) -> tuple[NDArray[np.uint64], NDArray[np.uint64], NDArray[np.uint32]]:
        """Without the pages that take no memory."""
        if not self.keys:
            none = np.zeros(0, np.uint64)
            return none, none, np.zeros(0, np.uint32)
        keys, homes = np.concatenate(self.keys), np.concatenate(self.homes)
        names = np.concatenate(self.names)
        has_memory = homes != 0
        return keys[has_memory], homes[has_memory], names[has_memory]


def _keys(data: memoryview, size: int) -> NDArray[np.uint64]:
    """One per page: two checksums, or 0 for zeros."""
    found = np.empty(len(data) // size, np.uint64)
    for at in range(0, len(found), PIECE_PAGES):
        piece = data[at * size : (at + PIECE_PAGES) * size]
        high = np.array(checksum_many(piece, size, "jhash"), np.uint64)
        low = np.array(checksum_many(piece, size, "mmh3"), np.uint64)
        found[at : at + len(high)] = high << np.uint64(32) | low
    zero = _zero_key(size)
    for i in np.flatnonzero(found == zero).tolist():
        if is_zero(data[i * size : (i + 1) * size]):
            found[i] = ZERO
    return found


def _zero_key(size: int) -> np.uint64:
    page = bytes(size)
    high, low = checksum_many(page, size, "jhash")[0], checksum_many(page, size, "mmh3")[0]
    return np.uint64(high << 32 | low)


def _mixed(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Spread over all 64 bits."""
    spread = numbers * np.uint64(0x9E3779B97F4A7C15)
    return spread ^ spread >> np.uint64(29)


def take_inventory(pids: Sequence[int]) -> Inventory:
    """Look at these processes, one after the other. Those that cannot be looked at are in
    `failures`."""
    size = page_bytes()
    seen: list[_Seen] = []
    failures = {}
    for pid in dict.fromkeys(pids):
        try:
            seen.append(_look(pid, size))
        except CannotLookError as error:
            failures[pid] = str(error)
    all_keys = [one.keys for one in seen]
    in_several = _in_several(all_keys)
    processes = [one.counted(in_several, size) for one in seen]
    everything = np.concatenate([np.zeros(0, np.uint64), *all_keys])
    homes = np.concatenate([np.zeros(0, np.uint64), *(one.homes for one in seen)])
    n_pages, n_contents = _memory(homes), _contents(everything)
    return Inventory(
        page_bytes=size,
        bytes=n_pages * size,
        saveable_bytes=max(n_pages - n_contents, 0) * size,
        within_bytes=sum(one.saveable_bytes for one in processes),
        processes=processes,
        failures=failures,
    )


def look_elsewhere(reached: Iterable[tuple[int, int]], most_seconds: float) -> Elsewhere:
    """Look at the memory of this process outside of (start, end) ranges, for about so long.

    Raises OSError and CannotLookError where /proc is not as it is everywhere.
    """
    end, size = time.monotonic() + most_seconds, page_bytes()
    found, is_all = _Found(), True
    with Outside(os.getpid()) as process:
        for pages in _pages_outside(process, sorted(reached)):
            if time.monotonic() >= end:
                is_all = False
                break
            if pages is not None:
                found.add(pages, 0, size)
    keys, homes, _ = found.joined()
    return Elsewhere(
        bytes=_memory(homes) * size,
        saveable_bytes=max(_memory(homes) - _contents(keys), 0) * size,
        is_all=is_all,
    )


def _pages_outside(process: Outside, ranges: list[tuple[int, int]]) -> Iterator[Pages | None]:
    """What lies in none of these ranges, lowest first; None now and then where nothing is."""
    ranges = [*ranges, (1 << 64, 1 << 64)]
    at = 0
    for place in process.anonymous_places():
        start = place.start
        while start < place.end:
            while ranges[at][1] <= start:
                at += 1
            first, last = ranges[at]
            if first <= start:
                start = last
                continue
            end = min(place.end, first, start + STRIDE_BYTES)
            yield from process.own_pages(place._replace(start=start, end=end))
            yield None
            start = end


def _memory(homes: NDArray[np.uint64]) -> int:
    """Pages of physical memory."""
    n_own = int(np.count_nonzero(homes == 1))
    return n_own + _n_different(homes[homes != 1])


def _contents(keys: NDArray[np.uint64]) -> int:
    """Different contents that would remain: none for zeros."""
    return _n_different(keys[keys != ZERO])


def _n_different(numbers: NDArray[np.uint64]) -> int:
    """As many as `np.unique` finds, which imports numpy.ma for it."""
    ordered = np.sort(numbers)
    return min(len(ordered), 1) + int(np.count_nonzero(ordered[1:] != ordered[:-1]))


def _in_several(all_keys: list[NDArray[np.uint64]]) -> NDArray[np.uint64]:
    """Contents that more than one process has, zeros aside."""
    contents = [np.unique(keys) for keys in all_keys]
    found, counts = np.unique(
        np.concatenate([np.zeros(0, np.uint64), *contents]), return_counts=True
    )
    chosen: NDArray[np.uint64] = found[(counts > 1) & (found != ZERO)]
    return chosen


@dataclass
class _Seen:
    """A process when it was looked at."""

    pid: int
    command: list[str]
    names: list[tuple[str, str]]
    keys: NDArray[np.uint64]
    homes: NDArray[np.uint64]
    places: NDArray[np.uint32]
    n_elsewhere: int
    n_gone: int
    ended: bool

    def counted(self, in_several: NDArray[np.uint64], size: int) -> InventoryOfProcess:
        contents, which, counts = np.unique(self.keys, return_inverse=True, return_counts=True)
        has_equal = (counts[which] > 1) | (self.keys == ZERO)
        is_across = np.isin(contents, in_several)[which]
        places = []
        order = np.argsort(self.places, kind="stable")
        edges = np.searchsorted(self.places[order], np.arange(len(self.names) + 1))
        for number, (name, kind) in enumerate(self.names):
            here = order[edges[number] : edges[number + 1]]
            keys = self.keys[here]
            if len(keys):
                n_saved = max(_memory(self.homes[here]) - _contents(keys), 0)
                places.append(
                    PlaceCounts(
                        name=name,
                        kind=kind,
                        bytes=len(keys) * size,
                        equal_bytes=int(np.count_nonzero(has_equal[here])) * size,
                        zero_bytes=int(np.count_nonzero(keys == ZERO)) * size,
                        inside_bytes=n_saved * size,
                        across_bytes=int(np.count_nonzero(is_across[here])) * size,
                    )
                )
        places.sort(key=lambda place: (-place.equal_bytes - place.across_bytes, -place.bytes))
        return InventoryOfProcess(
            pid=self.pid,
            command=self.command,
            bytes=len(self.keys) * size,
            saveable_bytes=max(_memory(self.homes) - _contents(self.keys), 0) * size,
            zero_bytes=int(np.count_nonzero(self.keys == ZERO)) * size,
            across_bytes=int(np.count_nonzero(is_across)) * size,
            elsewhere_bytes=self.n_elsewhere * size,
            n_gone=self.n_gone,
            ended=self.ended,
            places=places,
        )


def _look(pid: int, size: int) -> _Seen:
    found, names = _Found(), dict[tuple[str, str], int]()
    with Outside(pid) as process:
        before: Place | None = None
        for place in process.places():
            if place.may_own:
                number = names.setdefault(_name(place, before), len(names))
                for pages in process.own_pages(place):
                    found.add(pages, number, size)
            before = place
        ended = not process.is_there()
        n_elsewhere, n_gone, command = process.n_elsewhere, process.n_gone, process.command
    keys, homes, places = found.joined()
    return _Seen(pid, command, list(names), keys, homes, places, n_elsewhere, n_gone, ended)


def _name(place: Place, before: Place | None) -> tuple[str, str]:
    """What a place is called and what it is, by the mapping before it."""
    name = place.name.removesuffix(" (deleted)")
    if not name and before is not None and before.end == place.start and before.is_written_file:
        name = before.name.removesuffix(" (deleted)")  # its variables that begin as zeros
    if name.startswith("/"):
        return name, "library" if LIBRARY.search(name) else "file"
    if name == "[heap]":
        return name, "heap"
    if name.startswith("[stack"):
        return name, "stack"
    # Of a size that a person would ask about; the rest is one.
    name = name or "[anon]"
    large = place.end - place.start >= LARGE_BYTES
    return (f"{name} {place.start:#x}" if large else name), "anonymous"
