"""What merged memory costs those who use it: reading, the first write, and unmerging."""

from __future__ import annotations

import mmap
from functools import partial

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench import corpora, measure
from bench.corpora import PAGE, Pages
from bench.measure import Kernel, Merged
from ksmcore._kernel import smaps

N = corpora.n_pages_asked()
# So many pages may have mappings of their own, two each, far within the kernel's limit.
N_SCATTERED = min(N, 8192)
STORE = "/memfd:ksmcore-store"


def fill_backwards(pages: Pages) -> None:
    """The pages of fill_tails from last to first: no two neighbours can share one mapping."""
    corpora.fill_tails(pages)
    pages[...] = pages[::-1].copy()


def read_sequential(pages: Pages) -> int:
    return measure.read_all(pages)


def read_strided(pages: Pages) -> int:
    """One word of each page, at the end, where the pages differ."""
    return int(pages.view(np.uint64)[:, -1].sum())


READERS = {"sequential": read_sequential, "strided": read_strided}


def in_store(pages: Pages) -> int:
    """Bytes of an array that are mapped from a store, as the kernel lists its mappings."""
    start = pages.ctypes.data
    end = start + pages.nbytes
    return sum(
        min(vma.end, end) - max(vma.start, start)
        for vma in smaps.vmas_in(start, end)
        if vma.path.startswith(STORE)
    )


def merged(*, scattered: bool = False) -> Merged:
    """Two equal copies, merged; with `scattered` the second in the opposite order."""
    second = fill_backwards if scattered else corpora.fill_tails
    case = Merged(corpora.fill_tails, second, n_pages=N_SCATTERED if scattered else N)
    case.engine.dedup(*case.arrays)
    for pages in case.arrays:
        assert in_store(pages) == pages.nbytes
    return case


def all_read(case: Merged) -> Merged:
    """Let all pages be present, as in a program that uses them."""
    for pages in case.arrays:
        measure.read_all(pages)
    case.start()
    return case


# ---- read --------------------------------------------------------------------------------------


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("memory", ["off, huge pages", "off", "merged"])
def test_read_again(benchmark: BenchmarkFixture, memory: str, reader: str) -> None:
    """Pages that were read before. NumPy asks for huge pages, which merged memory cannot have."""
    benchmark.group = f"read {reader}"
    if memory == "merged":
        case = all_read(merged())
        pages = case.arrays[1]
    else:
        case = None
        pages = np.empty((N, PAGE), np.uint8) if "huge" in memory else fresh(N)
        corpora.fill_tails(pages)
    before = Kernel.now()
    known = READERS[reader](pages)
    assert set(measure.run_again(benchmark, partial(READERS[reader], pages))) == {known}
    measure.record(benchmark, N, before, Kernel.now())
    if case is not None:
        case.close()


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("layout", ["in order", "scattered"])
def test_read_first(benchmark: BenchmarkFixture, layout: str, reader: str) -> None:
    """The first time after the merge: the kernel must look up each page, once."""
    benchmark.group = f"read {reader}"
    n_pages = N_SCATTERED if layout == "scattered" else N
    known = n_pages * (n_pages + 1) // 2

    def finish(case: Merged, read: int) -> None:
        assert reader != "strided" or read == known
        assert read == READERS[reader](case.arrays[0])
        case.close()

    prepare = partial(merged, scattered=layout == "scattered")
    measure.run(benchmark, prepare, lambda case: READERS[reader](case.arrays[1]), finish)
    measure.record(benchmark, n_pages)


# ---- first write -------------------------------------------------------------------------------


def fresh(n_pages: int) -> Pages:
    """New private memory, in pages of the usual size, not touched yet."""
    memory = mmap.mmap(-1, n_pages * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(memory, np.uint8).reshape(n_pages, PAGE)


def write_each(pages: Pages) -> None:
    """One byte into every page."""
    pages[:, 0] = 0xA5


@pytest.mark.benchmark(group="first write")
@pytest.mark.parametrize("memory", ["new", "present"])
def test_first_write_off(benchmark: BenchmarkFixture, memory: str) -> None:
    """Into memory never touched before, and into memory that is there."""
    last: list[tuple[Kernel, Kernel]] = []

    def prepare() -> tuple[Pages, Kernel]:
        pages = fresh(N)
        if memory == "present":
            pages[...] = 1
        return pages, Kernel.now()

    def finish(case: tuple[Pages, Kernel], _: None) -> None:
        pages, before = case
        after = Kernel.now()
        taken = N * PAGE if memory == "new" else 0
        measure.assert_pss(before.pss_bytes - after.pss_bytes, -taken)
        assert (pages[:, 0] == 0xA5).all()
        last[:] = [(before, after)]

    measure.run(benchmark, prepare, lambda case: write_each(case[0]), finish)
    measure.record(benchmark, N, *last[0])


@pytest.mark.benchmark(group="first write")
def test_first_write_merged(benchmark: BenchmarkFixture) -> None:
    """Into merged pages that were read before: each is copied. The twin shows none of it."""
    last: list[tuple[Kernel, Kernel]] = []

    def finish(case: Merged, _: None) -> None:
        after = Kernel.now()
        written, twin = case.arrays
        measure.assert_pss(case.before.pss_bytes - after.pss_bytes, -N * PAGE)
        assert measure.digest(twin) == case.digests[1]
        assert (written[:, 0] == 0xA5).all()
        written[:, 0] = twin[:, 0]
        last[:] = [(case.before, after)]
        case.close()

    measure.run(
        benchmark, lambda: all_read(merged()), lambda case: write_each(case.arrays[0]), finish
    )
    measure.record(benchmark, N, *last[0])


# ---- unmerge -----------------------------------------------------------------------------------


@pytest.mark.benchmark(group="unmerge")
def test_unmerge_off_copy(benchmark: BenchmarkFixture) -> None:
    """A copy of the merged array into new memory: the least that unmerging must do."""

    def finish(case: Merged, copy: Pages) -> None:
        assert measure.digest(copy) == case.digests[0]
        del copy
        case.close()

    def copy_of(case: Merged) -> Pages:
        copy = fresh(N)
        np.copyto(copy, case.arrays[0])
        return copy

    measure.run(benchmark, lambda: all_read(merged()), copy_of, finish)
    measure.record(benchmark, N)


@pytest.mark.benchmark(group="unmerge")
@pytest.mark.parametrize("layout", ["in order", "scattered"])
def test_unmerge_unregister(benchmark: BenchmarkFixture, layout: str) -> None:
    """One of two copies becomes plain memory; the other keeps the store's pages."""
    scattered = layout == "scattered"
    last: list[tuple[Kernel, Kernel]] = []

    def finish(case: Merged, _: None) -> None:
        after = case.check()
        kept, released = case.arrays
        assert in_store(released) == 0
        assert in_store(kept) == kept.nbytes
        last[:] = [(case.before, after)]
        case.close()

    measure.run(
        benchmark,
        lambda: all_read(merged(scattered=scattered)),
        lambda case: case.engine.unregister(case.arrays[1]),
        finish,
    )
    measure.record(benchmark, N_SCATTERED if scattered else N, *last[0])
