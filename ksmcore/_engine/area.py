"""Areas: groups of regions that are removed together, for code that should not stop or tune an
engine: what an area is made of can register, and nothing else."""

from __future__ import annotations

import contextlib
import logging
import threading
from typing import TYPE_CHECKING, Protocol

from ksmcore._engine.closing import Closing
from ksmcore._engine.stats import RegionStats

if TYPE_CHECKING:
    from ksmcore._engine.region import Region

__all__ = ["Area"]

log = logging.getLogger("ksmcore")


class Registers(Protocol):
    def register(self, buffer: object, *, privatize: bool = False) -> Region: ...


class Area(Closing):
    """A group of regions of one engine. Made by `Engine.area`; ended by `close`, `with`, or when it
    is collected: then its regions are plain private memory again. Any thread may use it."""

    def __init__(self, engine: Registers) -> None:
        self._engine = engine
        # Not weak references: those of a cycle are cleared before its finalisers run.
        self._regions: set[Region] = set()
        self._most_kept = 16  # closed ones are dropped once there are so many
        self._lock = threading.RLock()  # a finaliser may run while its own thread holds it
        self._closed = False

    def register(self, buffer: object, *, privatize: bool = False) -> Region:
        """As `Engine.register`; the region ends with the area at the latest.

        Raises as that does, and ValueError when the area is closed.
        """
        self._check_open()
        region = self._engine.register(buffer, privatize=privatize)
        with self._lock:
            if not self._closed:
                self._regions.add(region)
                if len(self._regions) > self._most_kept:
                    self._regions = {one for one in self._regions if not one.closed}
                    self._most_kept = 2 * len(self._regions) + 16
                return region
        region.close()
        raise ValueError("this area was closed meanwhile")

    @property
    def regions(self) -> tuple[Region, ...]:
        """Its open regions, by address."""
        with self._lock:
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
        with self._lock:
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
        if getattr(self, "_closed", True):
            return
        with contextlib.suppress(ValueError):
            try:
                self.close()
            except (MemoryError, RuntimeError, OSError) as error:
                log.warning("%r was collected, and some of it stays merged: %s", self, error)

    def __repr__(self) -> str:
        return f"<ksmcore.Area: {'closed' if self._closed else f'{len(self.regions)} regions'}>"
