"""The handle of one registered buffer. It owns the buffer's export until it is closed."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ksmcore._engine.closing import Closing
from ksmcore._engine.stats import RegionStats
from ksmcore.sizes import human_bytes

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ksmcore._core.core import Core
    from ksmcore._gate.buffers import Export

__all__ = ["Holder", "Region", "Site", "checked_name"]

Site = tuple[str, int]
"""Where in a program: a file and a line."""


def checked_name(name: str | None) -> str | None:
    """TypeError where it is no text, nor none."""
    if name is not None and not isinstance(name, str):
        raise TypeError(f"name must be text, not {type(name).__name__}")
    return name


class Holder(Protocol):
    """Who has registered a region, and takes it back."""

    def is_current(self) -> bool:
        """False in a forked child, where nothing of its parent is registered."""

    def hold(self, buffer: object) -> AbstractContextManager[None]:
        """Keep the scanner away from it."""

    def close_region(self, region: Region) -> None:
        """Make it plain memory, take it out, and let its buffer go."""


class Region(Closing):
    """The whole pages inside one registered buffer. Made by `register`; ended by `close` or `with`.

    While it is open the buffer cannot be freed, resized or closed.
    """

    __slots__ = (
        "__weakref__",
        "_addr",
        "_core",
        "_engine",
        "_export",
        "_holder",
        "_id",
        "_n_pages",
        "_name",
        "_nbytes",
        "_registered_at",
    )

    def __init__(
        self,
        region_id: int,
        export: Export,
        *,
        core: Core,
        holder: Holder,
        engine: object,
        name: str | None = None,
        registered_at: Site,
    ) -> None:
        self._id = region_id
        self._export: Export | None = export
        self._addr, self._n_pages, self._nbytes = export.addr, export.n_pages, export.n_bytes
        self._core = core
        self._holder = holder
        self._engine = engine  # kept alive, also for who has forgotten all but the region
        self.name = name
        self._registered_at = registered_at

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
        return self._nbytes

    @property
    def name(self) -> str | None:
        """What it is called in pictures and reports, beside what the program calls it."""
        return self._name

    @name.setter
    def name(self, name: str | None) -> None:
        self._name = checked_name(name)

    @property
    def registered_at(self) -> str:
        """The line of the program that registered it, as "file:line"."""
        return "{}:{}".format(*self._registered_at)

    @property
    def closed(self) -> bool:
        """True once it was unregistered; also in a forked child, whose engine starts empty."""
        return self._export is None or not self._holder.is_current()

    def _view(self) -> memoryview:
        """The registered buffer's bytes, head and tail included; ValueError once it is closed."""
        export = self._export
        if self.closed or export is None:
            raise ValueError(f"{self!r} is closed")
        return export.view[:]

    def hold(self) -> AbstractContextManager[None]:
        """Keep the scanner away from this region until the block is left; see `Engine.hold`."""
        return self._holder.hold(self)

    def stats(self) -> RegionStats:
        """What its pages are; nothing once it is closed."""
        if self.closed:
            return RegionStats()
        return RegionStats(**self._core.tally(self._id, self._addr))

    def page_map(self) -> NDArray[np.uint8]:
        """What each of its pages is now: a `PageState` for each, in their order. Writes to shared
        and zero pages show at once, those to other pages with the next pass. Faults nothing in.

        Raises:
            ValueError: the region is closed.
        """
        states = np.zeros(self._n_pages, np.uint8)
        if self.closed or not self._core.page_map(self._id, self._addr, states):
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
        self._holder.close_region(self)

    def _repr_html_(self) -> str:
        from ksmcore._show import notebook

        return notebook.of_region(self)

    def __repr__(self) -> str:
        state = "closed" if self.closed else human_bytes(self.nbytes)
        name = "" if self.name is None else f"{self.name!r}, "
        return f"<ksmcore.Region: {name}{self._n_pages} pages at {self._addr:#x}, {state}>"
