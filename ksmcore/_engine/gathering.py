"""Objects that hold memory in many places: what is found in them becomes exports, disjoint ones."""

from __future__ import annotations

import bisect
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ksmcore._gate.buffers import Admission, Export, Released, admit_some, not_a_buffer, release_all
from ksmcore._gate.memories import Memory, UnreachableError, one_memory
from ksmcore._gate.objects import Leaf, PartsOf, is_hopeless, reach
from ksmcore._gate.ranges import gaps

__all__ = [
    "Gathered",
    "Unreached",
    "admit_those",
    "as_one",
    "gather",
    "lies_within",
    "not_taken",
    "together",
]

Unreached = Counter[str]
"""What there was no way to: how many, by class and reason."""

# Of reasons, in a message.
MOST_NAMED = 3


@dataclass(frozen=True, slots=True)
class Gathered(Released):
    """All memory that was found in an object, held until `release`, or the end of a `with` block:
    disjoint, by address."""

    exports: list[Export]
    unreached: Unreached

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """Of the pages: (address, length in bytes)."""
        return [(export.addr, export.n_bytes) for export in self.exports]

    def release(self) -> None:
        release_all(self.exports)


def as_one(buffer: object) -> object | None:
    """What the gate takes for this object, None if there may be memory in many places of it.

    TypeError, ValueError where there is none, or no way to it.
    """
    if is_hopeless(buffer):
        raise not_a_buffer(buffer)
    if isinstance(buffer, np.ndarray) and buffer.dtype.kind == "O":
        return None
    try:
        return one_memory(buffer)
    except UnreachableError as error:
        raise ValueError(f"this {type(buffer).__name__} cannot be merged: {error}") from error


def gather(thing: object, export: Callable[[object, str], Export], parts_of: PartsOf) -> Gathered:
    """Take hold of all memory in an object that there is a way to; the rest is counted.

    `export`: takes hold of one piece, given the name of its class.

    Raises:
        TypeError: there is no memory in it.
        ValueError: none of it can be reached.
    """
    reached = reach(thing, parts_of)
    unreached: Unreached = Counter(reached.unreached)
    exports: list[Export] = []
    try:
        for start, len_bytes, leaf in _outermost(reached.leaves):
            try:
                exports.append(_export_with(export, leaf, start, len_bytes))
            except (TypeError, ValueError, BufferError) as error:
                unreached[f"{leaf.name}: {_reason(error)}"] += 1
        if not exports:
            raise _nothing_reached(thing, unreached, export)
    except BaseException:
        release_all(exports)
        raise
    return Gathered(exports, unreached)


def _outermost(
    leaves: dict[tuple[int, int], Leaf],
) -> Iterator[tuple[int, int, Leaf]]:
    """(address, length, leaf), disjoint: what lies in another is left out, and what overlaps in
    part becomes one, held by all of them."""
    first, end, group = 0, 0, list[Leaf]()
    for (start, len_bytes), leaf in sorted(leaves.items(), key=lambda one: (one[0][0], -one[0][1])):
        if group and start < end:
            if start + len_bytes > end:
                end = start + len_bytes
                group.append(leaf)
            continue
        if group:
            yield first, end - first, _joined(first, end - first, group)
        first, end, group = start, start + len_bytes, [leaf]
    if group:
        yield first, end - first, _joined(first, end - first, group)


def _joined(start: int, len_bytes: int, group: list[Leaf]) -> Leaf:
    if len(group) == 1:
        return group[0]
    settling = [
        leaf.memory.settle
        for leaf in group
        if isinstance(leaf.memory, Memory) and leaf.memory.settle is not None
    ]

    def settle() -> None:
        for one in settling:
            one()

    keepers = [
        leaf.memory if isinstance(leaf.memory, Memory) else memoryview(leaf.memory)  # type: ignore[arg-type]
        for leaf in group
    ]
    return Leaf(Memory(start, len_bytes, keepers, settle=settle), group[0].name)


def _export_with(
    export: Callable[[object, str], Export], leaf: Leaf, start: int, len_bytes: int
) -> Export:
    held = export(leaf.memory, leaf.name)
    if (held.first_byte, held.len_bytes) != (start, len_bytes):
        held.release()
        raise ValueError("it moved meanwhile")
    return held


def together(objects: Iterable[Gathered]) -> Gathered:
    """What was found in several objects, each page once; what is there once more is let go."""
    exports: list[Export] = []
    unreached: Unreached = Counter()
    covered = 0
    for gathered in objects:
        exports += gathered.exports
        unreached += gathered.unreached
    apart: list[Export] = []
    for export in sorted(exports, key=lambda one: (one.addr, -one.end)):
        apart += _left_over([export], [(0, covered)])
        covered = max(covered, export.end)
    return Gathered(apart, unreached)


def not_taken(
    gathered: Gathered, taken: Sequence[tuple[int, int]], theirs: Sequence[tuple[int, int]]
) -> list[Export]:
    """What of it lies in none of the ranges `taken`, and in none of `theirs`, which are registered
    with other engines, and counted. The rest is let go. Both are sorted and disjoint."""
    new: list[Export] = []
    for export in _left_over(gathered.exports, taken):
        parts = list(_left_over([export], theirs))
        if parts != [export]:
            gathered.unreached[f"{export.name}: registered with another engine"] += 1
        new += parts
    return new


def _left_over(exports: Iterable[Export], taken: Sequence[tuple[int, int]]) -> Iterator[Export]:
    """An export of which all pages are left stays what it is; the others are let go, and held by
    those of their parts that are left."""
    for export in exports:
        left = list(gaps(export.addr, export.end, taken))
        if left == [(export.addr, export.end)]:
            yield export
            continue
        for start, end in left:
            part = Memory(
                start, end - start, export.view[:], library=export.library, settle=export.settle
            )
            yield Export(part, export.n_bytes // export.n_pages, None, export.name)
        export.release()


def admit_those(
    exports: list[Export],
    unreached: Unreached,
    *,
    page_bytes: int,
    needed: bool = True,
    privatize: bool = False,
) -> list[Admission]:
    """Those that may be merged; the others are counted. ValueError where none may be, and one is
    needed."""
    admissions, refused = admit_some(exports, page_bytes=page_bytes, privatize=privatize)
    if needed and refused and not admissions:
        raise refused[0][1].error()
    unreached.update(f"{name}: {refusal.why}" for name, refusal in refused)
    return admissions


def lies_within(start: int, end: int, ranges: Sequence[tuple[int, int]]) -> bool:
    """Does [start, end) lie in one of these ranges, which are sorted and disjoint?"""
    n = bisect.bisect_right(ranges, (start, sys.maxsize * 2)) - 1
    return n >= 0 and ranges[n][0] <= start and end <= ranges[n][1]


def _nothing_reached(
    thing: object, unreached: Unreached, export: Callable[[object, str], Export]
) -> Exception:
    if isinstance(thing, np.ndarray):
        try:
            export(thing, type(thing).__name__).release()
        except (TypeError, ValueError) as error:
            return error
    if not unreached:
        return not_a_buffer(thing)
    named = "; ".join(f"{n:,} x {what}" for what, n in unreached.most_common(MOST_NAMED))
    return ValueError(f"nothing of this {type(thing).__name__} can be merged: {named}")


def _reason(error: Exception) -> str:
    """The first words of an error, up to where it tells figures or ways out."""
    return str(error).partition(":")[0].partition(";")[0].removesuffix(" this buffer")
