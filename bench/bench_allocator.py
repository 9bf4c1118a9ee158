"""What arrays cost under the allocator, and copies that share, against NumPy's own."""

from __future__ import annotations

import statistics
import time
from functools import partial

import numpy as np
import pytest
from numpy.typing import NDArray
from pytest_benchmark.fixture import BenchmarkFixture

import ksmcore
from bench import corpora, measure
from bench.corpora import PAGE
from ksmcore._testing.arena import check_arena, is_here

N_ARRAYS = 10_000
ARRAY_BYTES = 100_000
MIB = 1 << 20
COPY_BYTES = corpora.n_pages_asked() * PAGE


def make(n_bytes: int, value: int) -> NDArray[np.uint8]:
    array = np.empty(n_bytes, np.uint8)
    array.fill(value)
    return array


def all_at_once() -> None:
    kept = [make(ARRAY_BYTES, i % 251) for i in range(N_ARRAYS)]
    del kept


def one_by_one(n_arrays: int = N_ARRAYS, n_bytes: int = ARRAY_BYTES) -> None:
    for i in range(n_arrays):
        make(n_bytes, i % 251)


WORK = {
    "all-at-once": all_at_once,
    "one-by-one": one_by_one,
    **{f"temporary-{n}-mib": partial(one_by_one, 100, n * MIB) for n in (1, 5, 24)},
}


@pytest.mark.benchmark(group="allocator")
@pytest.mark.parametrize("what", WORK)
def test_arrays(benchmark: BenchmarkFixture, what: str) -> None:
    """Every round is of the allocator, and comes after one of NumPy's own: see extra_info."""
    own: list[float] = []

    def begin() -> None:
        ksmcore.uninstall_allocator()
        begun = time.perf_counter()
        WORK[what]()
        own.append(time.perf_counter() - begun)
        ksmcore.install_allocator()
        assert is_here(make(ARRAY_BYTES, 1))

    try:
        benchmark.pedantic(WORK[what], setup=begin, rounds=9, warmup_rounds=1)
    finally:
        ksmcore.uninstall_allocator()
    assert check_arena() == 0
    # The first one was for the warm-up. No statistics with --benchmark-disable.
    numpys = statistics.median(own[1:] or own)
    benchmark.extra_info["numpy_median_s"] = numpys
    if benchmark.stats is not None:
        measure.in_turns.append((what, benchmark.stats.stats.median, numpys))


@pytest.mark.benchmark(group="copy")
@pytest.mark.parametrize("written", ["unwritten", "written"])
@pytest.mark.parametrize("how", ["off", "on"])
def test_copy(benchmark: BenchmarkFixture, how: str, written: str) -> None:
    with ksmcore.Engine() as engine:
        source = engine.array(np.random.default_rng(5).integers(0, 256, COPY_BYTES, np.uint8))
        first = engine.copy(source)
        made: list[NDArray[np.uint8]] = []

        def begin() -> None:
            made.clear()
            if written == "written":
                source[:: 64 * PAGE] += 1

        def copy() -> None:
            made.append(np.copy(source) if how == "off" else engine.copy(source))

        benchmark.pedantic(copy, setup=begin, rounds=7, warmup_rounds=1)
        assert np.array_equal(made[0], source)
        assert np.array_equal(first[1:PAGE], source[1:PAGE])
        made.clear()
        del first
