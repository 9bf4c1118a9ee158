"""Merging: the worst case, the best case, joining what is shared already, and a mixture."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

import ksmcore
from bench import corpora, measure
from bench.corpora import PAGE, Census, Pages
from bench.measure import Kernel, Merged

N = corpora.n_pages_asked()


def dedup(case: Merged) -> ksmcore.PassReport:
    return case.engine.dedup(*case.arrays)


# ---- worst case: two copies of pages that differ only in their last 8 bytes --------------------


@pytest.mark.benchmark(group="worst case")
def test_worst_off_copy(benchmark: BenchmarkFixture) -> None:
    """What a program that wants two copies pays in any case: writing the second."""

    def finish(case: tuple[Pages, Pages], _: None) -> None:
        assert np.array_equal(case[0][-4096:], case[1][-4096:])

    def prepare() -> tuple[Pages, Pages]:
        pages = np.empty((2 * N, PAGE), np.uint8)
        corpora.fill_tails(pages)
        return pages, np.zeros_like(pages)

    measure.run(benchmark, prepare, lambda case: np.copyto(case[1], case[0]), finish)
    measure.record(benchmark, 2 * N)


@pytest.mark.benchmark(group="worst case")
def test_worst_off_estimate(benchmark: BenchmarkFixture) -> None:
    """Reading all and comparing nothing but checksums."""

    def finish(case: Merged, estimate: ksmcore.Estimate) -> None:
        assert estimate.pages_duplicate == N
        assert estimate.pages_distinct == N
        case.check()
        case.close()

    prepare = partial(Merged, corpora.fill_tails, corpora.fill_tails, n_pages=N)
    measure.run(benchmark, prepare, lambda case: case.engine.estimate(*case.arrays), finish)
    measure.record(benchmark, 2 * N)


@pytest.mark.benchmark(group="worst case")
@pytest.mark.parametrize("order", ["digest", "content"])
def test_worst_dedup(benchmark: BenchmarkFixture, order: str) -> None:
    last: list[tuple[Kernel, Kernel]] = []

    def finish(case: Merged, report: ksmcore.PassReport) -> None:
        measure.assert_met(report.pages_scanned, 2 * N)
        after = case.check()
        assert report.pages_merged == 2 * N
        assert report.bytes_saved == N * PAGE
        # The plain figure too: all that the merge needed is small against what it gave back.
        fell = case.before.pss_bytes - after.pss_bytes
        measure.assert_pss(fell, report.bytes_saved)
        last[:] = [(case.before, after)]
        case.close()

    prepare = partial(Merged, corpora.fill_tails, corpora.fill_tails, n_pages=N, order=order)
    measure.run(benchmark, prepare, dedup, finish)
    measure.record(benchmark, 2 * N, *last[0])


# ---- best case: one page, over and over --------------------------------------------------------


@pytest.mark.benchmark(group="best case")
def test_best_off_fill(benchmark: BenchmarkFixture) -> None:
    """Writing such pages for the first time."""

    def finish(case: Pages, _: None) -> None:
        assert (case[-1] == case[0]).all()

    def prepare() -> Pages:
        return np.zeros((N, PAGE), np.uint8)

    measure.run(benchmark, prepare, corpora.fill_repeated, finish)
    measure.record(benchmark, N)


@pytest.mark.benchmark(group="best case")
def test_best_dedup(benchmark: BenchmarkFixture) -> None:
    last: list[tuple[Kernel, Kernel]] = []

    def finish(case: Merged, report: ksmcore.PassReport) -> None:
        measure.assert_met(report.pages_scanned, N)
        after = case.check()
        assert report.pages_merged == N
        # Stretches of one page lie over small blocks of copies, not page by page: n pages over a
        # block of sqrt(n / 16) need 4 sqrt(n) mappings, and while the block grows some more.
        assert after.n_maps - case.before.n_maps < 12 * math.sqrt(N)
        assert report.bytes_saved > 0.95 * N * PAGE
        last[:] = [(case.before, after)]
        case.close()

    prepare = partial(Merged, corpora.fill_repeated, n_pages=N)
    measure.run(benchmark, prepare, dedup, finish)
    before, after = last[0]
    made = after.n_maps - before.n_maps
    measure.record(
        benchmark, N, before, after, f"{made} mappings made, {N / max(made, 1):.0f} pages each"
    )


# ---- join: a third and a fourth copy -----------------------------------------------------------


@pytest.mark.benchmark(group="join")
@pytest.mark.parametrize("order", ["digest", "content"])
def test_join_third_and_fourth(benchmark: BenchmarkFixture, order: str) -> None:
    """Two more copies meet a stable tree that holds all their pages."""
    last: list[tuple[Kernel, Kernel]] = []

    def prepare() -> Merged:
        case = Merged(*[corpora.fill_tails] * 4, n_pages=N, order=order)
        case.engine.dedup(*case.arrays[:2])
        measure.read_all(case.arrays[0])
        case.start()
        return case

    def join(case: Merged) -> list[ksmcore.PassReport]:
        return [case.engine.dedup(pages) for pages in case.arrays[2:]]

    def finish(case: Merged, reports: list[ksmcore.PassReport]) -> None:
        after = case.check()
        for report in reports:
            measure.assert_met(report.pages_scanned, N)
            assert report.bytes_saved == N * PAGE
        assert case.engine.stats().pages_shared == N
        last[:] = [(case.before, after)]
        case.close()

    measure.run(benchmark, prepare, join, finish)
    measure.record(benchmark, 2 * N, *last[0])


# ---- mixture -----------------------------------------------------------------------------------


@pytest.mark.benchmark(group="mixture")
@pytest.mark.parametrize("map_budget", ["auto", 500])
def test_mixture(benchmark: BenchmarkFixture, map_budget: int | str) -> None:
    """Unique pages, pairs in order, pairs shuffled, zero pages; with many mappings and with few."""
    last: list[tuple[Kernel, Kernel, str]] = []
    census: list[Census] = []

    def fill(pages: Pages) -> None:
        census[:] = [corpora.fill_mixture(pages)]

    def finish(case: Merged, report: ksmcore.PassReport) -> None:
        after = case.check()
        stats = case.engine.stats()
        # All rounds of it: with a small budget, dedup goes over the pages more than once.
        measure.assert_met(stats.pages_scanned, N)
        found, spare = report.bytes_saved // PAGE, census[0].n_spare
        left = spare - found
        assert stats.ksm_zero_pages == census[0].n_zero
        assert found >= census[0].n_paired // 2 + census[0].n_zero
        # What was not found lacked a mapping, or its twin did.
        assert left >= 0
        assert left == 0 or report.skipped["map_budget"] > 0
        reasons = {reason for reason, count in report.skipped.items() if count > 0}
        assert reasons <= {"map_budget", "partner"}
        made = after.n_maps - case.before.n_maps
        # A few more: the engine's own views of its store.
        assert made <= stats.maps_allowed + 16
        note = f"{found:,} of {spare:,} found, {made:,} mappings of {stats.maps_allowed:,} allowed"
        last[:] = [(case.before, after, note)]
        case.close()

    prepare = partial(Merged, fill, n_pages=N, map_budget=map_budget)
    measure.run(benchmark, prepare, dedup, finish)
    before, after, note = last[0]
    measure.record(benchmark, N, before, after, note)
