"""The handle of one registered buffer.

Called by users and by the engine, which makes it. It owns the buffer export (through the gate's
`Admission`) until the region is closed.
"""

from __future__ import annotations

import enum
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import numpy as np

from ksmcore._engine.closing import Closing
from ksmcore._engine.stats import RegionStats
from ksmcore.sizes import human_bytes

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ksmcore._engine.registrar import Registrar
    from ksmcore._gate.buffers import Admission

__all__ = ["PageState", "Region", "disjoint"]


def disjoint(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same addresses, each once: (address, end) ranges sorted, with overlaps cut off."""
    found: list[tuple[int, int]] = []
    covered = 0
    for start, end in sorted(ranges):
        start = max(start, covered)
        if end > start:
            found.append((start, end))
            covered = end
    return found


class PageState(enum.IntEnum):
    """What a page of a region is (see `Region.page_map`)."""

    NOT_PRESENT = 0
    """Never touched, given up, or swapped out."""
    VOLATILE = 1
    """Changed since the last pass, or not seen often enough to tell."""
    UNIQUE = 2
    """Did not change, and equals no other."""
    SHARED = 3
    """Maps a shared page."""
    ZERO = 4
    """Was all zero and given back."""
    BROKEN = 5
    """Was shared or zero, and has been written since; the next pass will notice."""


class Region(Closing):
    """The whole pages inside one registered buffer. Made by `register`; ended by `close` or `with`.

    While it is open the buffer cannot be freed, resized or closed.
    """

    __slots__ = (
        "__weakref__",
        "_addr",
        "_admission",
        "_engine",
        "_generation",
        "_id",
        "_n_pages",
        "_phase",
    )

    def __init__(self, engine: Registrar, region_id: int, admission: Admission) -> None:
        self._engine = engine
        self._id = region_id
        self._admission: Admission | None = admission
        self._generation = engine._generation
        self._addr, self._n_pages, self._phase = admission.addr, admission.n_pages, admission.phase

    @property
    def addr(self) -> int:
        """Address of the first page."""
        return self._addr

    @property
    def n_pages(self) -> int:
        """Whole pages inside the buffer."""
        return self._n_pages

    @property
    def nbytes(self) -> int:
        """Bytes of the whole pages; the buffer's bytes before and after them are never touched."""
        return self._n_pages * self._engine.page_bytes

    @property
    def closed(self) -> bool:
        """True once it was unregistered; also in a forked child, whose engine starts empty."""
        return self._admission is None or self._generation != self._engine._generation_now()

    def _view(self) -> memoryview:
        """The registered buffer's bytes, head and tail included; ValueError once it is closed."""
        admission = self._admission
        if self.closed or admission is None:
            raise ValueError(f"{self!r} is closed")
        return admission.view[:]

    def hold(self) -> AbstractContextManager[None]:
        """Keep the scanner away from this region until the block is left; see `Engine.hold`."""
        return self._engine.hold(self)

    def stats(self) -> RegionStats:
        """What its pages are; nothing once it is closed."""
        if self.closed:
            return RegionStats()
        return RegionStats(**self._engine._core.tally(self._id, self._addr))

    def page_map(self) -> NDArray[np.uint8]:
        """What each of its pages is now: a `PageState` for each, in their order. Writes to shared
        and zero pages show at once, those to other pages with the next pass. Faults nothing in.

        Raises:
            ValueError: the region is closed.
        """
        states = np.zeros(self._n_pages, np.uint8)
        if self.closed or not self._engine._core.page_map(self._id, self._addr, states):
            raise ValueError(f"{self!r} is not registered")
        return states

    def close(self) -> None:
        """Make the pages plain private memory again, with the same bytes, and let the buffer go.

        A second call does nothing.

        Raises:
            MemoryError: not enough memory, or mappings, to give each page its own memory again. The
                region is still registered and all its bytes are right.
            RuntimeError: it is held (see `hold`).
        """
        self._engine._close_region(self)

    def _repr_html_(self) -> str:
        from ksmcore._show import notebook

        return notebook.shown(self)

    def __repr__(self) -> str:
        state = "closed" if self.closed else human_bytes(self.nbytes)
        return f"<ksmcore.Region: {self._n_pages} pages at {self._addr:#x}, {state}>"
