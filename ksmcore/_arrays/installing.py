"""NumPy's arrays, made page-aligned and registered with the default engine, without a change of the
program.

NumPy calls `allocator`, compiled, for the memory of every array (NEP 49); that takes it from the
arena.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable
from contextvars import ContextVar
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Protocol, SupportsIndex

from ksmcore._arrays import allocator, arena, memory
from ksmcore._core.scopes import LockScope
from ksmcore._kernel.per_process import PerProcess
from ksmcore._kernel.procfs import available_bytes

if TYPE_CHECKING:
    from ksmcore._core.core import Core

__all__ = ["Allocator", "install", "uninstall"]

# Freed memory that was not needed for so long goes back to the kernel.
IDLE_SECONDS = 1.0
# Of the memory that the machine and the control group have left, freed memory is kept up to this
# part, if nobody says how much.
FREE_SHARE = 1 / 8

# The blocks that a context is in, the innermost last: whose each is, and what it has put aside. One
# for all allocators: each may be entered in several contexts at a time.
_blocks: ContextVar[tuple[tuple[Allocator, object], ...]] = ContextVar("ksmcore_blocks", default=())

_beginning = PerProcess(threading.Lock)
_begun = False


class Home(Protocol):
    """The engine that the arena registers its memory with. One that is disabled registers nothing;
    then memory is left to whoever has it without ksmcore."""

    _disabled: bool

    def _adopt(self, tidy: Callable[[bool, float], object]) -> Core: ...


def _checked(value: SupportsIndex, name: str = "threshold_bytes", least: int = 1) -> int:
    n_bytes = operator.index(value)
    if not least <= n_bytes <= 2**63 - 1:
        raise ValueError(f"{name} must be from {least} to 2**63 - 1, not {n_bytes}")
    return n_bytes


def _begin(engine: Home) -> bool:
    """Tie the arena to the default engine, once. Was it now?"""
    global _begun
    with LockScope(_beginning.get()):
        if _begun:
            return False
        allocator.begin(engine._adopt(_tidy), _numpy_wants_huge())
        _begun = True
        return True


def _tidy(idle_only: bool, young_seconds: float) -> None:
    """Before passes, before each batch of the scanner, and while it rests."""
    memory.look()
    arena.register_late()
    if idle_only:
        arena.tend(int(young_seconds * 1e9))
    else:
        arena.give_back()


def _set_limits(max_free_bytes: int | None) -> None:
    if max_free_bytes is None:
        max_free_bytes = int(available_bytes() * FREE_SHARE)
    arena.set_limits(max_free_bytes, int(IDLE_SECONDS * 1e9))


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

    def __init__(self, engine: Home, threshold_bytes: SupportsIndex) -> None:
        self._threshold_bytes = _checked(threshold_bytes)
        self._engine = engine

    def __enter__(self) -> None:
        if self._engine._disabled:
            return
        if _begin(self._engine):
            _set_limits(None)
        before = allocator.use_here(self._threshold_bytes)
        _blocks.set((*_blocks.get(), (self, before)))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        blocks = _blocks.get()
        place = max((i for i, (whose, _) in enumerate(blocks) if whose is self), default=None)
        if place is None:
            return  # disabled; or entered in another context, in which it stays
        (_, before), inner = blocks[place], blocks[place + 1 :]
        if inner:
            # Left before one that was entered later: that is to bring back what this one would.
            inner = ((inner[0][0], before), *inner[1:])
        else:
            allocator.use_again(before)
        _blocks.set((*blocks[:place], *inner))


def install(
    engine: Home,
    threshold_bytes: SupportsIndex,
    which: Literal["numpy", "all"],
    max_free_bytes: SupportsIndex | None,
) -> None:
    """See `ksmcore.install_allocator`."""
    n_bytes = _checked(threshold_bytes)
    if max_free_bytes is not None:
        max_free_bytes = _checked(max_free_bytes, "max_free_bytes", 0)
    if which not in ("numpy", "all"):
        raise ValueError(f"memory must be 'numpy' or 'all', not {which!r}")
    if engine._disabled:
        return
    reason = memory.missing() if which == "all" else None
    if reason is None:
        _begin(engine)
        if which == "all":
            reason = memory.use_everywhere(n_bytes)
    if reason is not None:
        raise ValueError(f"memory='all' is not to be had here: {reason}")
    _set_limits(max_free_bytes)
    allocator.use_everywhere(n_bytes)
    if which == "numpy":
        memory.use_nowhere()


def uninstall() -> None:
    """See `ksmcore.uninstall_allocator`."""
    memory.use_nowhere()
    allocator.use_nowhere()
