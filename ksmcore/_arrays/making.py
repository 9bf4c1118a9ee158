"""Page-aligned NumPy arrays, registered with an engine from birth.

Equal arrays share pages only when they begin at the same offset within a page; these all begin at
offset 0. Arguments, and what is raised, are those of the methods of `Engine`.
"""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, Protocol, SupportsIndex

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ksmcore._arrays.page_memory import PageMemory

Order = Literal["C", "F"]

MIN_SHARED_PAGES = 16
"""A copy of fewer pages is not worth the two mappings that sharing them takes."""


def _sizes(shape: SupportsIndex | Sequence[SupportsIndex]) -> tuple[int, ...]:
    """A shape as NumPy takes it, checked."""
    given: Any = shape
    try:
        sizes: tuple[int, ...] = (operator.index(given),)
    except TypeError:
        sizes = tuple(operator.index(size) for size in given)
    if any(size < 0 for size in sizes):
        raise ValueError(f"negative dimensions are not allowed: {sizes}")
    return sizes


def _is_masked(array: NDArray[Any]) -> bool:
    """Not by np.ma, which imports that module when it is first named: here that may be in a child
    that was forked in the midst of it, and would wait for ever."""
    kind = getattr(sys.modules.get("numpy.ma"), "MaskedArray", ())
    return isinstance(array, kind)


def _check_order(order: str) -> None:
    if order not in ("C", "F"):
        raise ValueError(f'order must be "C" or "F", not {order!r}')


def _plain(dtype: DTypeLike) -> np.dtype[Any]:
    """A dtype whose bytes are all there is of a value; TypeError for others."""
    kind = np.dtype(dtype)
    if kind.itemsize == 0:
        kind = np.empty(0, kind).dtype  # as NumPy completes it: "S" gets one character
    if kind.hasobject:
        raise TypeError(
            f"an array of dtype {kind} holds references to objects, and cannot be merged"
        )
    return kind


def _extent(source: NDArray[Any]) -> tuple[int, int] | None:
    """First byte and end of an array's elements; None where they do not fill at least half of what
    lies between, or share bytes with each other."""
    if source.size == 0 or _is_masked(source):
        return None
    reach = source.itemsize
    axes = sorted(range(source.ndim), key=lambda axis: abs(source.strides[axis]))
    for axis in axes:
        if source.shape[axis] > 1:
            if abs(source.strides[axis]) < reach:
                return None
            reach += (source.shape[axis] - 1) * abs(source.strides[axis])
    first: int = source.__array_interface__["data"][0]
    first += sum(
        (size - 1) * stride
        for size, stride in zip(source.shape, source.strides, strict=True)
        if stride < 0
    )
    return (first, first + reach) if reach <= 2 * source.nbytes else None


class Memory(Protocol):
    """Where the memory of arrays comes from."""

    page_bytes: int

    def allocate(self, n_bytes: int, offset: int = 0) -> PageMemory:
        """New registered memory of zeros that begins `offset` bytes into a page."""

    def is_registered(self, addr: int, end: int) -> bool:
        """Is any of this memory registered there?"""


# Copies bytes (source, target, length) to memory just allocated, at the same offset in a page, so
# that both share whole pages.
Share = Callable[[int, int, int], None]


def empty(
    memory: Memory,
    shape: SupportsIndex | Sequence[SupportsIndex],
    dtype: DTypeLike = float,
    order: Order = "C",
) -> NDArray[Any]:
    """Page-aligned; zero, which costs nothing: fresh pages are, and none is touched."""
    _check_order(order)
    kind = _plain(dtype)
    sizes = _sizes(shape)
    n_bytes = math.prod(sizes) * kind.itemsize
    if n_bytes == 0:
        return np.empty(sizes, kind, order)
    if n_bytes > 2**63 - 1:
        raise ValueError(f"array is too big: {n_bytes} bytes")
    pages: Any = memory.allocate(n_bytes)  # Any: NumPy's stubs take listed buffers only
    return np.ndarray(sizes, kind, buffer=pages, order=order)


def full(
    memory: Memory,
    shape: SupportsIndex | Sequence[SupportsIndex],
    fill_value: Any,
    dtype: DTypeLike | None = None,
    order: Order = "C",
) -> NDArray[Any]:
    """Filled with a value."""
    kind = np.asarray(fill_value).dtype if dtype is None else np.dtype(dtype)
    made = empty(memory, shape, kind, order)
    made[...] = fill_value
    return made


def rows(
    memory: Memory,
    n: SupportsIndex,
    row_shape: SupportsIndex | Sequence[SupportsIndex],
    dtype: DTypeLike = float,
) -> NDArray[Any]:
    """Each row begins on a page; the gaps between the rows cannot be reached."""
    kind = _plain(dtype)
    sizes = (operator.index(n), *_sizes(row_shape))
    row_bytes = math.prod(sizes[1:]) * kind.itemsize
    if sizes[0] < 0:
        raise ValueError(f"negative dimensions are not allowed: {sizes}")
    if sizes[0] * row_bytes == 0:
        return np.empty(sizes, kind)
    stride = -(-row_bytes // memory.page_bytes) * memory.page_bytes
    if sizes[0] * stride > 2**63 - 1:
        raise ValueError(f"array is too big: {sizes[0] * stride} bytes")
    pages: Any = memory.allocate(sizes[0] * stride)
    within = [kind.itemsize * math.prod(sizes[axis + 1 :]) for axis in range(1, len(sizes))]
    return np.ndarray(sizes, kind, buffer=pages, strides=(stride, *within))


def array(memory: Memory, source: ArrayLike, dtype: DTypeLike | None = None) -> NDArray[Any]:
    """A copy; its axes keep their order in memory."""
    given = np.asanyarray(source) if dtype is None else np.asanyarray(source, dtype=dtype)
    if _is_masked(given):
        raise TypeError("masked arrays hold two arrays: copy .data and .mask")
    # The axis with the longest stride comes first in memory.
    axes = sorted(range(given.ndim), key=lambda axis: -abs(given.strides[axis]))
    made = empty(memory, [given.shape[axis] for axis in axes], given.dtype)
    made = made.transpose(np.argsort(axes)) if given.ndim > 1 else made
    made[...] = given
    return made


def copy(memory: Memory, share: Share, source: NDArray[Any]) -> NDArray[Any]:
    """A copy that shares its pages with the source, where that is registered memory."""
    if not isinstance(source, np.ndarray):
        raise TypeError(f"copy takes an array, not {type(source).__name__}; see array")
    extent = _extent(source)
    if (
        extent is None
        or extent[1] - extent[0] < MIN_SHARED_PAGES * memory.page_bytes
        or not memory.is_registered(*extent)
    ):
        return array(memory, source)
    _plain(source.dtype)
    start, end = extent
    made: Any = memory.allocate(end - start, start % memory.page_bytes)
    share(start, made.addr + made.offset, end - start)
    first: int = source.__array_interface__["data"][0] - start
    return np.ndarray(source.shape, source.dtype, made, first, source.strides)
