"""Merged memory is passed over too, whether it was read since or not; no write goes unseen."""

import errno
import mmap

import numpy as np
import pytest

import ksmcore
from helpers.loose import call
from helpers.memory import PAGE, address, octets, random_pages
from ksmcore._testing import faults

N_REGIONS, N_PAGES = 30, 32
# Passes of which one asks with care (see still).
CAREFUL = 8
MANY = 1 << 30

pytestmark = pytest.mark.skipif(
    ksmcore.features()["tracking"] is not None, reason="this kernel finds no pages by itself"
)


def asks_once(engine):
    """Does a pass ask the kernel for pages no more than once?"""
    faults.inject("pagemap_scan", errno.ENOTTY, after=1, count=MANY)
    engine.scan()
    return faults.clear() == MANY


@pytest.fixture
def parts(engine, rng, private_buffer):
    """Arrays side by side, all of them equal, merged and settled."""
    everything = octets(private_buffer(N_REGIONS * N_PAGES)).reshape(N_REGIONS, N_PAGES, PAGE)
    everything[:] = random_pages(rng, N_PAGES).reshape(N_PAGES, PAGE)
    for part in everything:
        engine.register(part)
    engine.dedup()
    for _ in range(2):
        engine.scan()
    assert engine.stats().pages_sharing == (N_REGIONS - 1) * N_PAGES
    return everything


@pytest.mark.parametrize("is_read", [False, True])
def test_a_pass_asks_once_for_all_of_them(engine, parts, is_read):
    if is_read:
        parts.sum()
    assert sum(asks_once(engine) for _ in range(CAREFUL)) == CAREFUL - 1
    assert engine.stats().pages_sharing == (N_REGIONS - 1) * N_PAGES


def test_a_write_is_seen_by_the_next_pass(engine, parts, rng):
    expected = parts.copy()
    for n in range(3 * CAREFUL):
        which = rng.integers(N_REGIONS), rng.integers(N_PAGES)
        broken = engine.stats().cow_breaks
        expected[which] = parts[which] = rng.integers(0, 256, PAGE, dtype=np.uint8)
        engine.scan()
        assert engine.stats().cow_breaks - broken == 1, n
        # Gone back to what it was: in two passes at most it is merged again.
        expected[which] = parts[which] = parts[which[0] - 1, which[1]]
        for _ in range(2):
            engine.scan()
        assert engine.stats().pages_sharing == (N_REGIONS - 1) * N_PAGES
        engine._core.check(are_filed=True)
    assert np.array_equal(parts, expected)


def test_new_memory_in_a_settled_region_is_seen(engine, rng):
    array = engine.zeros((64, PAGE), np.uint8)
    twin = engine.array(random_pages(rng, 1).reshape(1, PAGE))
    for _ in range(3):
        engine.scan()
    assert engine.scan().pages_hashed <= 1
    array[40] = twin[0]
    for _ in range(2):
        engine.scan()
    assert engine.stats().pages_sharing == 1
    assert np.array_equal(array[40], twin[0])


def test_a_copy_that_was_thrown_away_shares_again(engine, parts):
    """The page shows the store then, and the region has nothing private."""
    before = parts[7, 3].copy()
    parts[7, 3] = 1
    engine.scan()
    call("madvise", address(parts[7, 3]), PAGE, mmap.MADV_DONTNEED)
    assert np.array_equal(parts[7, 3], before)
    engine.scan()
    stats = engine.stats()
    assert (stats.pages_sharing, stats.pages_volatile) == ((N_REGIONS - 1) * N_PAGES, 0)
    engine._core.check(are_filed=True)


def test_what_has_no_memory_never_counts_as_scanned(engine, parts):
    assert [engine.scan().pages_scanned for _ in range(2 * CAREFUL)] == [0] * (2 * CAREFUL)
    parts[3:5].sum()
    for _ in range(CAREFUL):
        engine.scan()
    assert engine.scan().pages_scanned == 2 * N_PAGES


def test_a_kernel_that_answers_no_more(engine, parts):
    """Then every page is looked up, as without the question."""
    faults.inject("pagemap_scan", errno.ENOTTY, count=MANY)
    parts[5, 5] = 2
    report = engine.scan()
    faults.clear()
    assert report.pages_hashed == 1
    assert engine.stats().pages_sharing == (N_REGIONS - 1) * N_PAGES - 1
    assert (parts[5, 5] == 2).all()
