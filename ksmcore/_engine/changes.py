"""Where a copy differs from its source, read only where they do not show the same shared page.

The scanner is kept away from both, so that no shared page is exchanged for another between
two questions to the kernel. A write meanwhile is seen or not, as with any comparison.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ksmcore._kernel.shown import UNKNOWN, Shown
from ksmcore._kernel.syscalls import page_bytes

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ksmcore._engine.registrar import Registrar

__all__ = ["Changes", "changed", "differences"]

# Compared at a time: what a comparison makes stays in the cache.
PIECE_BYTES = 1 << 18


@dataclass(frozen=True, eq=False, repr=False)
class Changes:
    """Where two arrays differ. In the order of memory, ascending."""

    pages: NDArray[np.intp]
    """Numbers of the pages that differ; page 0 is that in which the copy begins."""
    rows: NDArray[np.intp]
    """Numbers of the rows that differ, along the first axis."""
    pages_total: int
    """Pages over which the copy lies."""
    pages_read: int
    """Those that had to be compared; the others show the same shared page in both arrays."""

    def __bool__(self) -> bool:
        return len(self.pages) > 0

    def __repr__(self) -> str:
        return (
            f"<ksmcore.Changes: {len(self.pages)} of {self.pages_total} pages, "
            f"{len(self.rows)} rows differ; {self.pages_read} pages read>"
        )


def _check(copy: object, source: object) -> None:
    """Raises TypeError or ValueError for what cannot be compared byte by byte."""
    for array in (copy, source):
        if not isinstance(array, np.ndarray):
            raise TypeError(f"arrays are compared, not {type(array).__name__}")
        if array.dtype.hasobject:
            raise TypeError("arrays of references to objects cannot be compared by their bytes")
        if not array.flags.c_contiguous:
            raise ValueError("only C-contiguous arrays can be compared page by page")
    if _form(copy) != _form(source):
        raise ValueError("the arrays are of different shapes or dtypes: the one is no copy")


def _form(array: Any) -> tuple[Any, Any]:
    return array.shape, array.dtype


def changed(registrar: Registrar, copy: NDArray[Any], since: NDArray[Any]) -> Changes:
    """See `Engine.changed`. By pages where both are registered here, and so can be held."""
    with contextlib.ExitStack() as held:
        try:
            for array in (copy, since):
                held.enter_context(registrar.hold(array))
            is_held = True
        except (TypeError, ValueError):  # not registered here, or not writable
            is_held = False
        return differences(copy, since, by_pages=is_held)


def differences(copy: NDArray[Any], source: NDArray[Any], *, by_pages: bool) -> Changes:
    """Compare two arrays. `by_pages`: the scanner is kept away from both, so that pages can be told
    by what they show.

    Raises:
        TypeError, ValueError: they cannot be compared byte by byte.
    """
    _check(copy, source)
    size = page_bytes()
    ours, theirs = _bytes_of(copy), _bytes_of(source)
    first, other = ours.ctypes.data % size, theirs.ctypes.data % size
    n_pages = -(-(first + len(ours)) // size) if len(ours) else 0
    is_same = np.zeros(n_pages, np.bool_)
    if by_pages and first == other and n_pages:
        shown = Shown()
        what = shown.of(ours.ctypes.data - first, n_pages)
        is_same = (what != UNKNOWN) & (what == shown.of(theirs.ctypes.data - first, n_pages))
    row_bytes = max(len(ours) // len(copy) if copy.ndim and len(copy) else len(ours), 1)
    pages, rows = [], []
    for start, end in _stretches(~is_same):
        # The bytes of these pages that are the arrays'.
        low, high = max(start * size - first, 0), min(end * size - first, len(ours))
        for at in range(low, high, PIECE_BYTES):
            stop = min(at + PIECE_BYTES, high)
            differs = ours[at:stop] != theirs[at:stop]
            if differs.any():
                pages.append(_units(differs, at + first, size))
                rows.append(_units(differs, at, row_bytes))
    return Changes(
        pages=_joined(pages),
        rows=_joined(rows),
        pages_total=n_pages,
        pages_read=n_pages - int(np.count_nonzero(is_same)),
    )


def _bytes_of(array: NDArray[Any]) -> NDArray[np.uint8]:
    return np.ndarray((array.nbytes,), np.uint8, array.data if array.nbytes else b"")


def _joined(parts: list[NDArray[np.intp]]) -> NDArray[np.intp]:
    return np.unique(np.concatenate([np.zeros(0, np.intp), *parts]))


def _units(differs: NDArray[np.bool_], at: int, unit: int) -> NDArray[np.intp]:
    """Numbers of the units (pages, rows) in which a byte differs; the first byte is number `at`."""
    n_units = (at + len(differs) - 1) // unit - at // unit + 1
    edges = np.arange(n_units, dtype=np.intp) * unit - at % unit
    edges[0] = 0
    return np.flatnonzero(np.logical_or.reduceat(differs, edges)) + at // unit


def _stretches(is_wanted: NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(np.concatenate(([False], is_wanted, [False]))))
    yield from ((int(start), int(end)) for start, end in edges.reshape(-1, 2))
