"""Areas: groups of regions that are removed together, for code that should not stop or tune an
engine: what an area is made of can register, and nothing else."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Protocol, overload

from ksmcore._core.scopes import LockScope
from ksmcore._engine.closing import Closing
from ksmcore._engine.stats import RegionStats
from ksmcore._kernel.per_process import PerProcess

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from ksmcore._engine.region import Region

__all__ = ["Area", "Registers"]

log = logging.getLogger("ksmcore")


class Registers(Protocol):
    @overload
    def register(
        self, buffer: Buffer, *, name: str | None = None, privatize: bool = False
    ) -> Region: ...
    @overload
    def register(
        self, buffer: object, *, name: str | None = None, privatize: bool = False
    ) -> Region | Area: ...


class Area(Closing):
    """A group of regions of one engine. Made by `Engine.area`, and by `register` for an object that
    holds memory in many places; ended by `close` or `with`: then its regions are plain private
    memory again. One made by `Engine.area` ends when it is collected, too. Any thread may use it.
    """

    def __init__(
        self,
        engine: Registers,
        regions: Iterable[Region] | None = None,
        unreached: Mapping[str, int] | None = None,
    ) -> None:
        self._engine = engine
        # Not weak references: those of a cycle are cleared before its finalisers run.
        self._regions: set[Region] = set(regions or ())
        self._unreached: Counter[str] = Counter(unreached)
        # What `register` made stays registered, as every region does that is not closed.
        self._ends_when_collected = regions is None
        self._most_kept = 16  # closed ones are dropped once there are so many
        # A finaliser may run while its own thread holds it, a child be forked while another does.
        self._lock = PerProcess(threading.RLock)
        self._closed = False

    @overload
    def register(
        self, buffer: Buffer, *, name: str | None = None, privatize: bool = False
    ) -> Region: ...
    @overload
    def register(
        self, buffer: object, *, name: str | None = None, privatize: bool = False
    ) -> Region | Area: ...
    def register(
        self, buffer: object, *, name: str | None = None, privatize: bool = False
    ) -> Region | Area:
        """As `Engine.register`; the region, or all of the object, ends with the area at the latest.

        Raises as that does, and ValueError when the area is closed.
        """
        self._check_open()
        made = self._engine.register(buffer, name=name, privatize=privatize)
        with LockScope(self._lock.get()):
            if not self._closed:
                self._regions.update(made.regions if isinstance(made, Area) else [made])
                if isinstance(made, Area):
                    self._unreached += made._unreached
                if len(self._regions) > self._most_kept:
                    self._regions = {one for one in self._regions if not one.closed}
                    self._most_kept = 2 * len(self._regions) + 16
                return made
        made.close()
        raise ValueError("this area was closed meanwhile")

    @property
    def unreached(self) -> dict[str, int]:
        """What there was no way to in the objects registered with it: how many, by class and
        reason."""
        return dict(self._unreached)

    @property
    def regions(self) -> tuple[Region, ...]:
        """Its open regions, by address."""
        with LockScope(self._lock.get()):
            return tuple(sorted((r for r in self._regions if not r.closed), key=lambda r: r.addr))

    def stats(self) -> RegionStats:
        """What all its regions' pages are."""
        return RegionStats.sum(region.stats() for region in self.regions)

    @property
    def closed(self) -> bool:
        return self._closed

    def close(self) -> None:
        """Make all its regions plain private memory again, and nothing else. A second call does
        nothing.

        Raises:
            MemoryError, RuntimeError: the first error of `Region.close`. The other regions were
                closed; the area stays open with those that could not be.
        """
        failed: Exception | None = None
        with LockScope(self._lock.get()):
            self._closed = True
            for region in list(self._regions):
                try:
                    region.close()
                    self._regions.discard(region)
                except (MemoryError, RuntimeError, OSError) as error:
                    failed = failed or error
            self._closed = failed is None
        if failed is not None:
            raise failed

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("this area is closed")

    def __del__(self) -> None:
        if getattr(self, "_closed", True) or not self._ends_when_collected:
            return
        with contextlib.suppress(ValueError):
            try:
                self.close()
            except (MemoryError, RuntimeError, OSError) as error:
                log.warning("%r was collected, and some of it stays merged: %s", self, error)

    def _repr_html_(self) -> str:
        from ksmcore._show import notebook

        return notebook.of_area(self)

    def __repr__(self) -> str:
        return f"<ksmcore.Area: {'closed' if self._closed else f'{len(self.regions)} regions'}>"
