"""Passes: an engine's pages go through the path, all at once or batch by batch.

Called by users, as methods of an engine, and by its background scanner. Calls the core.

The pass lock lets one walk at a time happen in an engine: a whole `scan` or `dedup`, or one batch
of the scanner, so that both may run side by side. It is taken before the registration lock, never
by finalisers, and made anew in a forked child: a thread that held it does not exist there.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from ksmcore._core.core import Core
from ksmcore._engine.history import History, Sample, sample
from ksmcore._engine.progress import Progress, reporting
from ksmcore._engine.registrar import Registrar
from ksmcore._engine.settings import Settings
from ksmcore._engine.stats import PassReport, frozen_counts
from ksmcore._kernel import smaps

__all__ = ["END_OF_MEMORY", "Begun", "PassMaker"]

# Pages between two looks at signals: 16 MiB of 4 KiB pages, tens of milliseconds when all merge.
BATCH_PAGES = 4096
# How often dedup goes over pages that the map budget left out, giving short runs more each time.
BUDGET_ROUNDS = 6
# A pass that has made so many mappings, and a quarter of what there were, looks again at what the
# program has mapped meanwhile.
MAPS_TO_CENSUS = 500
END_OF_MEMORY = 2**64 - 1


@dataclass(frozen=True)
class Begun:
    """What there was when a pass began."""

    numbers: dict[str, Any]
    seconds: float


class PassMaker(Registrar):
    """The part of an engine that makes passes."""

    on_pass: Callable[[PassReport], object] | None = None
    """Called with the report of each full pass, `scan` and the background scanner's alike, by the
    thread that made it. What it raises ends the `scan`, or the scanner."""

    peak_bytes_saved: int = 0
    """Most that was saved at the end of a `scan`, a `dedup`, or a pass of the scanner."""

    def __init__(self, core: Core, settings: Settings) -> None:
        super().__init__(core)
        self._settings = settings
        # What keeps free memory that is registered here gives it back: with True, what it did not
        # need for a while, and now and then; with False, all. Nothing is raised.
        self._tidiers: list[Callable[[bool], object]] = []

    def _renew(self) -> None:
        self._pass_lock = threading.Lock()
        self._pass_owner = 0
        self._history = History()
        self._made_at = time.monotonic()
        self.peak_bytes_saved = 0

    @property
    def history(self) -> History:
        """What each `scan`, `dedup` and pass of the scanner left behind; thinned out when there are
        thousands. A forked child begins a new one."""
        self._own()
        return self._history

    def _sample(self, numbers: dict[str, Any] | None = None) -> Sample:
        """These numbers, or those of this moment."""
        seconds = time.monotonic() - self._made_at
        return sample(seconds, numbers or self._core.snapshot(), self.page_bytes)

    # ---- at once --------------------------------------------------------------------------------

    def scan(self, *, progress: Progress = None) -> PassReport:
        """One full pass over everything registered, by the rules of KSM; the GIL is released.

        A page is merged when it is equal to a shared page, or when it did not change since the last
        pass and equals another such page: so nothing new is merged before the second pass. See
        `dedup` for merging at once.

        `progress`: True for a bar, or a callback (pages done, pages in all). Ctrl-C ends the pass
        between two batches; memory is right at any moment.
        """
        self._tidy(idle_only=False)
        with self._passing() as begun:
            self._core.begin_pass()
            self._walk([(0, END_OF_MEMORY)], False, progress, "ksmcore scan")
            report = self._end_full_pass(begun)
        self._tell(report)
        return report

    def dedup(self, *buffers: object, progress: Progress = None) -> PassReport:
        """Register what is not yet registered, and merge equal pages of these buffers now.

        Without arguments: of everything registered. The pages are compared with each other and with
        all shared pages; nothing waits for a second pass. What it registers stays registered.

        Raises as `register` does, before anything is registered or merged.
        """
        self._check_open()
        self._tidy(idle_only=bool(buffers))
        pages = self._register_all(buffers) if buffers else [(0, END_OF_MEMORY)]
        return self._merge_now(pages, progress)

    def _merge_now(self, pages: list[tuple[int, int]], progress: Progress = None) -> PassReport:
        """Merge what is equal in these address ranges."""
        with self._passing() as begun:
            before = after = first = begun.numbers
            # Pages that the map budget left out get another chance with a smaller reserve.
            for again in range(BUDGET_ROUNDS):
                before = after
                self._core.begin_pass()
                self._walk(pages, True, progress if again == 0 else None, "ksmcore dedup")
                after = self._core.snapshot()
                first = after if again == 0 else first
                left = after["skipped"]["map_budget"] - before["skipped"]["map_budget"]
                if left == 0 or after["maps_used"] >= after["maps_allowed"]:
                    break
                self._core.end_pass(full=False, spend_reserve=True)
            # The first round looked at every page; the last one tells what is left out.
            scanned = first["pages_scanned"] - begun.numbers["pages_scanned"]
            return self._report(begun, last_round=before, scanned=scanned)

    def unmerge(self) -> None:
        """Make everything plain private memory again, and leave it registered: later passes merge
        it anew. Atomic for threads that write meanwhile.

        Raises:
            MemoryError: not enough memory for all; what is still merged stays so, all bytes right.
            RuntimeError: some of it is held.
        """
        self._check_open()
        self._tidy(idle_only=False)
        with self._alone():
            for region_id, addr, _ in self._core.regions():
                self._restore(region_id, addr, keep=True)

    def _tidy(self, *, idle_only: bool) -> None:
        """Have free memory neither merged nor counted."""
        for tidy in self._tidiers:
            tidy(idle_only)

    @contextlib.contextmanager
    def _passing(self) -> Iterator[Begun]:
        """One pass at a time, with the guard ready; gives what there was before."""
        self._check_open()
        with self._alone():
            self._check_open()
            seconds = time.perf_counter()
            self._take_census()
            entered = self._core.enter_guard()
            try:
                yield Begun(self._core.snapshot(), seconds)
            finally:
                self._core.leave_guard(entered)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the pass lock; RuntimeError where that would wait for itself."""
        self._check_outside()
        with self._pass_lock:
            self._pass_owner = threading.get_ident()
            try:
                yield
            finally:
                self._pass_owner = 0

    def _check_outside(self) -> None:
        if self._pass_owner == threading.get_ident():
            raise RuntimeError(
                "this thread is in the middle of a pass of this engine (in a progress callback, "
                "or a signal handler): let it end first"
            )

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
                    self._take_census_if_due()
                    cursor = self._core.walk(cursor, end, BATCH_PAGES, immediate)
                    done = min(done + BATCH_PAGES, n_pages)
                    tell(done)
            tell(n_pages)

    def _copy_memory(self, source: int, target: int, n_bytes: int) -> None:
        """What the source did not share yet is merged with its copy."""
        n_copied = self._core.copy_memory(source, target, n_bytes)
        # In a callback of a pass there can be no other: then a later one merges them.
        if n_copied != 0 and self._pass_owner != threading.get_ident():
            ranges = (self._whole_pages(addr, addr + n_bytes) for addr in (source, target))
            self._merge_now(sorted(ranges))

    def _whole_pages(self, addr: int, end: int) -> tuple[int, int]:
        return -(-addr // self.page_bytes) * self.page_bytes, end - end % self.page_bytes

    # ---- batch by batch, for the scanner --------------------------------------------------------

    def _begin_batches(self, in_batch: AbstractContextManager[object]) -> Begun:
        """Begin a full pass; `in_batch` is entered where a fork has to wait."""
        with self._alone(), in_batch:
            self._check_open()
            seconds = time.perf_counter()
            self._take_census()
            self._core.begin_pass()
            return Begun(self._core.snapshot(), seconds)

    def _make_batch(self, in_batch: AbstractContextManager[object], cursor: int, pages: int) -> int:
        """Go on with it for so many pages; returns the new cursor, END_OF_MEMORY at the end."""
        with self._alone(), in_batch:
            self._check_open()
            self._take_census_if_due()
            most = self._settings.max_pages_to_merge
            return self._core.walk(cursor, END_OF_MEMORY, pages, False, most)

    def _end_batches(self, begun: Begun) -> PassReport:
        with self._alone():
            return self._end_full_pass(begun)

    # ---- what both do ---------------------------------------------------------------------------

    def _take_census(self) -> None:
        """Look at what is mapped: the map budget, and memory that was altered behind our back. What
        the program has locked since it was registered stays as it is: a new mapping would not be
        locked."""
        asked = self._settings.map_budget
        self._core.take_census(-1 if asked == "auto" else asked, smaps.max_map_count())
        self._maps_at_census = self._core.maps_used
        if smaps.locked_bytes():
            for vma in smaps.Snapshot().vmas_in(0, END_OF_MEMORY):
                if "lo" in vma.flags:
                    self._core.pass_over(vma.start, vma.end)

    def _take_census_if_due(self) -> None:
        made = self._core.maps_used - self._maps_at_census
        if made > max(MAPS_TO_CENSUS, self._maps_at_census // 4):
            self._take_census()

    def _end_full_pass(self, begun: Begun) -> PassReport:
        left = self._core.snapshot()["skipped"]["map_budget"]
        more_left = left > begun.numbers["skipped"]["map_budget"]
        self._core.end_pass(full=True, spend_reserve=more_left)
        return self._report(begun)

    def _tell(self, report: PassReport) -> None:
        if self.on_pass is not None:
            self.on_pass(report)

    def _report(
        self,
        begun: Begun,
        last_round: dict[str, Any] | None = None,
        scanned: int | None = None,
    ) -> PassReport:
        after = self._core.snapshot()
        before = begun.numbers
        last_round = last_round or before
        if scanned is None:
            scanned = after["pages_scanned"] - before["pages_scanned"]
        grown = {
            name: after[name] - before[name]
            for name in ("pages_hashed", "pages_merged", "pages_zeroed", "cow_breaks")
        }
        skipped = {
            reason: count - last_round["skipped"][reason]
            for reason, count in after["skipped"].items()
        }
        saved_before, saved = (
            (numbers["pages_sharing"] + numbers["ksm_zero_pages"]) * self.page_bytes
            for numbers in (before, after)
        )
        self.peak_bytes_saved = max(self.peak_bytes_saved, saved)
        self._history.add(self._sample(after))
        return PassReport(
            bytes_saved=saved - saved_before,
            pages_scanned=scanned,
            skipped=frozen_counts(skipped),
            seconds=time.perf_counter() - begun.seconds,
            **grown,
        )
