"""The engine: owns regions, trees, store and settings, and walks over the pages.

Called by users, directly or through the module-level functions, which use a default engine. The
work is done by `ksmcore._core.Core`; this is its thin face: gate, buffer exports, reports.

Two locks, always taken in this order: the pass lock (one pass at a time) and the registration lock
(one registration at a time in the process, so that two engines cannot take the same buffer).
Neither is held by finalisers. A forked child makes both anew: threads that held them do not exist
there.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import threading
import time
import warnings
import weakref
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ksmcore import _sys, estimates, gate, vmas
from ksmcore._core import Core
from ksmcore._memory import PageMemory
from ksmcore.arrays import ArrayMaker
from ksmcore.phase import warn_of_phase
from ksmcore.progress import Progress, reporting
from ksmcore.regions import Region, disjoint
from ksmcore.settings import Settings, check_names
from ksmcore.stats import Estimate, MemoryInfo, PassReport, Stats, frozen_counts, memory_info

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Engine"]

log = logging.getLogger("ksmcore")

# Pages between two looks at signals: 16 MiB of 4 KiB pages, tens of milliseconds when all merge.
BATCH_PAGES = 4096
# How often dedup goes over pages that the map budget left out, giving short runs more each time.
BUDGET_ROUNDS = 6
END_OF_MEMORY = 2**64 - 1

_engines: weakref.WeakSet[Engine] = weakref.WeakSet()
_registering = threading.RLock()


def _renew_lock() -> None:
    """In a forked child: a thread that was registering is not there to release the lock."""
    global _registering
    _registering = threading.RLock()


os.register_at_fork(after_in_child=_renew_lock)


class Engine(ArrayMaker):
    """Finds equal pages in the buffers registered with it, and keeps each content once.

    Two engines share nothing: equal pages of different engines are not merged. Settings are keyword
    arguments, see `ksmcore.Settings`.
    """

    page_bytes: int = _sys.page_bytes()

    def __init__(self, **settings: Any) -> None:
        check_names(settings)
        self._settings = Settings(**settings)
        self._generation = _sys.generation()
        self._regions: dict[int, Region] = {}
        self._memories: weakref.WeakSet[PageMemory] = weakref.WeakSet()
        self._pass_lock = threading.Lock()
        self._pass_owner = 0
        self._closed = False
        self._core = Core(
            order=self._settings.order,
            checksum=self._settings.checksum,
            with_pagemap=True,
            n_buckets=self._settings.rmap_hash_size,
        )
        self._apply_settings()
        _engines.add(self)

    # ---- settings -----------------------------------------------------------------------------

    @property
    def settings(self) -> Settings:
        """The settings in force."""
        return self._settings

    def configure(self, **changes: Any) -> Settings:
        """Change settings; they hold from the next batch on. Returns all settings.

        Raises:
            TypeError, ValueError: an unknown name, a wrong value, or a setting that is fixed.
                Nothing was changed.
        """
        self._check_open()
        self._settings = self._settings.changed(**changes)
        self._apply_settings()
        return self._settings

    def _apply_settings(self) -> None:
        limit = self._settings.max_shared_pages
        self._core.configure(self._settings.use_zero_pages, -1 if limit is None else limit)

    # ---- registration -------------------------------------------------------------------------

    def register(self, buffer: object, *, privatize: bool = False) -> Region:
        """Let the pages of a writable, contiguous buffer be merged.

        The whole pages inside the buffer are scanned; a first and last page that it shares with
        other memory are never touched. The buffer is held until the region is closed.

        `privatize`: turn shared anonymous memory (the default of `mmap.mmap(-1, n)`) into private
        memory in place, with the same bytes; other processes then no longer see what is written.

        Raises:
            TypeError: not a buffer, or one that holds references to objects.
            ValueError: read-only, not contiguous, no whole page inside, registered already (in part
                or whole), or memory that cannot be merged; the message says why and what to do.
        """
        self._check_open()
        with _registering:
            with gate.hold(buffer, page_bytes=self.page_bytes) as (addr, n_pages):
                if self._find(addr, n_pages) is not None:
                    raise ValueError(
                        f"this buffer ({n_pages} pages at {addr:#x}) is already registered"
                    )
            admission = gate.admit(buffer, page_bytes=self.page_bytes, privatize=privatize)
            self._warn_of_phase([admission])
            return self._add(admission)

    def _add(self, admission: gate.Admission) -> Region:
        """Register what the gate has let in; on any error the buffer is let go."""
        flags = (
            admission.dontfork
            | admission.dontdump << 1
            | admission.hugepage << 2
            | admission.nohugepage << 3
        )
        region_id = 0
        try:
            if admission.must_privatize:
                self._core.privatize(admission.addr, admission.n_pages, flags)
            region_id = self._core.add(admission.addr, admission.n_pages, flags)
            region = Region(self, region_id, admission)
            self._regions[region_id] = region
        except BaseException:
            # Nothing was merged yet: the region is taken out before the buffer may go.
            self._core.remove(region_id, admission.addr, False)
            self._regions.pop(region_id, None)
            admission.release()
            raise
        return region

    def _find(self, addr: int, n_pages: int) -> tuple[int, int, int] | None:
        """The region of this engine that holds these pages; ValueError when only some of them are
        registered, or any with another engine."""
        len_bytes = n_pages * self.page_bytes
        for other in list(_engines):
            if other is self or other._closed:
                continue
            try:
                taken = other._core.find(addr, len_bytes) is not None
            except ValueError:
                taken = True
            if taken:
                raise ValueError(
                    f"this buffer ({n_pages} pages at {addr:#x}) is registered, at least in part, "
                    "with another engine; unregister it there first"
                )
        return self._core.find(addr, len_bytes)

    def _warn_of_phase(self, admissions: list[gate.Admission]) -> None:
        """Before they are registered; where warnings are errors, all of them are let go."""
        held = [region._admission for region in list(self._regions.values())]
        try:
            warn_of_phase(admissions, [admission for admission in held if admission is not None])
        except BaseException:
            for admission in admissions:
                admission.release()
            raise

    def unregister(self, buffer: Region | object) -> None:
        """Make the pages of a region, or of a registered buffer, plain private memory again.

        Raises:
            ValueError: it is not registered with this engine.
            MemoryError: not enough memory to unmerge; it is still registered, all bytes are right.
        """
        self._check_open()
        if isinstance(buffer, Region):
            if buffer._engine is not self:
                raise ValueError("this region belongs to another engine")
            buffer.close()
            return
        with gate.hold(buffer, page_bytes=self.page_bytes) as (addr, n_pages):
            found = self._find(addr, n_pages)
            if found is None or found[1:] != (addr, n_pages):
                raise ValueError(
                    f"this buffer ({n_pages} pages at {addr:#x}) is not registered with this engine"
                )
            region = self._regions.get(found[0])
            if region is None:
                self._core.remove(found[0], addr, True)
        if region is not None:
            region.close()

    def _close_region(self, region: Region) -> None:
        admission = region._admission
        if admission is None:
            return
        if not region.closed:
            self._core.remove(region._id, region._addr, True)
            self._regions.pop(region._id, None)
        region._admission = None
        admission.release()

    @property
    def regions(self) -> tuple[Region, ...]:
        """The open regions, in the order of their registration; arrays made by the engine aside."""
        self._own()
        return tuple(self._regions.values())

    # ---- passes -------------------------------------------------------------------------------

    def scan(self, *, progress: Progress = None) -> PassReport:
        """One full pass over everything registered, by the rules of KSM; the GIL is released.

        A page is merged when it is equal to a shared page, or when it did not change since the last
        pass and equals another such page: so nothing new is merged before the second pass. See
        `dedup` for merging at once.

        `progress`: True for a bar, or a callback (pages done, pages in all). Ctrl-C ends the pass
        between two batches; memory is right at any moment.
        """
        with self._passing() as started:
            pages = [(0, END_OF_MEMORY)]
            self._core.begin_pass()
            self._walk(pages, False, progress, "ksmcore scan")
            left = self._core.snapshot()["skipped"]["map_budget"] - started["skipped"]["map_budget"]
            if left > 0:
                self._core.spend_reserve()
            self._core.end_pass()
            return self._report(started)

    def dedup(self, *buffers: object, progress: Progress = None) -> PassReport:
        """Register what is not yet registered, and merge equal pages of these buffers now.

        Without arguments: of everything registered. The pages are compared with each other and with
        all shared pages; nothing waits for a second pass. What it registers stays registered.

        Raises as `register` does, before anything is registered or merged.
        """
        self._check_open()
        pages = self._register_all(buffers) if buffers else [(0, END_OF_MEMORY)]
        with self._passing() as started:
            before = after = started
            # Pages that the map budget left out get another chance with a smaller reserve.
            for again in range(BUDGET_ROUNDS):
                before = after
                self._core.begin_pass()
                self._walk(pages, True, progress if again == 0 else None, "ksmcore dedup")
                after = self._core.snapshot()
                left = after["skipped"]["map_budget"] - before["skipped"]["map_budget"]
                if left == 0 or after["maps_used"] >= after["maps_allowed"]:
                    break
                self._core.spend_reserve()
            # What is left out is what the last round left out; it looked at all pages again.
            return self._report(started, last_round=before)

    def _register_all(self, buffers: tuple[object, ...]) -> list[tuple[int, int]]:
        """Register the buffers that are not, all or none of them; returns all page ranges."""
        ranges: list[tuple[int, int]] = []
        missing: list[object] = []
        with _registering:
            for buffer in buffers:
                if isinstance(buffer, Region):
                    if buffer._engine is not self or buffer.closed:
                        raise ValueError(f"{buffer!r} is not registered with this engine")
                    ranges.append((buffer.addr, buffer.addr + buffer.nbytes))
                    continue
                with gate.hold(buffer, page_bytes=self.page_bytes) as (addr, n_pages):
                    end = addr + n_pages * self.page_bytes
                    if (addr, end) not in ranges and self._find(addr, n_pages) is None:
                        missing.append(buffer)
                ranges.append((addr, end))
            made: list[Region] = []
            admissions = gate.admit_all(missing, page_bytes=self.page_bytes)
            self._warn_of_phase(admissions)
            try:
                while admissions:
                    made.append(self._add(admissions.pop(0)))
            except BaseException:
                for admission in admissions:
                    admission.release()
                for region in made:
                    region.close()
                raise
        return disjoint(ranges)

    @contextlib.contextmanager
    def _passing(self) -> Iterator[dict[str, Any]]:
        """One pass at a time, with the guard ready; gives the counters from before."""
        self._check_open()
        with self._alone():
            self._check_open()
            self._started = time.perf_counter()
            self._core.refresh_budget(self._asked_budget(), vmas.max_map_count())
            self._core.enter_guard()
            try:
                yield self._core.snapshot()
            finally:
                self._core.leave_guard()

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the pass lock; RuntimeError where that would wait for itself."""
        if self._pass_owner == threading.get_ident():
            raise RuntimeError(
                "this thread is in the middle of a pass of this engine (in a progress callback, "
                "or a signal handler): let it end first"
            )
        with self._pass_lock:
            self._pass_owner = threading.get_ident()
            try:
                yield
            finally:
                self._pass_owner = 0

    def _asked_budget(self) -> int:
        return -1 if self._settings.map_budget == "auto" else self._settings.map_budget

    def _walk(
        self, ranges: list[tuple[int, int]], immediate: bool, progress: Progress, what: str
    ) -> None:
        """Take the registered pages within `ranges` through the path, batch by batch."""
        wanted = [
            (max(addr, start), min(addr + n_pages * self.page_bytes, end))
            for _, addr, n_pages in self._core.regions()
            for start, end in ranges
        ]
        n_pages = sum(max(end - start, 0) for start, end in wanted) // self.page_bytes
        done = 0
        with reporting(progress, what, n_pages) as tell:
            for cursor, end in ranges:
                while cursor < end:
                    # Between two calls the interpreter runs signal handlers, and other threads.
                    cursor = self._core.walk(cursor, end, BATCH_PAGES, immediate)
                    done = min(done + BATCH_PAGES, n_pages)
                    tell(done)
            tell(n_pages)

    def _report(
        self, before: dict[str, Any], last_round: dict[str, Any] | None = None
    ) -> PassReport:
        after = self._core.snapshot()
        last_round = last_round or before
        grown = {
            name: after[name] - before[name]
            for name in ("pages_merged", "pages_zeroed", "cow_breaks")
        }
        skipped = {
            reason: count - last_round["skipped"][reason]
            for reason, count in after["skipped"].items()
        }
        saved = (after["pages_sharing"] + after["ksm_zero_pages"]) - (
            before["pages_sharing"] + before["ksm_zero_pages"]
        )
        return PassReport(
            bytes_saved=saved * self.page_bytes,
            pages_scanned=after["pages_scanned"] - last_round["pages_scanned"],
            skipped=frozen_counts(skipped),
            seconds=time.perf_counter() - self._started,
            **grown,
        )

    # ---- numbers ------------------------------------------------------------------------------

    def estimate(self, *buffers: object, progress: Progress = None) -> Estimate:
        """What merging these buffers would save at most; without arguments, everything registered.

        Registers, maps, protects and faults in nothing. Pages merged already count as duplicates
        too. Not considered: the map budget, which may leave isolated pages out.

        Raises as `register` does for buffers that could not be merged.
        """
        self._check_open()
        with contextlib.ExitStack() as held:
            ranges = self._held_ranges(buffers, held)
            return estimates.tally(ranges, self.page_bytes, self._settings.checksum, progress)

    def _held_ranges(
        self, buffers: tuple[object, ...], held: contextlib.ExitStack
    ) -> list[tuple[int, int]]:
        """(address, end) of each buffer's pages, kept mapped until `held` is closed."""
        ranges: list[tuple[int, int]] = []

        def hold(buffer: object) -> tuple[int, int]:
            addr, n_pages = held.enter_context(gate.hold(buffer, page_bytes=self.page_bytes))
            ranges.append((addr, addr + n_pages * self.page_bytes))
            return addr, n_pages

        if not buffers:
            for memory in list(self._memories):
                hold(memory)
            for region in self.regions:
                # One that another thread closes meanwhile is simply not counted.
                with contextlib.suppress(ValueError):
                    hold(region._view())
            return ranges
        unknown: list[object] = []
        for buffer in buffers:
            exported = buffer._view() if isinstance(buffer, Region) else buffer
            if self._find(*hold(exported)) is None:
                unknown.append(exported)
        for admission in gate.admit_all(unknown, page_bytes=self.page_bytes):
            held.callback(admission.release)
        return ranges

    def stats(self) -> Stats:
        """All counters of this moment."""
        numbers = self._core.snapshot()
        with_pagemap = numbers.pop("with_pagemap")
        return Stats(
            page_bytes=self.page_bytes,
            skipped=frozen_counts(numbers.pop("skipped")),
            guard=self._settings.guard_in_use,
            dirty=self._settings.dirty_in_use,
            presence="pagemap" if with_pagemap else "mincore",
            **numbers,
        )

    def _allocate(self, n_bytes: int) -> PageMemory:
        self._check_open()
        memory = PageMemory(self._core, n_bytes)
        self._memories.add(memory)
        return memory

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
        with self._alone():
            for region in list(self._regions.values()):
                region.close()
            for region_id, addr, _ in self._core.regions():
                self._core.remove(region_id, addr, True)
            self._closed = True
        _engines.discard(self)

    @property
    def closed(self) -> bool:
        return self._closed

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

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

    def __repr__(self) -> str:
        if self._closed:
            return "<ksmcore.Engine: closed>"
        return f"<ksmcore.Engine: {self._core.snapshot()['regions']} regions>"

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("this engine is closed")
        self._own()

    @staticmethod
    def _generation_now() -> int:
        return _sys.generation()

    def _is_inherited(self) -> bool:
        return self._generation != _sys.generation()

    def _own(self) -> None:
        """In a forked child: begin empty. The parent's regions count as closed here."""
        if not self._is_inherited():
            return
        regions, self._regions = self._regions, {}
        self._memories = weakref.WeakSet()
        self._pass_lock = threading.Lock()
        self._pass_owner = 0
        self._generation = _sys.generation()
        for region in regions.values():
            region.close()


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
        except MemoryError as error:
            log.warning("at exit: %r stays merged: %s", engine, error)
