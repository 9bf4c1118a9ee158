"""What each process has one of: a forked child makes its own when it first asks.

No fork hook is needed for that, and no lock. A hook of Python's is re-entered by signal handlers
and finalisers that fork, and cut off by exceptions; a lock in it is then never given back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from ksmcore._kernel import forks

__all__ = ["PerProcess"]

T = TypeVar("T")


class PerProcess(Generic[T]):
    """Makes one T for this process, and another for each forked child that asks."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._made: dict[int, T] = {}

    def get(self) -> T:
        """The same one for all threads: of two that make one at a time, the first wins."""
        generation = forks.generation()
        made = self._made.get(generation)
        if made is None:
            made = self._made.setdefault(generation, self._make())
        return made
