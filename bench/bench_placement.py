"""Placement: how many mappings a saving takes, by the order in which equal pages lie.

One mapping serves a run of pages that are neighbours in memory and in the store. The store is
filled in the order of the scan, so one of two copies always lies in runs; what the other needs
depends on its order.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench import corpora, measure
from bench.corpora import PAGE, SEED, Pages
from bench.measure import Merged

# Two mappings each, far within the kernel's limit.
N = min(corpora.n_pages_asked(), 8192)
PIECE = 64


def in_order(pages: Pages) -> Pages:
    return pages


def rotated(pages: Pages) -> Pages:
    """The same stretch, begun in its middle."""
    return np.roll(pages, len(pages) // 2, axis=0)


def in_pieces(pages: Pages) -> Pages:
    """Pieces of 64 pages, in random order."""
    order = np.random.Generator(np.random.SFC64(SEED)).permutation(len(pages) // PIECE)
    return pages.reshape(-1, PIECE, PAGE)[order].reshape(-1, PAGE)


def backwards(pages: Pages) -> Pages:
    return pages[::-1]


def shuffled(pages: Pages) -> Pages:
    return pages[np.random.Generator(np.random.SFC64(SEED)).permutation(len(pages))]


# Layout: (how the second copy lies, most mappings that the merge may make). A page that follows
# another one than in the first copy needs a mapping of its own. Some are for what a process has
# once, and gets with its first pass: threads, their stacks and heaps.
LAYOUTS: dict[str, tuple[Callable[[Pages], Pages], int]] = {
    "in order": (in_order, 14),
    "rotated": (rotated, 16),
    "in pieces": (in_pieces, 3 * N // PIECE + 14),
    "backwards": (backwards, N + 14),
    "shuffled": (shuffled, N + 14),
}


def copies(layout: Callable[[Pages], Pages]) -> Merged:
    def second(pages: Pages) -> None:
        corpora.fill_random(pages)
        pages[...] = layout(pages.copy())

    return Merged(corpora.fill_random, second, n_pages=N)


def record_maps(benchmark: BenchmarkFixture, case: Merged, after: measure.Kernel) -> int:
    made = after.n_maps - case.before.n_maps
    mib = N * PAGE / 2**20
    note = f"{made} mappings made, {made / mib:.2f} for each MiB saved"
    benchmark.extra_info["maps_per_mib_saved"] = made / mib
    measure.record(benchmark, 2 * N, case.before, after, note)
    return made


@pytest.mark.benchmark(group="placement")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_placement(benchmark: BenchmarkFixture, layout: str) -> None:
    order, most = LAYOUTS[layout]
    last: list[tuple[Merged, measure.Kernel]] = []

    def finish(case: Merged, _: object) -> None:
        after = case.check()
        assert case.engine.stats().pages_sharing == N
        assert after.n_maps - case.before.n_maps <= most
        last[:] = [(case, after)]
        case.close()

    measure.run(
        benchmark, partial(copies, order), lambda case: case.engine.dedup(*case.arrays), finish
    )
    record_maps(benchmark, *last[0])


@pytest.mark.benchmark(group="placement")
def test_placement_rewritten(benchmark: BenchmarkFixture) -> None:
    """Every 16th merged page is written, and later holds what it held before: the runs are whole
    again, without a mapping made."""
    last: list[tuple[Merged, measure.Kernel]] = []

    def prepare() -> Merged:
        case = copies(in_order)
        case.engine.dedup(*case.arrays)
        n_maps = measure.Kernel.now().n_maps
        first, second = case.arrays
        second[::16] = 1
        for _ in range(3):
            case.engine.scan()
        assert case.engine.stats().cow_breaks == len(second[::16])
        second[::16] = first[::16]
        case.n_maps_merged = n_maps
        return case

    def scans(case: Merged) -> None:
        for _ in range(2):
            case.engine.scan()

    def finish(case: Merged, _: None) -> None:
        after = case.check()
        assert case.engine.stats().pages_sharing == N
        # The pages that were written were equal meanwhile, so they shared another page.
        assert after.n_maps - case.n_maps_merged <= 8
        last[:] = [(case, after)]
        case.close()

    measure.run(benchmark, prepare, scans, finish)
    record_maps(benchmark, *last[0])
