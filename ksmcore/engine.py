"""The engine: settings, passes and numbers over what is registered with it.

Called by users, directly or through the module-level functions, which use a default engine. The
work is done by `ksmcore._core.Core`; this is its thin face.

Two locks, always taken in this order: the pass lock (one pass at a time) and the registration
lock (see `ksmcore.registration`). Neither is held by finalisers. A forked child makes both anew:
threads that held them do not exist there.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import threading
import time
import warnings
import weakref
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ksmcore import estimates, vmas
from ksmcore._core import Core
from ksmcore.features import check_tracker, choose_guard
from ksmcore.progress import Progress, reporting
from ksmcore.registration import Registrar
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
# A pass that has made so many mappings, and a quarter of what there were, looks again at what the
# program has mapped meanwhile.
MAPS_TO_CENSUS = 500
END_OF_MEMORY = 2**64 - 1

_engines: weakref.WeakSet[Engine] = weakref.WeakSet()


class Engine(Registrar):
    """Finds equal pages in the buffers registered with it, and keeps each content once.

    Two engines share nothing: equal pages of different engines are not merged. Settings are keyword
    arguments, see `ksmcore.Settings`.
    """

    def __init__(self, **settings: Any) -> None:
        check_names(settings)
        self._settings = Settings(**settings)
        if self._settings.dirty == "pagemap":
            check_tracker()
        super().__init__(
            Core(
                order=self._settings.order,
                checksum=self._settings.checksum,
                guard=choose_guard(self._settings.guard),
                any_guard=self._settings.guard == "auto",
                with_pagemap=True,
                with_tracker=self._settings.dirty != "checksum",
                n_buckets=self._settings.rmap_hash_size,
            )
        )
        self._renew()
        self._apply_settings()
        _engines.add(self)

    def _renew(self) -> None:
        self._pass_lock = threading.Lock()
        self._pass_owner = 0

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
        settings = self._settings
        self._core.configure(
            settings.use_zero_pages,
            -1 if settings.max_shared_pages is None else settings.max_shared_pages,
            -1 if settings.max_page_sharing == "auto" else settings.max_page_sharing,
        )

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
            self._core.end_pass(full=True, spend_reserve=left > 0)
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
            before = after = first = started
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
            scanned = first["pages_scanned"] - started["pages_scanned"]
            return self._report(started, last_round=before, scanned=scanned)

    def unmerge(self) -> None:
        """Make everything plain private memory again, and leave it registered: later passes merge
        it anew. Atomic for threads that write meanwhile.

        Raises:
            MemoryError: not enough memory for all; what is still merged stays so, all bytes right.
            RuntimeError: some of it is held.
        """
        self._check_open()
        with self._alone():
            for region_id, addr, _ in self._core.regions():
                self._restore(region_id, addr, keep=True)

    @contextlib.contextmanager
    def _passing(self) -> Iterator[dict[str, Any]]:
        """One pass at a time, with the guard ready; gives the counters from before."""
        self._check_open()
        with self._alone():
            self._check_open()
            self._started = time.perf_counter()
            self._take_census()
            entered = self._core.enter_guard()
            try:
                yield self._core.snapshot()
            finally:
                self._core.leave_guard(entered)

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

    def _take_census(self) -> None:
        """Look at what is mapped: the map budget, and memory that was altered behind our back. What
        the program has locked since it was registered stays as it is: a new mapping would not be
        locked."""
        self._core.take_census(self._asked_budget(), vmas.max_map_count())
        self._maps_at_census = self._core.maps_used
        if vmas.locked_bytes():
            for vma in vmas.Snapshot().vmas_in(0, END_OF_MEMORY):
                if "lo" in vma.flags:
                    self._core.pass_over(vma.start, vma.end)

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
                    made = self._core.maps_used - self._maps_at_census
                    if made > max(MAPS_TO_CENSUS, self._maps_at_census // 4):
                        self._take_census()
                    cursor = self._core.walk(cursor, end, BATCH_PAGES, immediate)
                    done = min(done + BATCH_PAGES, n_pages)
                    tell(done)
            tell(n_pages)

    def _report(
        self,
        before: dict[str, Any],
        last_round: dict[str, Any] | None = None,
        scanned: int | None = None,
    ) -> PassReport:
        after = self._core.snapshot()
        last_round = last_round or before
        if scanned is None:
            scanned = after["pages_scanned"] - before["pages_scanned"]
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
            pages_scanned=scanned,
            skipped=frozen_counts(skipped),
            seconds=time.perf_counter() - self._started,
            **grown,
        )

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
            return estimates.tally(ranges, self.page_bytes, self._settings.checksum, progress)

    def stats(self) -> Stats:
        """All counters of this moment."""
        numbers = self._core.snapshot()
        with_pagemap = numbers.pop("with_pagemap")
        with_tracker = numbers.pop("with_tracker")
        return Stats(
            page_bytes=self.page_bytes,
            skipped=frozen_counts(numbers.pop("skipped")),
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
        with self._alone():
            for region in list(self._regions.values()):
                region.close()
            for region_id, addr, _ in self._core.regions():
                self._restore(region_id, addr)
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
