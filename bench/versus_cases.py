"""The cases of versus_kernel: how memory is filled, and what each side does with it.

Called by versus_kernel. Every case gives seconds and a number (pages saved, mostly) for one side:
the kernel's KSM, which stands ready at full speed, or ksmcore.
"""

from __future__ import annotations

import contextlib
import gc
import math
import mmap
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

import ksmcore
from bench import corpora, kernel_ksm, limit
from bench.corpora import PAGE, Pages
from bench.measure import digest, read_all

if TYPE_CHECKING:
    from typing_extensions import Self

LIMIT_SECONDS = 600.0
SMART_SCANS = 12  # after so many scans smart_scan skips most unchanged pages
QUIET_SCANS = 4  # after so many passes ksmcore reads no unchanged page any more
PART_WRITTEN = 64  # one page in so many is written before the pass "written"


Work = Callable[["Case", bool], "Result"]


class Result(NamedTuple):
    """Of one side in one round."""

    seconds: float
    found: int
    cpu_seconds: float = math.nan
    """Processor time that it took: of all threads of the process, or of the kernel's."""


class Clock:
    """A `with` block, timed; of either side, or of the limit."""

    def __init__(self, kernel: bool) -> None:
        self._spent = kernel_ksm.spent_seconds if kernel else time.process_time

    def __enter__(self) -> Self:
        self.seconds, self.cpu_seconds = -time.perf_counter(), -self._spent()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter()
        self.cpu_seconds += self._spent()

    def result(self, found: int) -> Result:
        return Result(self.seconds, found, self.cpu_seconds)


@dataclass
class Side:
    """Times of one side, in seconds, and what it found."""

    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    found: list[int] = field(default_factory=list)

    def add(self, result: Result) -> None:
        self.seconds.append(result.seconds)
        self.cpu_seconds.append(result.cpu_seconds)
        self.found.append(result.found)

    def __str__(self) -> str:
        if not self.seconds:
            return f"{'-':>8}{'-':>9}{'-':>9}"
        times = (min(self.seconds), statistics.median(self.seconds), max(self.seconds))
        return "{:8.4f} {:8.4f} {:8.4f}".format(*times)


@dataclass
class Case:
    """One row: how its memory is filled, what each side does, and what is asked for."""

    name: str
    what: str
    goal: str
    counts: str
    """What `found` counts; "ns": nanoseconds per page of memory that is not merged."""
    n_pages: int
    work: Work
    huge: bool = False
    kernel: Side = field(default_factory=Side)
    ours: Side = field(default_factory=Side)
    limit: Side = field(default_factory=Side)

    @property
    def ratio(self) -> float | None:
        if not self.kernel.seconds or not self.ours.seconds:
            return None
        return statistics.median(self.kernel.seconds) / statistics.median(self.ours.seconds)

    @property
    def times_limit(self) -> float | None:
        """How many times as long ksmcore takes as what cannot be left out."""
        if not self.limit.seconds or not self.ours.seconds:
            return None
        return statistics.median(self.ours.seconds) / statistics.median(self.limit.seconds)


