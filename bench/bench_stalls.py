"""How long a thread that writes is stalled by the scanner: every guard under the same load.

One C thread (stalls.c) stores at a steady pace into pages that an engine merges again and again,
and takes the time of each store. Some stalls are none of the guard's: a write to a merged page
copies it, and other programs take the processor away. So each store is put down under what the
kernel says happened during it, and the same load runs without merged pages, and without a scanner.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import pytest
from numpy.typing import NDArray
from pytest_benchmark.fixture import BenchmarkFixture

import ksmcore
from bench import measure
from bench.corpora import PAGE, SEED
from ksmcore._core.scopes import GuardScope
from ksmcore._engine import settings

Words = NDArray[np.uint64]

ROUNDS = 3
SECONDS = 1.5
# Few pages, and a store every so often: the writer meets the scanner hundreds of times a second,
# and still leaves pages alone for long enough to be merged.
N = 256
PACE_NS = 400
# The writer goes over so many neighbours at a time: what it leaves behind is merged in runs.
TOGETHER = 64
# The word that the writer changes; the number of the page stands in the last one.
WORD = 8

# Rows of the histograms, in the order of stalls.c.
KINDS = ("nothing", "waited", "copied", "preempted", "interrupted")

NO_MERGE = "no merged pages"
NO_SCANNER = "merged, no scanner"


def guards() -> list[str]:
    """Those that work on this machine."""
    missing = ksmcore.features()
    return [name for name in settings.GUARDS if missing.get(name) is None]


class Library:
    """stalls.c, compiled and loaded."""

    def __init__(self) -> None:
        loaded = measure.load_c("stalls.c", "-O2")
        if loaded is None:
            pytest.skip("no C compiler")
        self.n_buckets = int(loaded.stalls_n_buckets())
        assert int(loaded.stalls_n_kinds()) == len(KINDS)
        bucket_end = loaded.stalls_bucket_end
        bucket_end.restype = ctypes.c_uint64
        bucket_end.argtypes = [ctypes.c_long]
        ends = [bucket_end(bucket) for bucket in range(self.n_buckets)]
        assert ends == sorted(set(ends))
        self.ends_us = np.array(ends, np.float64) / 1000
        self.run = loaded.stalls_run
        self.run.restype = ctypes.c_uint64
        pointer, number, time = ctypes.c_void_p, ctypes.c_long, ctypes.c_uint64
        self.run.argtypes = [
            *(pointer, number, number, number, number),
            *(time, time, time, pointer, pointer, pointer),
        ]


def address(array: NDArray[np.uint64]) -> int:
    assert array.flags.c_contiguous
    return array.ctypes.data


@dataclass
class Tally:
    """The stores of one load under one guard, over all rounds."""

    ends_us: NDArray[np.float64]
    counts: Words = field(init=False)
    longest: Words = field(init=False)
    n_stores: int = 0
    n_passes: int = 0
    n_merged: int = 0
    n_waits: int = 0

    def __post_init__(self) -> None:
        self.counts = np.zeros((len(KINDS), len(self.ends_us)), np.uint64)
        self.longest = np.zeros(len(KINDS), np.uint64)

    def count(self, kind: str) -> int:
        return int(self.counts[KINDS.index(kind)].sum())

    def percentiles_us(self, kind: str | None) -> list[float] | None:
        """Median, 99 % and 99.9 %, and the longest, of the stores of one kind or of all."""
        row = slice(None) if kind is None else slice(KINDS.index(kind), KINDS.index(kind) + 1)
        below = np.cumsum(self.counts[row].sum(axis=0))
        if below[-1] == 0:
            return None
        longest = float(self.longest[row].max()) / 1000
        ranks = [np.ceil(float(below[-1]) * share) for share in (0.5, 0.99, 0.999)]
        found = [float(self.ends_us[np.searchsorted(below, rank)]) for rank in ranks]
        # The end of the last bucket may lie above all that is in it.
        return [*(min(one, longest) for one in found), longest]


# ---- one load ----------------------------------------------------------------------------------


def fill(arrays: list[Words]) -> None:
    """Three copies, all pages of each different: the first two stand still, and hold both values
    that the writer gives the pages of the third."""
    for value, words in enumerate(arrays):
        words[...] = np.arange(PAGE // 8, dtype=np.uint64)
        words[:, WORD] = value % 2
        words[:, -1] = np.arange(len(words), dtype=np.uint64)


@contextlib.contextmanager
def processors_of_their_own() -> Iterator[Callable[[], None]]:
    """Keep this thread off one processor, where there are two; gives what the writer calls to be on
    that one. The kernel puts a thread that was woken next to the one that woke it, and there the
    scanner would stop for the writer most of the time."""
    allowed = os.sched_getaffinity(0)
    last = {max(allowed)}
    try:
        os.sched_setaffinity(0, allowed - last or allowed)
        yield lambda: os.sched_setaffinity(0, last)
    finally:
        os.sched_setaffinity(0, allowed)


def write_and_merge(
    library: Library, arrays: list[Words], scanner: ksmcore.Engine | None, tally: Tally, seed: int
) -> Words:
    """Let the writer run for SECONDS, beside the scanner if there is one. Returns for each page
    what was stored there last."""
    pages = arrays[-1]
    last = pages[:, WORD].copy()

    def write() -> None:
        prepare()
        tally.n_stores += library.run(
            *(address(pages), N, PAGE // 8, WORD, TOGETHER),
            *(seed, int(SECONDS * 1e9), PACE_NS),
            *(address(last), address(tally.counts), address(tally.longest)),
        )

    with contextlib.ExitStack() as stack:
        if scanner is not None:
            # Another pass, which does not end meanwhile, keeps the guard ready: else the end of
            # each waits milliseconds for writers on their way to the handler, without merging.
            idle = stack.enter_context(ksmcore.Engine(guard=scanner.settings.guard))
            stack.enter_context(GuardScope(idle._core))
        prepare = stack.enter_context(processors_of_their_own())
        writer = threading.Thread(target=write)
        writer.start()
        stack.callback(writer.join)
        while scanner is not None and writer.is_alive():
            scanner.dedup()
            tally.n_passes += 1
    return last


def load(library: Library, mode: str, tally: Tally, seed: int) -> None:
    """The load, once: merged pages or none, a scanner or none. Then all bytes must be right."""
    with ksmcore.Engine(guard=mode if mode in settings.GUARDS else "auto") as engine:
        arrays = [engine.empty((N, PAGE // 8), np.uint64) for _ in range(3)]
        fill(arrays)
        known = [words.copy() for words in arrays]
        if mode != NO_MERGE:
            report = engine.dedup()
            measure.assert_met(report.pages_scanned, 3 * N)
            assert report.pages_merged == 2 * N
        before = engine.stats()
        scanner = engine if mode in settings.GUARDS else None
        known[-1][:, WORD] = write_and_merge(library, arrays, scanner, tally, seed)
        after = engine.stats()
        for words, right in zip(arrays, known, strict=True):
            assert np.array_equal(words, right)
        engine._core.check()
    for words, right in zip(arrays, known, strict=True):
        assert np.array_equal(words, right)
    tally.n_merged += after.pages_merged - before.pages_merged
    tally.n_waits += after.guard_waits - before.guard_waits


def check(mode: str, tally: Tally) -> None:
    """The load was what it should be. Of times nothing is asked: they are the machine's."""
    assert int(tally.counts.sum()) == tally.n_stores > ROUNDS * N
    if mode in settings.GUARDS:
        # Pages came back: each was merged, written, and merged again, more than once.
        assert tally.n_passes > ROUNDS
        assert tally.n_merged > ROUNDS * N
    else:
        assert tally.n_merged == tally.n_passes == tally.n_waits == 0
    if mode != NO_MERGE:
        assert tally.count("copied") > 0


