"""The engine: settings, control and numbers over what is registered with it.

Called by users, directly or through the module-level functions, which use a default engine. The
work is done by `ksmcore._core.core.Core`; this, with `registrar`, `passes` and `scanner`, is its
thin face.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import warnings
import weakref
from types import MappingProxyType
from typing import Any

from ksmcore._core.core import Core
from ksmcore._engine import estimating
from ksmcore._engine.area import Area
from ksmcore._engine.closing import Closing
from ksmcore._engine.features import check_tracker, choose_guard
from ksmcore._engine.passes import PassMaker
from ksmcore._engine.progress import Progress
from ksmcore._engine.scanner import Scanner
from ksmcore._engine.settings import Settings
from ksmcore._engine.stats import Estimate, MemoryInfo, Stats, frozen_counts, memory_info

__all__ = ["Engine"]

log = logging.getLogger("ksmcore")

_engines: weakref.WeakSet[Engine] = weakref.WeakSet()


class Scanning(contextlib.AbstractContextManager["Engine"]):
    """The background scanner, running: `with engine.start(): ...` stops it at the end."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def __enter__(self) -> Engine:
        return self._engine

    def __exit__(self, *_: object) -> None:
        self._engine.stop()


class Engine(PassMaker, Closing):
    """Finds equal pages in the buffers registered with it, and keeps each content once.

    Two engines share nothing: equal pages of different engines are not merged. Settings are keyword
    arguments, see `ksmcore.Settings`.
    """

    def __init__(self, **settings: Any) -> None:
        made = Settings.made(**settings)
        if made.dirty == "pagemap":
            check_tracker()
        core = Core(
            order=made.order,
            checksum=made.checksum,
            guard=choose_guard(made.guard),
            any_guard=made.guard == "auto",
            with_pagemap=True,
            with_tracker=made.dirty != "checksum",
            n_buckets=made.rmap_hash_size,
        )
        super().__init__(core, made)
        self._apply_settings()
        _engines.add(self)
        self._run(made.run)

    def _renew(self) -> None:
        super()._renew()
        self._scanner = Scanner(self)
        if self._is_inherited():
            self._settings = self._settings.changed(run=0)

    # ---- settings -----------------------------------------------------------------------------

    @property
    def settings(self) -> Settings:
        """The settings in force."""
        self._own()
        return self._settings

    def configure(self, **changes: Any) -> Settings:
        """Change settings; they hold from the next batch on. Returns all settings.

        Raises:
            TypeError, ValueError: an unknown name, a wrong value, or a setting that is fixed.
                Nothing was changed.
        """
        self._check_open()
        settings = self._settings.changed(**changes)
        if "run" in changes and settings.run != 1:
            self._check_outside()
        self._settings = settings
        self._apply_settings()
        if "run" in changes:
            self._run(settings.run)
        return self._settings

    def _apply_settings(self) -> None:
        settings = self._settings
        self._core.configure(
            settings.use_zero_pages,
            settings.smart_scan,
            -1 if settings.max_shared_pages is None else settings.max_shared_pages,
            -1 if settings.max_page_sharing == "auto" else settings.max_page_sharing,
        )
        self._scanner.wake()

    # ---- control ------------------------------------------------------------------------------

    def start(self, **changes: Any) -> Scanning:
        """Start the background scanner, after changing settings as `configure` does.

        What is returned stops it again when it is left as a context manager. Nothing happens when
        it runs already.
        """
        self.configure(**changes, run=1)
        return Scanning(self)

    def stop(self) -> None:
        """Stop the background scanner, once its present batch has ended; what is merged stays.

        Raises what the scanner ended by, if it did not end by this.
        """
        self.configure(run=0)

    @property
    def scanning(self) -> bool:
        """Is the background scanner running?"""
        self._own()
        return self._scanner.is_running

    def area(self) -> Area:
        """A group of regions that is removed together, for code that is to register memory and
        nothing else."""
        self._check_open()
        return Area(self)

    def _run(self, run: int) -> None:
        """Have the scanner do what the setting `run` says."""
        if run == 1:
            self._scanner.start()
            return
        self._check_outside()  # the scanner may be waiting for this thread's pass to end
        try:
            self._scanner.stop()
        finally:
            if run == 2:
                self.unmerge()

    def _registered(self) -> None:
        self._scanner.wake(only_if_resting=True)

    # ---- numbers ------------------------------------------------------------------------------

    def estimate(self, *buffers: object, progress: Progress = None) -> Estimate:
        """What merging these buffers would save at most; without arguments, everything registered.

        Registers, maps, protects and faults in nothing. Only present pages are counted: those that
        were merged, and not read since, are not. Not considered: the map budget, which may leave
        isolated pages out.

        Raises as `register` does for buffers that could not be merged.
        """
        self._check_open()
        with contextlib.ExitStack() as held:
            ranges = self._held_ranges(buffers, held)
            return estimating.tally(ranges, self.page_bytes, self._settings.checksum, progress)

    def stats(self) -> Stats:
        """All counters of this moment."""
        numbers = self._core.snapshot()
        with_pagemap = numbers.pop("with_pagemap")
        with_tracker = numbers.pop("with_tracker")
        return Stats(
            page_bytes=self.page_bytes,
            skipped=frozen_counts(numbers.pop("skipped")),
            seconds=MappingProxyType(numbers.pop("seconds")),
            run=self._settings.run,
            scanner_error=None if self._scanner.error is None else repr(self._scanner.error),
            guard=self._core.guard_in_use,
            dirty="pagemap" if with_tracker else "checksum",
            presence="pagemap" if with_pagemap else "mincore",
            **numbers,
        )

    # ---- life ---------------------------------------------------------------------------------

    def close(self) -> None:
        """Make everything registered plain private memory again and end the engine.

        Arrays made by the engine stay valid. A second call does nothing.

        Raises:
            MemoryError: not enough memory to unmerge all; the engine stays open, all bytes right.
        """
        if self._closed:
            return
        self._own()
        self._check_outside()
        try:
            self._scanner.stop()
        except Exception:
            log.exception("the scanner of %r had ended by an error", self)
        with self._alone():
            for region in list(self._regions.values()):
                region.close()
            for region_id, addr, _ in self._core.regions():
                self._restore(region_id, addr)
            self._core.stop_watching()
            self._closed = True
        _engines.discard(self)

    @property
    def closed(self) -> bool:
        return self._closed

    def __del__(self) -> None:
        if not getattr(self, "_closed", True) and self._regions and not self._is_inherited():
            try:
                # Where warnings are errors this raises, which must not keep the memory merged.
                warnings.warn(
                    f"{self!r} was never closed", ResourceWarning, stacklevel=1, source=self
                )
            finally:
                with contextlib.suppress(MemoryError):
                    self.close()

    def _repr_html_(self) -> str:
        from ksmcore._show import notebook

        return notebook.shown_engine(self)

    def __repr__(self) -> str:
        if self._closed:
            return "<ksmcore.Engine: closed>"
        return f"<ksmcore.Engine: {self._core.snapshot()['regions']} regions>"


def process_memory_info() -> MemoryInfo:
    """`memory_info` for all engines of this process."""
    fds = [engine._core.store_fd for engine in list(_engines)]
    return memory_info(fd for fd in fds if fd >= 0)


@atexit.register
def _close_engines() -> None:
    """Let memory that outlives the interpreter be plain again."""
    for engine in list(_engines):
        try:
            engine.close()
        except Exception as error:
            log.warning("at exit: %r stays merged: %s", engine, error)
