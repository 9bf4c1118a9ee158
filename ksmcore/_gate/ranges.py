"""Arithmetic of address ranges."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator, Sequence

__all__ = ["disjoint", "gaps", "overlap_bytes"]


def disjoint(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same addresses, each once: (address, end) ranges sorted, with overlaps cut off."""
    found: list[tuple[int, int]] = []
    covered = 0
    for start, end in sorted(ranges):
        start = max(start, covered)
        if end > start:
            found.append((start, end))
            covered = end
    return found


def overlap_bytes(some: Sequence[tuple[int, int]], others: Sequence[tuple[int, int]]) -> int:
    """Bytes that are in both of two lists of ranges, each sorted and disjoint."""
    i = j = n_bytes = 0
    while i < len(some) and j < len(others):
        (start, end), (other_start, other_end) = some[i], others[j]
        n_bytes += max(min(end, other_end) - max(start, other_start), 0)
        if end < other_end:
            i += 1
        else:
            j += 1
    return n_bytes


def gaps(start: int, end: int, taken: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """What of [start, end) lies in none of the ranges `taken`, which are sorted and disjoint."""
    first = max(bisect.bisect_right(taken, (start, start)) - 1, 0)
    for n in range(first, len(taken)):
        taken_start, taken_end = taken[n]
        if taken_end <= start:
            continue
        if taken_start >= end:
            break
        if taken_start > start:
            yield start, taken_start
        start = taken_end
    if start < end:
        yield start, end