# ---- the table ---------------------------------------------------------------------------------


class Summary:
    """A plugin that prints the table when pytest prints its own."""

    def __init__(self, tallies: dict[str, Tally]) -> None:
        self.tallies = tallies

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.section("stores into pages that are merged meanwhile, in microseconds")
        for line in table(self.tallies):
            terminalreporter.write_line(line)


def table(tallies: dict[str, Tally]) -> list[str]:
    titles = "".join(f"{title:>10}" for title in ("p50", "p99", "p99.9", "max"))
    lines = [f"{'guard':<20}{'during the store':<18}{'stores':>11}{titles}"]
    for mode, tally in tallies.items():
        for kind in (None, *KINDS[1:]):
            figures = tally.percentiles_us(kind)
            if figures is None:
                continue
            name = mode if kind is None else ""
            n_stores = tally.n_stores if kind is None else tally.count(kind)
            texts = "".join(f"{value:>10.2f}" for value in figures)
            lines.append(f"{name:<20}{kind or '(all stores)':<18}{n_stores:>11,}{texts}")
        if tally.n_passes:
            lines.append(
                f"{'':<20}{tally.n_passes:,} passes, {tally.n_merged:,} pages merged; "
                f"{tally.n_waits:,} waits by the guard's own count"
            )
    return lines


# ---- the benchmark -----------------------------------------------------------------------------


@pytest.mark.benchmark(group="stalls")
def test_stalls(
    benchmark: BenchmarkFixture,
    request: pytest.FixtureRequest,
) -> None:
    """Its time is that of all the loads, which is set, and tells nothing; the table tells."""
    library = Library()
    tallies = {mode: Tally(library.ends_us) for mode in (NO_MERGE, NO_SCANNER, *guards())}
    seeds = iter(range(SEED, SEED + ROUNDS))

    def one_round() -> None:
        # In turn, so that a busy minute of the machine falls upon all of them. The seed is the same
        # for all, so they begin with the same pages.
        seed = next(seeds)
        for mode, tally in tallies.items():
            load(library, mode, tally, seed)

    pedantic = cast(Callable[..., None], benchmark.pedantic)
    pedantic(one_round, rounds=ROUNDS)
    for mode, tally in tallies.items():
        check(mode, tally)
        benchmark.extra_info[mode] = {
            kind: tally.percentiles_us(None if kind == "all" else kind) for kind in ("all", *KINDS)
        }
    request.config.pluginmanager.register(Summary(tallies), "ksmcore-bench-stalls")
