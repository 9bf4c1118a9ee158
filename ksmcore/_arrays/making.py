"""Page-aligned NumPy arrays, registered with an engine from birth.

Called by users, as methods of an engine. Equal arrays share pages only when
they begin at the same offset within a page; these all begin at offset 0.
"""

from __future__ import annotations

import math
import operator
import sys
from typing import TYPE_CHECKING, Any, Literal, SupportsIndex

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from ksmcore._kernel import syscalls
from ksmcore.errors import InternalError

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


class ArrayMaker:
    """The part of an engine that makes arrays; the rest of it allocates their memory."""

    page_bytes: int = syscalls.page_bytes()

    def _allocate(self, n_bytes: int, offset: int = 0) -> PageMemory:
        """New registered memory that begins `offset` bytes into a page; ValueError when the engine
        is closed."""
        raise InternalError("an engine must know how to allocate")

    def _is_registered(self, addr: int, end: int) -> bool:
        """Is any of this memory registered with this engine?"""
        raise InternalError("an engine must know what is registered")

    def _copy_memory(self, source: int, target: int, n_bytes: int) -> None:
        """Copy to fresh registered memory at the same offset in a page; both share whole pages."""
        raise InternalError("an engine must know how to copy memory")

    def empty(
        self,
        shape: SupportsIndex | Sequence[SupportsIndex],
        dtype: DTypeLike = float,
        order: Order = "C",
    ) -> NDArray[Any]:
        """A page-aligned array, registered from birth, given back when its last view is collected.

        As `numpy.empty`, except that the memory is zero, which costs nothing: fresh pages are, and
        none is touched.

        Raises:
            TypeError: a dtype that holds references to objects.
            ValueError: a negative size, an unknown order, or an engine that is closed.
            MemoryError: no memory.
        """
        _check_order(order)
        kind = _plain(dtype)
        sizes = _sizes(shape)
        n_bytes = math.prod(sizes) * kind.itemsize
        if n_bytes == 0:
            return np.empty(sizes, kind, order)
        if n_bytes > 2**63 - 1:
            raise ValueError(f"array is too big: {n_bytes} bytes")
        memory: Any = self._allocate(n_bytes)  # Any: NumPy's stubs take listed buffers only
        return np.ndarray(sizes, kind, buffer=memory, order=order)

    def zeros(
        self,
        shape: SupportsIndex | Sequence[SupportsIndex],
        dtype: DTypeLike = float,
        order: Order = "C",
    ) -> NDArray[Any]:
        """A page-aligned, registered array of zeros; takes no memory until it is written."""
        return self.empty(shape, dtype, order)

    def full(
        self,
        shape: SupportsIndex | Sequence[SupportsIndex],
        fill_value: Any,
        dtype: DTypeLike | None = None,
        order: Order = "C",
    ) -> NDArray[Any]:
        """A page-aligned, registered array filled with a value, as `numpy.full`."""
        kind = np.asarray(fill_value).dtype if dtype is None else np.dtype(dtype)
        made = self.empty(shape, kind, order)
        made[...] = fill_value
        return made

    def rows(
        self,
        n: SupportsIndex,
        row_shape: SupportsIndex | Sequence[SupportsIndex],
        dtype: DTypeLike = float,
    ) -> NDArray[Any]:
        """An array of n rows, each of which begins on a page: equal rows can be merged, whatever
        their size. For frames and records that are not a whole number of pages long.

        The shape is (n, *row_shape). Between the rows are gaps of less than a page, which hold
        zeros and cannot be reached; so the array is not contiguous as a whole, each row is, and
        rows much shorter than a page waste most of their memory. All is zero, and takes no memory
        until it is written. Other calls (`dedup`, `hold`, `unregister`) take such an array for all
        the memory that it lies in.

        Raises as `empty` does.
        """
        kind = _plain(dtype)
        sizes = (operator.index(n), *_sizes(row_shape))
        row_bytes = math.prod(sizes[1:]) * kind.itemsize
        if sizes[0] < 0:
            raise ValueError(f"negative dimensions are not allowed: {sizes}")
        if sizes[0] * row_bytes == 0:
            return np.empty(sizes, kind)
        stride = -(-row_bytes // self.page_bytes) * self.page_bytes
        if sizes[0] * stride > 2**63 - 1:
            raise ValueError(f"array is too big: {sizes[0] * stride} bytes")
        memory: Any = self._allocate(sizes[0] * stride)
        within = [kind.itemsize * math.prod(sizes[axis + 1 :]) for axis in range(1, len(sizes))]
        return np.ndarray(sizes, kind, buffer=memory, strides=(stride, *within))

    def array(self, source: ArrayLike, dtype: DTypeLike | None = None) -> NDArray[Any]:
        """A page-aligned, registered copy of anything array-like; its axes keep their order in
        memory (as `numpy.copy` with order "K" has it)."""
        given = np.asanyarray(source) if dtype is None else np.asanyarray(source, dtype=dtype)
        if _is_masked(given):
            raise TypeError("masked arrays hold two arrays: copy .data and .mask")
        # The axis with the longest stride comes first in memory.
        axes = sorted(range(given.ndim), key=lambda axis: -abs(given.strides[axis]))
        made = self.empty([given.shape[axis] for axis in axes], given.dtype)
        made = made.transpose(np.argsort(axes)) if given.ndim > 1 else made
        made[...] = given
        return made

    def copy(self, source: NDArray[Any]) -> NDArray[Any]:
        """A registered copy of an array that shares its pages with the source, copy-on-write.

        Pages of the source that are shared already are mapped once more: no byte is copied, so it
        takes a small part of the time of `numpy.copy`, and no memory. Others are copied, and then
        merged with their copies, so the next copy shares them from the start. Writes to either side
        stay there. Shape, dtype and strides are kept.

        For that the source has to lie in memory that is registered with this engine: made by it, or
        under the allocator, or registered. Others, arrays of fewer than 16 pages, and views whose
        elements leave large gaps or lie over each other are copied as by `array`: page-aligned,
        their axes in the same order.

        Raises:
            TypeError: no array; or one that holds references to objects.
            ValueError: the engine is closed.
            MemoryError: no memory.
        """
        if not isinstance(source, np.ndarray):
            raise TypeError(f"copy takes an array, not {type(source).__name__}; see array")
        extent = _extent(source)
        if (
            extent is None
            or extent[1] - extent[0] < MIN_SHARED_PAGES * self.page_bytes
            or not self._is_registered(*extent)
        ):
            return self.array(source)
        _plain(source.dtype)
        start, end = extent
        made: Any = self._allocate(end - start, start % self.page_bytes)
        self._copy_memory(start, made.addr + made.offset, end - start)
        first: int = source.__array_interface__["data"][0] - start
        return np.ndarray(source.shape, source.dtype, made, first, source.strides)
