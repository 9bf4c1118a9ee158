"""NumPy's arrays, made page-aligned and registered with the default engine, without a change of the
program.

Called by users. Calls _allocator, which NumPy then calls for the memory of every array (NEP 49).
"""

from __future__ import annotations

import operator
import threading
from contextvars import ContextVar
from types import TracebackType
from typing import TYPE_CHECKING, SupportsIndex

import numpy as np

from ksmcore import _allocator

if TYPE_CHECKING:
    from ksmcore.registration import Registrar

__all__ = ["THRESHOLD_BYTES", "Allocator", "install", "uninstall"]

THRESHOLD_BYTES = 64 * 1024
"""Smaller arrays are left to NumPy: every array takes whole pages, and a page is the least that is
merged."""

# What the blocks that a context is in have put aside, the outermost first. One for all allocators:
# each may be entered in several contexts at a time.
_put_aside: ContextVar[tuple[object, ...]] = ContextVar("ksmcore_put_aside", default=())

_beginning = threading.Lock()
_begun = False


def _checked(threshold_bytes: SupportsIndex) -> int:
    n_bytes = operator.index(threshold_bytes)
    if not 1 <= n_bytes <= 2**63 - 1:
        raise ValueError(f"threshold_bytes must be at least 1, not {n_bytes}")
    return n_bytes


def _begin(engine: Registrar) -> None:
    """Tie the arena to the default engine's core, once; with KSMCORE_DISABLE, to none."""
    global _begun
    with _beginning:
        if not _begun:
            core = None if engine._disabled else engine._core
            _allocator.begin(core, _numpy_wants_huge())
            _begun = True


def _numpy_wants_huge() -> bool:
    """Does NumPy ask for huge pages for its large arrays? (NUMPY_MADVISE_HUGEPAGE=0 keeps it from
    that.)"""
    try:
        from numpy._core import multiarray
    except ImportError:  # NumPy 1
        from numpy.core import multiarray  # type: ignore[no-redef]
    before = bool(multiarray._set_madvise_hugepage(True))  # type: ignore[attr-defined]
    multiarray._set_madvise_hugepage(before)  # type: ignore[attr-defined]
    return before


class Allocator:
    """`with ksmcore.allocator():`; may be entered again and again, within itself and in several
    threads too."""

    def __init__(self, engine: Registrar, threshold_bytes: SupportsIndex) -> None:
        self._threshold_bytes = _checked(threshold_bytes)
        self._engine = engine

    def __enter__(self) -> None:
        _begin(self._engine)
        before = _allocator.use_here(self._threshold_bytes)
        _put_aside.set((*_put_aside.get(), before))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        *outer, before = _put_aside.get()
        _put_aside.set(tuple(outer))
        _allocator.use_again(before)


def install(engine: Registrar, threshold_bytes: SupportsIndex) -> None:
    """See `ksmcore.install_allocator`."""
    n_bytes = _checked(threshold_bytes)
    _begin(engine)
    _allocator.use_everywhere(n_bytes)


def uninstall() -> None:
    """See `ksmcore.uninstall_allocator`."""
    _allocator.use_nowhere()


def is_here(array: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> bool:
    """Did an array's memory come from the arena? For tests."""
    return bool(_allocator.owns(array.__array_interface__["data"][0]))
