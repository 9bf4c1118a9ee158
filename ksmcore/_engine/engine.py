"""The engine that users have: control, registration, arrays and numbers over one core.

It is put together of parts (`Parts`), each of which knows the core, the settings in force, and the
one callable that it needs; the engine hands calls on to them. The parts belong to one process.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, SupportsIndex, overload

from ksmcore._arrays import making
from ksmcore._core.scopes import LockScope
from ksmcore._engine import all_engines, estimating
from ksmcore._engine.area import Area
from ksmcore._engine.changes import Changes, changed
from ksmcore._engine.closing import Closing
from ksmcore._engine.counters import Stats
from ksmcore._engine.history import History, Sample
from ksmcore._engine.parts import Parts, make_core, make_parts
from ksmcore._engine.passes import EVERYTHING
from ksmcore._engine.progress import Progress
from ksmcore._engine.region import Region
from ksmcore._engine.scanner import Scanning
from ksmcore._engine.settings import InForce, Settings
from ksmcore._engine.stats import Estimate, PassReport
from ksmcore._kernel import forks
from ksmcore._kernel.syscalls import page_bytes
from ksmcore._platform import is_disabled

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, DTypeLike, NDArray
    from typing_extensions import Buffer

    from ksmcore._arrays.making import Order
    from ksmcore._core.core import Core

__all__ = ["Engine"]


class Engine(Closing):
    """Finds equal pages in the buffers registered with it, and keeps each content once.

    Two engines share nothing: equal pages of different engines are not merged. Settings are keyword
    arguments, see `ksmcore.Settings`.
    """

    page_bytes: int = page_bytes()

    def __init__(self, **settings: Any) -> None:
        made = Settings.made(**settings)
        self._disabled = is_disabled()
        self._core = make_core(made, disabled=self._disabled)
        self._closed = False
        self._renewed: dict[int, Parts] = {}
        self._parts = make_parts(self._core, self, InForce(made))
        self._apply_settings()
        all_engines.add(self)
        self._run(made.run)

    # ---- its parts ----------------------------------------------------------------------------

    def _now(self) -> Parts:
        """The parts, made anew in a forked child, where nothing is registered and nothing scans:
        the parent's regions count as closed. No fork hook does that, see `PerProcess`."""
        parts = self._parts
        if parts.generation == forks.generation():
            return parts
        in_force = parts.in_force
        settings = in_force.settings.changed(run=0)
        fresh_in_force = InForce(settings, in_force.on_pass, in_force.tidiers)
        fresh = make_parts(self._core, self, fresh_in_force)
        # Of two threads that come here at a time, the first wins.
        self._parts = self._renewed.setdefault(forks.generation(), fresh)
        parts.registrar.end()
        return self._parts

    def _open(self) -> Parts:
        """The parts; ValueError when the engine is closed."""
        if self._closed:
            raise ValueError("this engine is closed")
        return self._now()

    def _open_core(self) -> Core:
        """For what shows its memory; ValueError when the engine is closed."""
        self._open()
        return self._core

    # ---- settings -----------------------------------------------------------------------------

    @property
    def settings(self) -> Settings:
        """The settings in force."""
        return self._now().in_force.settings

    def configure(self, **changes: Any) -> Settings:
        """Change settings; they hold from the next batch on. Returns all settings.

        Raises:
            TypeError, ValueError: an unknown name, a wrong value, or a setting that is fixed.
                Nothing was changed.
        """
        parts = self._open()
        settings = parts.in_force.settings.changed(**changes)
        if "run" in changes and settings.run != 1:
            parts.passes.alone.check_outside()
        parts.in_force.settings = settings
        self._apply_settings()
        if "run" in changes:
            self._run(settings.run)
        return parts.in_force.settings

    def _apply_settings(self) -> None:
        settings = self._parts.in_force.settings
        self._core.configure(
            settings.use_zero_pages,
            settings.smart_scan,
            -1 if settings.max_shared_pages is None else settings.max_shared_pages,
            -1 if settings.max_page_sharing == "auto" else settings.max_page_sharing,
        )
        self._parts.scanner.wake()

    # ---- control ------------------------------------------------------------------------------

    @property
    def on_pass(self) -> Callable[[PassReport], object] | None:
        """Called with the report of each full pass, `scan` and the background scanner's alike, by
        the thread that made it. What it raises ends the `scan`, or the scanner."""
        return self._now().in_force.on_pass

    @on_pass.setter
    def on_pass(self, callback: Callable[[PassReport], object] | None) -> None:
        self._now().in_force.on_pass = callback

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
        return self._now().scanner.is_running

    def _run(self, run: int) -> None:
        """Have the scanner do what the setting `run` says."""
        parts = self._parts
        if run == 1:
            parts.scanner.start()
            return
        parts.passes.alone.check_outside()  # the scanner may be waiting for this thread's pass
        try:
            parts.scanner.stop()
        finally:
            if run == 2:
                self.unmerge()

    # ---- registration -------------------------------------------------------------------------

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
        """Let the pages of a contiguous buffer, a tensor, or all that an object holds, be merged.

        Its whole pages are scanned; those that it shares with others are never touched. It is held
        until the region is closed. Of a model, a frame, a dict, or any other object, all memory is
        taken that is not registered yet; the area that is returned names the `unreached` rest.

        One call for many buffers (a list of them) looks at the process's mappings once. Where
        thousands come one by one, what costs much to find out (a lock, another's userfaultfd) is
        found out later: such memory is then never merged, and counted in `Stats.skipped`.

        `name`: what it is called in pictures and reports, beside the program's own variables.

        `privatize`: turn shared anonymous memory (the default of `mmap.mmap(-1, n)`) into private
        memory in place, with the same bytes; other processes no longer see what is written.

        Raises:
            TypeError: no buffer and none in it, or one that holds references to objects; a name
                that is no text.
            ValueError: not contiguous, no whole page inside, registered already, or memory that
                cannot be merged; the message says what to do.
            OSError: the kernel does not tell what memory that is (no /proc, no file descriptor).
        """
        return self._open().registrar.register(buffer, name=name, privatize=privatize)

    def unregister(self, buffer: object) -> None:
        """Make a region, an area, a buffer, or all that an object holds now, plain memory again.

        Raises:
            ValueError: it is not registered with this engine.
            MemoryError: not enough memory to unmerge; it is still registered, all bytes are right.
        """
        self._open().registrar.unregister(buffer)

    def hold(self, buffer: object) -> contextlib.AbstractContextManager[None]:
        """Keep the scanner away from registered memory, for system calls that write into it:

            with engine.hold(buffer):
                sock.recv_into(buffer)

        Entering waits until the scanner is out of these regions (a span of pages at most); nothing
        in them is merged until the block is left. Holds may be nested, and taken by several
        threads. What is held cannot be unregistered. Any part of a registered buffer will do.

        Raises:
            ValueError: nothing of the buffer is registered with this engine.
            TypeError: no buffer, and none in it.
        """
        return self._open().registrar.hold(buffer)

    @property
    def regions(self) -> tuple[Region, ...]:
        """The open regions by registration; arrays made by the engine aside."""
        return self._now().registrar.regions

    def area(self) -> Area:
        """A group of regions that is removed together, for code that is to register memory and
        nothing else."""
        self._open()
        return Area(self)

    # ---- passes -------------------------------------------------------------------------------

    def scan(self, *, progress: Progress = None) -> PassReport:
        """One full pass over everything registered, by the rules of KSM; the GIL is released.

        A page is merged when it is equal to a shared page, or when it did not change since the last
        pass and equals another such page: so nothing new is merged before the second pass. See
        `dedup` for merging at once.

        `progress`: True for a bar, or a callback (pages done, pages in all). Ctrl-C ends the pass
        between two batches; memory is right at any moment.

        Raises:
            OSError: nothing can be merged now: there is no file descriptor or memory for it, the
                kernel does not tell what is mapped (no /proc), or a guard that was asked for by
                name is not to be had any more. What was merged before stays.
            MemoryError: the same, for want of memory.
        """
        return self._open().passes.scan(progress)

    def dedup(self, *buffers: object, progress: Progress = None) -> PassReport:
        """Register what is not yet registered, and merge equal pages of these buffers now.

        Without arguments: of everything registered. Pages are compared with each other and with all
        shared ones; nothing waits for a second pass. What it registers stays registered.

        Raises as `register`, before anything is registered; and as `scan`: later passes merge then.
        """
        parts = self._open()
        parts.passes.tidy(idle_only=bool(buffers))
        pages, left_out = parts.registrar.register_all(buffers) if buffers else (EVERYTHING, {})
        return parts.passes.merge(pages, progress, left_out)

    def unmerge(self) -> None:
        """Make everything plain private memory again, and leave it registered: later passes merge
        it anew. Atomic for threads that write meanwhile.

        Raises:
            MemoryError: not enough memory for all; nothing was changed, all bytes are right. (Where
                less was to be had than the machine had said, what is still merged stays so.)
            RuntimeError: some of it is held.
        """
        parts = self._open()
        parts.passes.tidy(idle_only=False)
        with LockScope(parts.passes.alone):
            parts.registrar.restore_all(keep=True)

    # ---- arrays -------------------------------------------------------------------------------

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
        return making.empty(self._open().registrar, shape, dtype, order)

    def zeros(
        self,
        shape: SupportsIndex | Sequence[SupportsIndex],
        dtype: DTypeLike = float,
        order: Order = "C",
    ) -> NDArray[Any]:
        """A page-aligned, registered array of zeros; takes no memory until it is written."""
        return making.empty(self._open().registrar, shape, dtype, order)

    def full(
        self,
        shape: SupportsIndex | Sequence[SupportsIndex],
        fill_value: Any,
        dtype: DTypeLike | None = None,
        order: Order = "C",
    ) -> NDArray[Any]:
        """A page-aligned, registered array filled with a value, as `numpy.full`."""
        return making.full(self._open().registrar, shape, fill_value, dtype, order)

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
        return making.rows(self._open().registrar, n, row_shape, dtype)

    def array(self, source: ArrayLike, dtype: DTypeLike | None = None) -> NDArray[Any]:
        """A page-aligned, registered copy of anything array-like; its axes keep their order in
        memory (as `numpy.copy` with order "K" has it)."""
        return making.array(self._open().registrar, source, dtype)

    def copy(self, source: NDArray[Any]) -> NDArray[Any]:
        """A registered copy of an array that shares its pages with the source, copy-on-write.

        Pages of the source that are shared already are mapped once more: no byte is copied, so it
        takes a small part of the time of `numpy.copy`, and no memory. Others are copied, and then
        merged with their copies, so the next copy shares them from the start. Writes to either side
        stay there. Shape, dtype and strides are kept.

        For that the source has to lie in memory that is registered with this engine. Others, arrays
        of fewer than 16 pages, and views whose elements leave large gaps or lie over each other are
        copied as by `array`: page-aligned, their axes in the same order.

        Raises:
            TypeError: no array; or one that holds references to objects.
            ValueError: the engine is closed.
            MemoryError: no memory.
        """
        parts = self._open()
        return making.copy(parts.registrar, parts.passes.copy, source)

    def changed(self, copy: NDArray[Any], *, since: NDArray[Any]) -> Changes:
        """Which pages and which rows of a copy differ from its source.

        Pages for which both still show the same shared page, as after `copy`, are equal and not
        read: it costs about what was written to either side. Arrays that share nothing are compared
        byte by byte. Equal means equal bytes: 0.0 and -0.0 differ, equal NaNs do not.

        Raises:
            TypeError: no arrays, or such as hold references to objects.
            ValueError: arrays of different shapes or dtypes, or not C-contiguous; or the engine is
                closed.
        """
        return changed(self._open().registrar, copy, since)

    def _adopt(self, tidy: Callable[[bool, float], object]) -> Core:
        """For the arena: what its memory is to be registered with; it is tidied before passes."""
        self._open().in_force.tidiers.append(tidy)
        return self._core

    # ---- numbers ------------------------------------------------------------------------------

    def estimate(self, *buffers: object, progress: Progress = None) -> Estimate:
        """What merging these buffers would save at most; without arguments, everything registered.

        Registers, maps and faults in nothing. Only present pages are counted: those that were
        merged, and not read since, are not. The map budget may leave isolated pages out.

        Raises as `register` does for buffers that could not be merged.
        """
        parts = self._open()
        with contextlib.ExitStack() as held:
            ranges, unreached = parts.registrar.hold_ranges(buffers, held)
            checksum = parts.in_force.settings.checksum
            return estimating.tally(ranges, self.page_bytes, checksum, progress, unreached)

    def stats(self) -> Stats:
        """All counters of this moment."""
        parts = self._now()
        numbers = parts.passes.numbers()
        with_pagemap = numbers.pop("with_pagemap")
        with_tracker = numbers.pop("with_tracker")
        return Stats(
            page_bytes=self.page_bytes,
            run=parts.in_force.settings.run,
            passes_put_off=parts.scanner.n_put_off,
            scanner_seconds=parts.scanner.cpu_seconds,
            scanner_error=None if parts.scanner.error is None else repr(parts.scanner.error),
            guard=self._core.guard_in_use,
            dirty="pagemap" if with_tracker else "checksum",
            presence="pagemap" if with_pagemap else "mincore",
            **numbers,
        )

    @property
    def history(self) -> History:
        """What each `scan`, `dedup` and pass of the scanner left behind; thinned out when there are
        thousands. A forked child begins a new one."""
        return self._now().passes.history

    @property
    def peak_bytes_saved(self) -> int:
        """Most that was saved whenever it was looked at: by `stats`, and after each `scan`, `dedup`
        and batch of the scanner."""
        return self._now().passes.peak_bytes_saved

    def _sample(self) -> Sample:
        """The numbers of this moment, as the history keeps them."""
        return self._now().passes.sample()

    # ---- life ---------------------------------------------------------------------------------

    def close(self) -> None:
        """Make everything registered plain private memory again and end the engine.

        Arrays made by the engine stay valid. A second call does nothing.

        Raises:
            MemoryError: not enough memory to unmerge all; the engine stays open, all bytes right.
        """
        if self._closed:
            return
        parts = self._now()
        parts.passes.alone.check_outside()
        parts.scanner.give_up()
        with LockScope(parts.passes.alone):
            parts.registrar.restore_all()
            parts.registrar.end()
            self._core.stop_watching()
            self._core.let_calls_go()
            self._closed = parts.passes.ended = True
        # Another thread may have started it meanwhile.
        parts.scanner.give_up()
        all_engines.discard(self)

    @property
    def closed(self) -> bool:
        return self._closed

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        # When the interpreter ends, what could not be closed at exit ends with the process. The
        # names of this module may be gone then.
        if getattr(self, "_closed", True) or is_finalizing():
            return
        registrar = self._parts.registrar
        if registrar.regions and registrar.is_current():
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

        return notebook.of_engine(self)

    def __repr__(self) -> str:
        if self._closed:
            return "<ksmcore.Engine: closed>"
        return f"<ksmcore.Engine: {self._core.snapshot()['regions']} regions>"
