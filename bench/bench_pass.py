"""Passes that find nothing new, and the checksum that they and all others rest on."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import mmh3
import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench import corpora, measure
from bench.corpora import PAGE, Pages
from bench.measure import Merged
from ksmcore import _pages

N = corpora.n_pages_asked()
INITVAL = 17


# ---- idle: nothing changed since the last pass -------------------------------------------------


@pytest.mark.benchmark(group="idle")
def test_idle_off_read(benchmark: BenchmarkFixture) -> None:
    """Reading the memory once, for scale."""
    pages: Pages = np.empty((N, PAGE), np.uint8)
    corpora.fill_random(pages)
    known = measure.read_all(pages)
    assert set(measure.run_again(benchmark, partial(measure.read_all, pages))) == {known}
    measure.record(benchmark, N)


@pytest.mark.benchmark(group="idle")
@pytest.mark.parametrize("state", ["unique", "merged"])
def test_idle_scan(benchmark: BenchmarkFixture, state: str) -> None:
    """The third and further passes, over pages that equal no other, and over merged pages."""
    if state == "unique":
        case = Merged(corpora.fill_random, n_pages=N)
    else:
        case = Merged(corpora.fill_tails, corpora.fill_tails, n_pages=N // 2)
    # The first pass takes checksums, the second finds them unchanged and merges.
    for _ in range(2):
        case.engine.scan()
    stats = case.engine.stats()
    assert (stats.pages_unshared, stats.pages_sharing) == (
        (N, 0) if state == "unique" else (0, N // 2)
    )
    for pages in case.arrays:
        measure.read_all(pages)
    case.start()
    for report in measure.run_again(benchmark, case.engine.scan):
        assert report.pages_scanned == N
        assert report.pages_merged == report.cow_breaks == report.bytes_saved == 0
    after = case.check()
    assert after.n_maps == case.before.n_maps
    measure.record(benchmark, N, case.before, after)
    case.close()


# ---- checksum ----------------------------------------------------------------------------------


@pytest.mark.benchmark(group="checksum")
def test_checksum_off_memcpy(benchmark: BenchmarkFixture) -> None:
    """Copying the pages to memory that is there: bound by memory, as a good checksum should be."""
    pages = random_pages()
    copy = np.zeros_like(pages)
    measure.run_again(benchmark, partial(np.copyto, copy, pages))
    assert np.array_equal(copy, pages)
    measure.record(benchmark, N)


@pytest.mark.benchmark(group="checksum")
@pytest.mark.parametrize("kernel", _pages.kernels())
def test_checksum_jhash(benchmark: BenchmarkFixture, kernel: str) -> None:
    check_sums(
        benchmark,
        lambda pages: _pages.jhash_many(pages, PAGE, kernel=kernel),
        lambda page: _pages.jhash(page, INITVAL),
    )


@pytest.mark.benchmark(group="checksum")
def test_checksum_mmh3(benchmark: BenchmarkFixture) -> None:
    check_sums(
        benchmark,
        lambda pages: _pages.checksum_many(pages, PAGE, "mmh3"),
        lambda page: int.from_bytes(mmh3.mmh3_x64_128_digest(page)[:4], "little"),
    )


def random_pages() -> Pages:
    pages: Pages = np.empty((N, PAGE), np.uint8)
    corpora.fill_random(pages)
    return pages


def check_sums(
    benchmark: BenchmarkFixture,
    many: Callable[[memoryview], list[int]],
    one: Callable[[memoryview], int],
) -> None:
    """Time `many` over all pages; a sample of its sums, the last included, is what `one` says."""
    pages = random_pages()
    sums, *others = measure.run_again(benchmark, partial(many, pages.reshape(-1).data))
    assert len(sums) == N
    assert all(other == sums for other in others)
    for number in (*range(0, N, 97), N - 1):
        assert sums[number] == one(pages[number].data)
    measure.record(benchmark, N)
