"""Page-aligned NumPy arrays, registered with an engine from birth.

Called by the engine, whose methods of the same names these are. Equal arrays share pages only when
they begin at the same offset within a page; these all begin at offset 0.
"""

from __future__ import annotations

import math
import operator
from typing import TYPE_CHECKING, Any, Literal, SupportsIndex

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from ksmcore._memory import PageMemory

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ksmcore._core import Core

Shape = "SupportsIndex | Sequence[SupportsIndex]"
Order = Literal["C", "F"]


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


def _check_order(order: str) -> None:
    if order not in ("C", "F"):
        raise ValueError(f'order must be "C" or "F", not {order!r}')


def empty(
    core: Core, shape: SupportsIndex | Sequence[SupportsIndex], dtype: DTypeLike, order: Order
) -> NDArray[Any]:
    """An array of zeros that touches no memory yet: fresh pages are zero at no cost."""
    _check_order(order)
    kind = np.dtype(dtype)
    if kind.hasobject:
        raise TypeError(
            f"an array of dtype {kind} holds references to objects, and cannot be merged"
        )
    sizes = _sizes(shape)
    n_bytes = math.prod(sizes) * kind.itemsize
    if n_bytes == 0:
        return np.empty(sizes, kind, order)
    if n_bytes > 2**63 - 1:
        raise ValueError(f"array is too big: {n_bytes} bytes")
    memory: Any = PageMemory(core, n_bytes)  # Any: NumPy's stubs take listed buffers only
    return np.ndarray(sizes, kind, buffer=memory, order=order)


def full(
    core: Core,
    shape: SupportsIndex | Sequence[SupportsIndex],
    fill_value: Any,
    dtype: DTypeLike | None,
    order: Order,
) -> NDArray[Any]:
    kind = np.asarray(fill_value).dtype if dtype is None else np.dtype(dtype)
    made = empty(core, shape, kind, order)
    made[...] = fill_value
    return made


def array(core: Core, source: ArrayLike, dtype: DTypeLike | None) -> NDArray[Any]:
    """A page-aligned copy of anything that NumPy can make an array of; keeps a Fortran order."""
    given = np.asanyarray(source) if dtype is None else np.asanyarray(source, dtype=dtype)
    if isinstance(given, np.ma.MaskedArray):
        raise TypeError("masked arrays hold two arrays: copy .data and .mask")
    fortran = given.flags.f_contiguous and not given.flags.c_contiguous
    made = empty(core, given.shape, given.dtype, "F" if fortran else "C")
    made[...] = given
    return made