class Memory:
    """Private memory, the same kind for both sides: in pages of the usual size, or `huge`."""

    def __init__(self, *fills: Callable[[Pages], object], n_pages: int, huge: bool) -> None:
        self.maps = []
        self.arrays: list[Pages] = []
        for fill in fills:
            memory = mmap.mmap(-1, n_pages * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            memory.madvise(mmap.MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE)
            self.maps.append(memory)
            self.arrays.append(np.frombuffer(memory, np.uint8).reshape(n_pages, PAGE))
            fill(self.arrays[-1])
        self.digests = [digest(pages) for pages in self.arrays]

    def mergeable(self, first: int = 0, end: int | None = None) -> None:
        for memory in self.maps[first:end]:
            memory.madvise(kernel_ksm.MADV_MERGEABLE)

    def check(self) -> None:
        for pages, known in zip(self.arrays, self.digests, strict=True):
            if digest(pages) != known:
                raise SystemExit("contents have changed")


@contextlib.contextmanager
def memory_of(
    *fills: Callable[[Pages], object], n_pages: int, huge: bool = False
) -> Iterator[Memory]:
    """Filled memory; checked at the end, and unmapped."""
    memory = Memory(*fills, n_pages=n_pages, huge=huge)
    yield memory
    memory.check()
    memory.arrays.clear()
    gc.collect()
    for one in memory.maps:
        one.close()


def timed_merge(memory: Memory, kernel: bool, n_expected: int, before: int = 0) -> Result:
    """Merge the arrays from number `before` on, those before them being merged already. The number:
    pages saved by it."""
    if not kernel:
        with ksmcore.Engine() as engine:
            if before:
                engine.dedup(*memory.arrays[:before])
            with Clock(kernel) as clock:
                report = engine.dedup(*memory.arrays[before:])
            for pages in memory.arrays:
                read_all(pages)
            return clock.result(report.bytes_saved // PAGE)
    kernel_ksm.start_empty()
    already = 0
    if before:
        already = (before - 1) * len(memory.arrays[0])
        memory.mergeable(0, before)
        kernel_ksm.run()
        if not kernel_ksm.wait_until_saved(already, LIMIT_SECONDS):
            raise SystemExit("the kernel did not merge the first copies in time")
    with Clock(kernel) as clock:
        memory.mergeable(before)
        kernel_ksm.run()
        kernel_ksm.wait_until_saved(already + n_expected, LIMIT_SECONDS)
    found = kernel_ksm.n_saved() - already
    kernel_ksm.start_empty()
    return clock.result(found)


# ---- cases -------------------------------------------------------------------------------------

# How the memory of those that merge is filled, and what the limit does with it.
FILLS: dict[str, list[Callable[[Pages], object]]] = {
    "worst": [corpora.fill_tails] * 2,
    "join": [corpora.fill_tails] * 4,
    "best": [corpora.fill_repeated] * 2,
    "mixture": [corpora.fill_mixture],
}
ASKED = {
    "worst": limit.worst,
    "join": limit.join,
    "best": limit.best,
    "mixture": limit.mixture,
}


def filled(case: Case) -> contextlib.AbstractContextManager[Memory]:
    return memory_of(*FILLS[case.name], n_pages=case.n_pages, huge=case.huge)


def at_limit(case: Case) -> Result:
    """What cannot be left out by whoever merges (see limit). Of pairs in random order the contents
    are not right afterwards."""
    with filled(case) as memory:
        before, parts = ASKED[case.name](memory.arrays)
        one = limit.Limit()
        one.merge(before)
        with Clock(False) as clock:
            one.merge(parts)
        one.close()
        del before, parts  # which hold the memory
        if case.name == "mixture":
            memory.digests = [digest(pages) for pages in memory.arrays]
        return clock.result(0)


def worst(case: Case, kernel: bool) -> Result:
    with filled(case) as memory:
        return timed_merge(memory, kernel, case.n_pages)


def join(case: Case, kernel: bool) -> Result:
    with filled(case) as memory:
        return timed_merge(memory, kernel, 2 * case.n_pages, before=2)


def best(case: Case, kernel: bool) -> Result:
    with filled(case) as memory:
        # At most max_page_sharing pages map one copy, ...
        most = kernel_ksm.number("max_page_sharing") if kernel else limit.BLOCK_PAGES
        n_copies = -(-2 * case.n_pages // most)
        return timed_merge(memory, kernel, 2 * case.n_pages - 2 * n_copies)  # ... give or take


def mixture(case: Case, kernel: bool) -> Result:
    census = corpora.mixture_census(case.n_pages)
    with filled(case) as memory:
        # Where the kernel splits huge pages it drops those of their pages that hold zeros, without
        # counting them among what KSM saves.
        n_dropped = census.n_zero if kernel and case.huge else 0
        return timed_merge(memory, kernel, census.n_spare - n_dropped)


# ---- passes over what does not change, or not much ---------------------------------------------


def idle(
    case: Case, kernel: bool, *, smart: bool = False, dirty: str = "auto", written: int = 0
) -> Result:
    """One pass, after one page in `written` was written (0: none)."""
    with memory_of(corpora.fill_random, n_pages=case.n_pages, huge=case.huge) as memory:
        if not kernel:
            with ksmcore.Engine(dirty=dirty) as engine:
                engine.register(memory.maps[0])
                for _ in range(QUIET_SCANS):
                    engine.scan()
                hashed = engine.stats().pages_hashed
                flip(memory, written)
                begun = time.perf_counter()
                engine.scan()
                seconds = time.perf_counter() - begun
                hashed = engine.stats().pages_hashed - hashed
        else:
            kernel_ksm.start_empty()
            kernel_ksm.write("smart_scan", "1" if smart else "0")
            memory.mergeable()
            kernel_ksm.run()
            kernel_ksm.wait_scans(SMART_SCANS if smart else 2)
            flip(memory, written)
            seconds, hashed = kernel_ksm.wait_scans(1), case.n_pages
            kernel_ksm.write("smart_scan", kernel_ksm.FULL_SPEED["smart_scan"])
            kernel_ksm.start_empty()
        flip(memory, written)
        return Result(seconds, hashed)


def flip(memory: Memory, written: int) -> None:
    """Write one page in `written`; a second time, what was there before."""
    if written:
        memory.arrays[0].view(np.uint64)[::written, 0] ^= np.uint64(1)


# ---- what merged memory is like ----------------------------------------------------------------


def access(case: Case, kernel: bool, *, work: Callable[[Pages], object]) -> Result:
    """`work` on memory of one repeated page, merged. The number: nanoseconds it takes for each page
    of memory that is not merged, for `work` "write" of new memory."""
    with memory_of(corpora.fill_repeated, n_pages=case.n_pages) as memory:
        n_pages = case.n_pages
        if work is write_first:
            fresh = mmap.mmap(-1, n_pages * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            fresh.madvise(mmap.MADV_NOHUGEPAGE)
            plain = timed(work, np.frombuffer(fresh, np.uint8).reshape(n_pages, PAGE))
        else:
            plain = timed_merged(work, memory.arrays[0])
        if kernel:
            kernel_ksm.start_empty()
            memory.mergeable()
            kernel_ksm.run()
            n_kept = 2 * -(-n_pages // kernel_ksm.number("max_page_sharing"))
            kernel_ksm.wait_until_saved(n_pages - n_kept, LIMIT_SECONDS)
            kernel_ksm.stop()
            seconds = timed_merged(work, memory.arrays[0])
            kernel_ksm.start_empty()
        else:
            with ksmcore.Engine() as engine:
                engine.dedup(*memory.arrays)
                seconds = timed_merged(work, memory.arrays[0])
        memory.digests = [digest(pages) for pages in memory.arrays]
        return Result(seconds, round(plain / n_pages * 1e9))


def timed_merged(work: Callable[[Pages], object], pages: Pages) -> float:
    """Read once before: that enters the pages into the page table, and does not count."""
    read_all(pages)
    return timed(work, pages)


def timed(work: Callable[[Pages], object], pages: Pages) -> float:
    begun = time.perf_counter()
    work(pages)
    return time.perf_counter() - begun


def read_strided(pages: Pages) -> int:
    """One word of each page, ten times."""
    return sum(int(pages.view(np.uint64)[:, 7].sum()) for _ in range(10))


def write_first(pages: Pages) -> None:
    pages[:, 0] = 1


# ---- growth ------------------------------------------------------------------------------------


def growth(case: Case, kernel: bool) -> Result:
    """The worst case and as many unique pages, case.n_pages in all; ksmcore only. The number: bytes
    of records that it keeps."""

    def fill(pages: Pages) -> None:
        quarter = len(pages) // 4
        corpora.fill_tails(pages[:quarter])
        corpora.fill_random(pages[quarter : 3 * quarter])
        corpora.fill_tails(pages[3 * quarter :])

    with memory_of(fill, n_pages=case.n_pages) as memory, ksmcore.Engine() as engine:
        begun = time.perf_counter()
        engine.dedup(*memory.arrays)
        seconds = time.perf_counter() - begun
        return Result(seconds, engine.stats().metadata_bytes)


# name: (what, goal, what is counted, work, copies of --mib that it holds)
CASES: dict[str, tuple[str, str, str, Work, int]] = {
    "worst": ("two copies; pages differ in their last 8 bytes", ">= 12x", "saved", worst, 2),
    "join": ("a third and a fourth copy join them", ">= 12x", "saved", join, 4),
    "best": ("one repeated page, twice as much", ">= 6x (huge 10x)", "saved", best, 2),
    "mixture": ("unique, pairs, shuffled pairs, zero", ">= 6x", "saved", mixture, 1),
    "idle": ("a pass over unchanged unique pages", "<= 1 ms/GiB", "read", idle, 1),
    "smart": ("the same, smart_scan skipping", "<= 1 ms/GiB", "read", partial(idle, smart=True), 1),
    "checksum": (
        "the same, ksmcore by checksums",
        "<= 1.3 reads",
        "read",
        partial(idle, dirty="checksum"),
        1,
    ),
    "written": (
        f"a pass after one page in {PART_WRITTEN} was written",
        "pages written",
        "read",
        partial(idle, written=PART_WRITTEN),
        1,
    ),
    "strided": (
        "one word of each page of one repeated page",
        ">= 3x of plain",
        "ns",
        partial(access, work=read_strided),
        1,
    ),
    "reading": ("every byte of it", ">= 1x of plain", "ns", partial(access, work=read_all), 1),
    "writing": (
        "the first write to each merged page",
        "<= 1.3 touches",
        "ns",
        partial(access, work=write_first),
        1,
    ),
}
