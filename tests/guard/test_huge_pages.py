"""Huge pages: dealt with as a whole where the whole is merged, kept where nothing is."""

import errno
import mmap
import threading

import numpy as np
import pytest

import ksmcore
from helpers.forks import THREADS_RUN, Child
from helpers.memory import PAGE, private_memory
from ksmcore._engine.settings import GUARDS
from ksmcore._kernel.smaps import Snapshot
from ksmcore._testing import faults, hooks, pagemap

HUGE = 2 << 20
N = HUGE // PAGE
IS_HUGE = 32

pytestmark = pytest.mark.skipif(
    PAGE != 4096 or ksmcore.features()["tracking"] is not None,
    reason="huge pages cannot be told here",
)


@pytest.fixture(params=[name for name in GUARDS if ksmcore.features()[name] is None])
def engine(request):
    with ksmcore.Engine(guard=request.param) as engine:
        yield engine


def huge_memory(n_blocks):
    """(rows of pages, the mapping under them), backed by huge pages, or the test is skipped."""
    memory = private_memory((n_blocks + 1) * N)
    memory.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(memory, np.int64)
    skip = -whole.ctypes.data % HUGE // 8
    rows = whole[skip : skip + n_blocks * HUGE // 8].reshape(-1, PAGE // 8)
    rows[::N] = 1
    if n_huge(rows) != n_blocks:
        pytest.skip("no huge pages to be had here")
    return rows


def n_huge(rows):
    """Huge pages that are mapped as such: asked of the kernel."""
    ranges = pagemap.survey(rows.ctypes.data, len(rows), False)
    return sum(n for _, n, flags in ranges if flags & IS_HUGE) // N


def test_pairs_of_huge_pages(engine, rng):
    a, b = huge_memory(3), huge_memory(3)
    content = rng.integers(0, 2**62, a.shape, dtype=np.int64)
    a[:] = b[:] = content
    assert engine.dedup(a, b).pages_merged == 6 * N
    assert n_huge(a) == n_huge(b) == 0
    assert np.array_equal(a, content)
    assert np.array_equal(b, content)
    a[7] = 7
    content[7] = 7
    assert np.array_equal(a, content)
    assert not np.array_equal(b[7], content[7])
    engine._core.check()


def test_one_page_of_a_huge_page_differs(engine, rng):
    a, b = huge_memory(2), huge_memory(2)
    content = rng.integers(0, 2**62, a.shape, dtype=np.int64)
    a[:] = b[:] = content
    b[100, 3] += 1
    b[N + 5, 4] += 1
    assert engine.dedup(a, b).pages_merged == 2 * (2 * N - 2)
    assert np.array_equal(a, content)
    content[100, 3] += 1
    content[N + 5, 4] += 1
    assert np.array_equal(b, content)
    engine._core.check()


@pytest.mark.filterwarnings(THREADS_RUN)
@pytest.mark.parametrize("who", ["parent", "child"])
def test_what_a_fork_left_of_huge_pages_is_merged(engine, rng, who):
    """Whoever writes to the first page has it anew, and the huge page is in pieces."""
    a, b = huge_memory(2), huge_memory(2)
    content = rng.integers(0, 2**62, a.shape, dtype=np.int64)
    a[:] = b[:] = content

    def write(parts):
        for rows in (a, b):
            for block in range(2):
                rows[block * N : (block + 1) * N][parts, 1] = content[0, 0]

    def work(pause) -> None:
        if who == "child":
            write(slice(1))
        pause()

    # Whoever writes does so while the other one has the pages, too.
    with Child(work) as child:
        child.paused()
        if who == "parent":
            write(slice(1))
        child.end()
    write(slice(None))
    content[:, 1] = content[0, 0]
    assert engine.dedup(a, b).skipped["pinned"] == 0
    assert engine.stats().pages_sharing == 2 * N
    assert np.array_equal(a, content)
    assert np.array_equal(b, content)
    engine._core.check()


def test_a_long_stretch_lies_over_a_block_as_long_as_a_huge_page(engine):
    rows = huge_memory(48)
    rows[:] = 5
    report = engine.dedup(rows)
    assert report.pages_merged == 48 * N
    assert engine.stats().pages_shared < 1100
    assert (rows == 5).all()
    rows[::1000, 9] = 6
    assert (rows[::1000, 9] == 6).all()
    assert (rows[1::1000] == 5).all()
    engine._core.check()


def test_written_between_checksum_and_window(engine, rng):
    """Pages that differ in the window go back, and the huge page with them is one no more."""
    a, b = huge_memory(4), huge_memory(4)
    content = rng.integers(0, 2**62, a.shape, dtype=np.int64)
    a[:] = b[:] = content
    stop = threading.Event()
    counts = np.zeros(4 * N, np.int64)

    def write():
        n = 0
        while not stop.is_set():
            n += 1
            row = n * 37 % (4 * N)
            b[row, 11] += 1
            counts[row] += 1

    writer = threading.Thread(target=write)
    writer.start()
    for _ in range(20):
        engine.scan()
    stop.set()
    writer.join()
    content_of_b = content.copy()
    content_of_b[:, 11] += counts
    assert np.array_equal(a, content)
    assert np.array_equal(b, content_of_b)
    engine._core.check()


@pytest.mark.parametrize("call", ["mmap", "uffd_move", "uffd_register", "madvise"])
@pytest.mark.parametrize("after", range(1, 9))
def test_calls_that_fail(engine, rng, call, after):
    a, b = huge_memory(2), huge_memory(2)
    content = rng.integers(0, 2**62, a.shape, dtype=np.int64)
    a[:] = b[:] = content
    engine.register(a)
    engine.register(b)
    faults.inject(call, errno.ENOMEM, after=after)
    engine.dedup()
    faults.clear()
    assert np.array_equal(a, content)
    assert np.array_equal(b, content)
    engine.dedup()
    assert engine.stats().pages_sharing == 2 * N
    engine._core.check()


def test_huge_pages_that_are_not_merged_stay(engine, rng):
    rows = huge_memory(3)
    rows[:] = rng.integers(0, 2**62, rows.shape, dtype=np.int64)
    engine.register(rows)
    for _ in range(5):
        engine.scan()
    assert n_huge(rows) == 3
    stats = engine.stats()
    if stats.dirty == "pagemap":
        # Protected as they are, and not read again.
        assert stats.pages_quiet == 3 * N
        assert pagemap.survey(rows.ctypes.data, 3 * N, True) == []


def test_a_huge_page_that_is_never_quiet_as_a_whole_is_not_split(engine, rng):
    rows = huge_memory(2)
    rows[:] = rng.integers(0, 2**62, rows.shape, dtype=np.int64)
    engine.register(rows)
    for i in range(8):
        rows[3, 3] = i
        rows[N + 100, 3] = -i
        engine.scan()
    assert n_huge(rows) == 2


@pytest.fixture
def huge_files():
    """Stores take it that the kernel gives memory files huge pages."""
    hooks.tell_huge(1)
    yield
    hooks.tell_huge(-1)


def test_huge_pages_stay_aligned_where_files_may_have_them(huge_files, engine, rng):
    others = engine.empty((7, PAGE), np.uint8)
    others[:] = rng.integers(0, 256, (1, PAGE), dtype=np.uint8)
    engine.dedup()
    a, b = huge_memory(3), huge_memory(3)
    a[:] = b[:] = rng.integers(0, 2**62, a.shape, dtype=np.int64)
    assert engine.dedup(a, b).pages_merged == 6 * N
    for rows in (a, b):
        start = rows.ctypes.data
        mappings = list(Snapshot().vmas_in(start, start + rows.nbytes))
        assert mappings
        for mapping in mappings:
            assert (max(mapping.start, start) - start) % HUGE == (
                mapping.offset + max(start - mapping.start, 0)
            ) % HUGE
    engine._core.check()
