"""What arrays cost under the allocator, and copies that share, against NumPy's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
from numpy.typing import NDArray
from pytest_benchmark.fixture import BenchmarkFixture

import ksmcore
from bench import corpora
from bench.corpora import PAGE
from ksmcore import _arena
from ksmcore.allocators import is_here

N_ARRAYS = 10_000
ARRAY_BYTES = 100_000
MIB = 1 << 20
COPY_BYTES = corpora.n_pages_asked() * PAGE


@pytest.fixture(params=["off", "on"])
def is_on(request: pytest.FixtureRequest) -> Iterator[bool]:
    """With the allocator, or without it."""
    if request.param == "on":
        ksmcore.install_allocator()
    yield request.param == "on"
    ksmcore.uninstall_allocator()
    assert _arena.check() == 0


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


@pytest.mark.benchmark(group="allocator")
@pytest.mark.parametrize(
    "work",
    [
        pytest.param(all_at_once, id="all-at-once"),
        pytest.param(one_by_one, id="one-by-one"),
        *(
            pytest.param(lambda n=n: one_by_one(100, n * MIB), id=f"temporary-{n}-mib")
            for n in (1, 5, 24)
        ),
    ],
)
def test_arrays(benchmark: BenchmarkFixture, is_on: bool, work: Callable[[], None]) -> None:
    probe = make(ARRAY_BYTES, 1)
    assert is_here(probe) == is_on
    benchmark.pedantic(work, rounds=7, warmup_rounds=1)


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
