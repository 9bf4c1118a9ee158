"""Passes: an engine's pages go through the path, all at once or batch by batch.

The pass lock lets one walk at a time happen in an engine: a whole `scan` or `dedup`, or one batch
of the scanner, so that both may run side by side. It is taken before the registration lock, and
never by finalisers.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ksmcore._core.scopes import GuardScope, LockScope, PassLock
from ksmcore._engine.history import History, Sample, sample
from ksmcore._engine.progress import Progress, reporting
from ksmcore._engine.stats import PassReport
from ksmcore._gate.ranges import overlap_bytes
from ksmcore._kernel import procfs, smaps
from ksmcore._kernel.syscalls import locks_future, page_bytes

if TYPE_CHECKING:
    from ksmcore._core.core import Core
    from ksmcore._engine.settings import InForce

__all__ = ["END_OF_MEMORY", "EVERYTHING", "Begun", "EngineClosedError", "NotNowError", "Passes"]

log = logging.getLogger("ksmcore")

# Pages between two looks at signals: 16 MiB of 4 KiB pages, tens of milliseconds when all merge.
BATCH_PAGES = 4096
# Threads of a pass, where nobody has said how many.
MOST_AUTO_THREADS = 8
# How often dedup goes over pages that the map budget left out, giving short runs more each time.
BUDGET_ROUNDS = 6
# A pass that has made so many mappings, and a quarter of what there were, looks again at what the
# program has mapped meanwhile.
MAPS_TO_CENSUS = 500
# What a copy has copied is merged at once where the process has no more than so many mappings for
# each page, all of which are looked at before, or where that takes but this part of the time.
MAPS_PER_COPIED_PAGE = 8
COPIES_SHARE = 1 / 50
# Of the pages that a batch has read, one in so many makes it worth while by being new.
NEW_SHARE = 8
# Of threads, in a message.
MOST_NAMES = 4
END_OF_MEMORY = 2**64 - 1
EVERYTHING = [(0, END_OF_MEMORY)]


# Of failures that pass: there is no descriptor, or no memory, at the moment.
PASSING = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.EINTR}


class EngineClosedError(ValueError):
    """For who holds an engine that another thread has closed."""


class NotNowError(OSError):
    """Nothing can be merged at the moment, for want of descriptors or memory, or of what the kernel
    tells of its mappings."""


def _not_now(error: OSError | MemoryError) -> NotNowError:
    code, why = errno.ENOMEM, str(error)
    if isinstance(error, OSError):
        code = error.errno or code
        why = f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)
    return NotNowError(code, f"nothing can be merged now ({why}); what is merged stays so")


def _was_fruitful(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    def grown(*names: str) -> int:
        return sum(after[name] - before[name] for name in names)

    n_new = grown("pages_unshared", "pages_volatile")
    return grown("pages_merged", "pages_zeroed") > 0 or n_new * NEW_SHARE > grown("pages_hashed")


@dataclass(frozen=True)
class Begun:
    """What there was when a pass began."""

    numbers: dict[str, Any]
    seconds: float


class Passes:
    """Makes passes over one core, of one process."""

    page_bytes: int = page_bytes()

    def __init__(self, core: Core, in_force: InForce) -> None:
        self._core = core
        self._in_force = in_force
        self.alone = PassLock()
        self.ended = False
        """Set under the pass lock: the engine was closed, and no pass begins any more."""
        self.history = History()
        self.peak_bytes_saved = 0
        self._made_at = time.monotonic()
        self._maps_at_census = 0
        self._next_small_copy = 0.0  # that may be merged at once, not before
        self._n_auto_threads = 0  # 0: not asked for yet
        self._has_warned = False

    def numbers(self) -> dict[str, Any]:
        """The core's numbers of this moment, which may be the best that there were."""
        numbers = self._core.snapshot()
        self.peak_bytes_saved = max(self.peak_bytes_saved, self._bytes_saved(numbers))
        return numbers

    def sample(self, numbers: dict[str, Any] | None = None) -> Sample:
        """These numbers, or those of this moment, as the history keeps them."""
        seconds = time.monotonic() - self._made_at
        return sample(seconds, numbers or self.numbers(), self.page_bytes)

    def tidy(self, *, idle_only: bool, young_seconds: float = 0.0) -> None:
        """Have free memory neither merged nor counted, and leave what was allocated less than so
        long ago to later batches."""
        for tidy in self._in_force.tidiers:
            tidy(idle_only, young_seconds)

    def check_open(self) -> None:
        if self.ended:
            raise EngineClosedError("this engine is closed")

    # ---- at once --------------------------------------------------------------------------------

    def scan(self, progress: Progress = None) -> PassReport:
        """See `Engine.scan`."""
        self.tidy(idle_only=False)
        with LockScope(self.alone):
            begun = self._begin()
            with GuardScope(self._core):
                self._core.begin_pass()
                self._walk(EVERYTHING, False, progress, "ksmcore scan")
                report = self._end_full_pass(begun)
        self.tell(report)
        return report

    def merge(
        self,
        pages: list[tuple[int, int]],
        progress: Progress = None,
        unreached: Mapping[str, int] | None = None,
    ) -> PassReport:
        """Merge what is equal in these address ranges, without the wait for a second pass.
        `unreached`: what there was no way to, to be told."""
        with LockScope(self.alone):
            begun = self._begin()
            with GuardScope(self._core):
                report = self._merge_in_rounds(begun, pages, progress)
        return replace(report, unreached=unreached or {})

    def _merge_in_rounds(
        self, begun: Begun, pages: list[tuple[int, int]], progress: Progress
    ) -> PassReport:
        """Pages that the map budget left out get another chance with a smaller reserve."""
        before = after = first = begun.numbers
        for again in range(BUDGET_ROUNDS):
            before = after
            self._core.begin_pass(again=again > 0)
            self._walk(pages, True, progress if again == 0 else None, "ksmcore dedup")
            after = self._core.snapshot()
            first = after if again == 0 else first
            left = after["skipped"]["map_budget"] - before["skipped"]["map_budget"]
            if left == 0 or after["maps_used"] >= after["maps_allowed"]:
                break
            self._core.end_pass(full=False, spend_reserve=True)
        self._core.release()
        # The first round looked at every page; the last one tells what is left out.
        scanned = first["pages_scanned"] - begun.numbers["pages_scanned"]
        return self._report(begun, last_round=before, scanned=scanned)

    def copy(self, source: int, target: int, n_bytes: int) -> None:
        """Copy to memory just allocated, at the same offset in a page. What the source did not
        share yet is merged with its copy, at once or by a later pass."""
        n_copied = self._core.copy_memory(source, target, n_bytes)
        # In a callback of a pass there can be no other.
        if n_copied == 0 or self.alone.is_mine():
            return
        began = time.monotonic()
        if n_copied * MAPS_PER_COPIED_PAGE < self._core.n_maps and began < self._next_small_copy:
            return
        both = sorted(self._whole_pages(addr, addr + n_bytes) for addr in (source, target))
        with contextlib.suppress(OSError, MemoryError):
            self.merge(both)
        ended = time.monotonic()
        self._next_small_copy = ended + (ended - began) / COPIES_SHARE

    def _whole_pages(self, addr: int, end: int) -> tuple[int, int]:
        return -(-addr // self.page_bytes) * self.page_bytes, end - end % self.page_bytes

    def _walk(
        self, ranges: list[tuple[int, int]], immediate: bool, progress: Progress, what: str
    ) -> None:
        """Take the registered pages within `ranges`, which are sorted and disjoint, through the
        path, batch by batch."""
        n_pages = self._n_registered(ranges) if progress else 0
        n_threads = self._n_threads()
        done = 0
        with reporting(progress, what, n_pages) as tell:
            for cursor, end in ranges:
                while cursor < end:
                    # Between two calls the interpreter runs signal handlers, and other threads.
                    self._take_census_if_due()
                    cursor = self._core.walk(
                        cursor, end, BATCH_PAGES, immediate, n_threads=n_threads
                    )
                    done = min(done + BATCH_PAGES, n_pages)
                    tell(done)
            tell(n_pages)

    def _n_threads(self, auto: int | None = None) -> int:
        """In force now; `auto`: where none is wanted in numbers, if not as many as there are
        processors."""
        wanted = self._in_force.settings.threads
        if wanted != "auto":
            return wanted
        if auto is not None:
            return auto
        # Asked once: small copies are merged in less time than the control groups take to read.
        # No functools.cached_property: its lock would stay taken in a forked child.
        if self._n_auto_threads == 0:
            self._n_auto_threads = min(procfs.processors(), MOST_AUTO_THREADS)
        return self._n_auto_threads

    def _n_registered(self, ranges: list[tuple[int, int]]) -> int:
        """Pages; some 0.5 us for each region there is."""
        registered = [
            (addr, addr + n_pages * self.page_bytes) for _, addr, n_pages in self._core.regions()
        ]
        return overlap_bytes(registered, ranges) // self.page_bytes

    # ---- batch by batch, for the scanner --------------------------------------------------------

    @property
    def n_enlisted(self) -> int:
        """Regions that there ever were."""
        return self._core.n_enlisted

    @property
    def look_seconds(self) -> float:
        """What the last look at what the program has advised took, if this pass has made one."""
        return self._core.look_ns / 1e9

    @property
    def helper_seconds(self) -> float:
        """Processor time of the threads that have helped with batches."""
        return self._core.helpers_ns / 1e9

    def pages_before(self, cursor: int) -> tuple[int, int]:
        """Registered pages before an address, and in all."""
        return self._core.pages_before(cursor)

    def begin_batches(self) -> Begun:
        """Begin a full pass; NotNowError when that will be possible later."""
        with LockScope(self.alone):
            begun = self._begin()
            self._core.begin_pass(patient=True)
            return begun

    def make_batch(self, cursor: int, n_pages: int) -> tuple[int, bool]:
        """Go on with it for so many pages, fewer before a fork; returns the new cursor,
        END_OF_MEMORY at the end, and whether it was fruitful: something was merged, or much of what
        was read was new. NotNowError when it is to be tried again, later."""
        with LockScope(self.alone):
            self.check_open()
            self._take_census_if_due()
            most, n_threads = self._in_force.settings.max_pages_to_merge, self._n_threads(1)
            try:
                before = self._core.snapshot()
                cursor = self._core.walk(
                    cursor, END_OF_MEMORY, n_pages, False, most, patient=True, n_threads=n_threads
                )
                return cursor, _was_fruitful(before, self.numbers())
            except MemoryError as error:
                raise _not_now(error) from error
            except OSError as error:
                if error.errno in PASSING:
                    raise _not_now(error) from error
                raise

    def end_batches(self, begun: Begun) -> PassReport:
        with LockScope(self.alone):
            return self._end_full_pass(begun)

    # ---- what both do, under the pass lock ------------------------------------------------------

    def _begin(self) -> Begun:
        """What there is before; the mappings are looked at."""
        self.check_open()
        seconds = time.perf_counter()
        self._take_census()
        return Begun(self._core.snapshot(), seconds)

    def _take_census(self) -> None:
        """Look at what is mapped: the map budget, and memory that was altered behind our back. What
        the program has locked since it was registered stays as it is: a new mapping would not be
        locked. Or it would be, and the kernel would fill it with copies, where all new memory is.

        NotNowError when the kernel does not tell.
        """
        asked = self._in_force.settings.map_budget
        try:
            self._core.take_census(-1 if asked == "auto" else asked, smaps.max_map_count())
            locked = smaps.Snapshot() if smaps.locked_bytes() else None
        except (OSError, MemoryError) as error:
            raise _not_now(error) from error
        self._maps_at_census = self._core.maps_used
        if locked is not None:
            for vma in locked.vmas_in(0, END_OF_MEMORY):
                if "lo" in vma.flags:
                    self._core.pass_over(vma.start, vma.end)
        if locks_future():
            self._core.pass_over(0, END_OF_MEMORY)

    def _take_census_if_due(self) -> None:
        made = self._core.maps_used - self._maps_at_census
        if made > max(MAPS_TO_CENSUS, self._maps_at_census // 4):
            self._take_census()

    def _end_full_pass(self, begun: Begun) -> PassReport:
        self._core.release()
        left = self._core.snapshot()["skipped"]["map_budget"]
        more_left = left > begun.numbers["skipped"]["map_budget"]
        self._core.end_pass(full=True, spend_reserve=more_left)
        return self._report(begun)

    def tell(self, report: PassReport) -> None:
        """Call back, outside of the pass lock."""
        if self._in_force.on_pass is not None:
            self._in_force.on_pass(report)

    def _report(
        self,
        begun: Begun,
        last_round: dict[str, Any] | None = None,
        scanned: int | None = None,
    ) -> PassReport:
        after = self.numbers()
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
        self.history.add(self.sample(after))
        if skipped["sigsegv_blocked"] != 0 and not self._has_warned:
            self._warn_of_blocked_signal(skipped["sigsegv_blocked"])
        return PassReport(
            bytes_saved=self._bytes_saved(after) - self._bytes_saved(before),
            pages_scanned=scanned,
            skipped=skipped,
            seconds=time.perf_counter() - begun.seconds,
            **grown,
        )

    def _bytes_saved(self, numbers: dict[str, Any]) -> int:
        n_pages: int = numbers["pages_sharing"] + numbers["ksm_zero_pages"]
        return n_pages * self.page_bytes

    def _warn_of_blocked_signal(self, n_pages: int) -> None:
        """Once, and not of a moment that is over."""
        blocking = procfs.threads_blocking(signal.SIGSEGV)
        # Where /proc is there, it is for want of descriptors that it does not tell.
        if blocking == [] or (blocking is None and procfs.TASKS.exists()):
            return
        self._has_warned = True
        who = "/proc does not tell whether a thread blocks SIGSEGV"
        if blocking:
            who = f"SIGSEGV is blocked by {', '.join(blocking[:MOST_NAMES])}"
        log.warning(
            "%d pages were not merged, because %s. With the guard 'mprotect' a thread that does, "
            "and writes to a page that is being merged, would end the process. Unblock it, or "
            "see `ksmcore doctor` for a better guard. (This is said once.)",
            n_pages,
            who,
        )
