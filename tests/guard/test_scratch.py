"""What windows have moved away is given up a lot at once, and all of it when a pass ends."""

import errno

import numpy as np
import pytest

import ksmcore
from helpers.memory import PAGE, random_pages
from ksmcore._core.scopes import GuardScope
from ksmcore._kernel import procfs
from ksmcore._testing import faults

MOVES = ksmcore.features()["pinned"]

pytestmark = pytest.mark.skipif(MOVES is not None, reason=str(MOVES))
SCRATCH_PAGES = 512


@pytest.fixture
def engine():
    with ksmcore.Engine(guard="userfaultfd") as engine:
        engine.dedup(engine.array(2 * [b"warm" * (PAGE // 4)]))  # its own memory exists now
        yield engine


def some_pages(rng, n_pages: int) -> np.ndarray:
    return random_pages(rng, n_pages).reshape(n_pages, PAGE)


def anonymous_pages() -> int:
    """Of this process, as the kernel finds them in its page tables."""
    return procfs.sizes_of("/proc/self/smaps_rollup")["Anonymous"] // PAGE


def in_runs(rng, pages: np.ndarray) -> np.ndarray:
    """The same pages, in runs of 1 to 100 with a strange one after each: windows of all sizes."""
    rows, at = [], 0
    while at < len(pages):
        n = int(rng.integers(1, 101))
        rows += [pages[at : at + n], some_pages(rng, 1)]
        at += n
    return np.concatenate(rows)


def test_nothing_is_left_behind(engine, rng):
    """Though the windows of a pass fill the scratch many times, and never to its end."""
    source = some_pages(rng, 8 * SCRATCH_PAGES)
    scattered = in_runs(rng, source)
    a, b = engine.array(source), engine.array(scattered)
    # The guard is not left meanwhile, which would give up all that it has.
    with GuardScope(engine._core):
        before = anonymous_pages()
        report = engine.dedup(a, b)
        after = anonymous_pages()
    n_shared = report.bytes_saved // PAGE
    assert n_shared > 7 * SCRATCH_PAGES
    # Both had each of these pages for themselves. What records take of it is little.
    assert after <= before - 2 * n_shared + SCRATCH_PAGES // 4
    assert np.array_equal(a, source)
    assert np.array_equal(b, scattered)
    engine._core.check()


def test_scattered_pages_do_not_cost_a_call_each(engine, rng):
    """Single pages, each with a mapping of its own."""
    source = some_pages(rng, 2 * SCRATCH_PAGES)
    a = engine.array(source)
    b = engine.array(np.ascontiguousarray(source[::-1]))
    faults.inject("madvise", errno.ENOMEM, after=1 << 20)
    assert engine.dedup(a, b).bytes_saved == a.nbytes
    n_calls = (1 << 20) - faults.to_succeed("madvise")
    faults.clear()
    assert n_calls < SCRATCH_PAGES // 8
    assert np.array_equal(a, source)
    assert np.array_equal(b, source[::-1])


@pytest.mark.skipif(
    "[always]" in procfs.text_of("/sys/kernel/mm/transparent_hugepage/enabled"),
    reason="huge pages are given up by another call",
)
@pytest.mark.parametrize("n_failures", [4, 10**6])
def test_what_cannot_be_given_up_is_tried_again(engine, rng, n_failures):
    """Nobody misses what is in the scratch; while it is full it takes no more pages."""
    source = some_pages(rng, 4 * SCRATCH_PAGES)
    a, b = engine.array(source), engine.array(source)
    before = anonymous_pages()
    faults.inject("madvise", errno.EAGAIN, count=n_failures)
    with GuardScope(engine._core):
        report = engine.dedup(a, b)
        faults.clear()
        # Three of the calls are advice for the scratch itself.
        assert 0 < report.skipped["refused"] < a.nbytes // PAGE * 2
        engine._core.check()
        engine.dedup(a, b)
        after = anonymous_pages()
    assert engine.stats().bytes_saved == a.nbytes
    assert after <= before - 2 * len(source) + SCRATCH_PAGES // 4
    assert np.array_equal(a, source)
    assert np.array_equal(b, source)
    a[:] += 1
    assert np.array_equal(b, source)
