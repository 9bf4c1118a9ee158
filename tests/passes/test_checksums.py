"""Pages with one checksum are told apart, and what joins a shared page is compared once."""

import numpy as np
import pytest

import ksmcore
from helpers.memory import PAGE, extent, octets, random_pages
from ksmcore import _pages
from ksmcore._kernel import smaps

N_TWINS = 300
# Neighbours with one checksum are first taken for a stretch of one page, which gets copies: twins
# may lie over two of them.
N_FOUND = N_TWINS - 3


def rotated(words, n_bits):
    return (words << np.uint32(n_bits)) | (words >> np.uint32(32 - n_bits))


def mixed(a, b, c):
    """The step of lookup3 between two blocks of three words. It can be undone: whatever a first
    block was, there is a second one that leads to the same state."""
    for n_first, n_second, n_third in ((4, 6, 8), (16, 19, 4)):
        a = (a - c) ^ rotated(c, n_first)
        c = c + b
        b = (b - a) ^ rotated(a, n_second)
        a = a + c
        c = (c - b) ^ rotated(b, n_third)
        b = b + a
    return a, b, c


def pages_of_one_checksum(rng, n_pages):
    """So many different pages, all with the checksum of the first."""
    pages = np.tile(random_pages(rng, 1).view(np.uint32), (n_pages, 1))
    pages[:, 0] = np.arange(n_pages)
    begin = np.uint32((0xDEADBEEF + PAGE + 17) & 0xFFFFFFFF)
    states = mixed(*(begin + pages[:, k] for k in range(3)))
    for k in range(3):
        pages[:, 3 + k] += states[k][0] - states[k]
    found = pages.view(np.uint8)
    assert len(set(_pages.checksum_many(found.data, PAGE))) == 1
    return found


def compares(engine):
    return engine._core.snapshot()["page_compares"]


@pytest.fixture
def twins(rng):
    pages = pages_of_one_checksum(rng, N_TWINS)
    return pages[rng.permutation(np.repeat(np.arange(N_TWINS), 2))]


def test_all_twins_are_found_at_once(engine, twins):
    pages = engine.array(twins)
    engine.dedup()
    engine._core.check(are_filed=True)
    assert engine.stats().pages_sharing >= N_FOUND
    assert np.array_equal(pages, twins)


def test_all_twins_are_found_by_the_second_pass(engine, twins):
    pages = engine.array(twins)
    engine.scan()
    engine.scan()
    engine._core.check(are_filed=True)
    assert engine.stats().pages_sharing >= N_FOUND
    assert np.array_equal(pages, twins)


def test_a_page_is_doubted_once(engine, rng):
    """Pages that have the checksum of a shared page, and are equal to none: the first pass costs
    windows that fail, and no later one."""
    source = pages_of_one_checksum(rng, 3000)
    shared = [engine.array(source[0]) for _ in range(2)]
    engine.dedup()
    assert engine.stats().pages_sharing == 1
    pages = engine.array(source)
    report = engine.dedup()
    assert 2000 < report.skipped["changed"] <= len(source)
    before = compares(engine)
    report = engine.dedup()
    engine._core.check(are_filed=True)
    assert report.skipped["changed"] == 0
    # A tree of 3,000 nodes is no higher than 24, and three are searched for a page.
    assert compares(engine) - before <= 3 * 24 * len(source)
    assert np.array_equal(pages, source)
    assert all(np.array_equal(one, source[0]) for one in shared)


def test_a_new_page_that_is_doubted_waits_as_every_new_page_does(engine, rng):
    source = pages_of_one_checksum(rng, 3)
    shared = [engine.array(source[0]) for _ in range(2)]
    engine.dedup()
    twins = [engine.array(source[k]) for k in (1, 2, 1, 2)]
    report = engine.scan()
    assert report.skipped["changed"] == 4
    assert engine.stats().pages_volatile == 4
    engine.scan()
    assert engine.stats().pages_sharing == 3
    assert all(np.array_equal(twin, source[k]) for twin, k in zip(twins, (1, 2, 1, 2), strict=True))
    assert all(np.array_equal(one, source[0]) for one in shared)


def test_who_joins_a_shared_page_is_compared_by_the_guard_alone(engine, rng):
    source = random_pages(rng, 500).reshape(-1, PAGE)
    arrays = [engine.array(source) for _ in range(2)]
    engine.dedup()
    before = compares(engine)
    arrays += [engine.array(source) for _ in range(2)]
    engine.dedup()
    assert engine.stats().pages_sharing == 3 * len(source)
    assert compares(engine) == before
    assert all(np.array_equal(pages, source) for pages in arrays)


def test_different_pages_of_one_checksum_cost_no_mapping(engine, rng):
    """However many of them there are, in memory where nothing is equal."""
    pairs = np.concatenate([pages_of_one_checksum(rng, 2) for _ in range(200)])
    source = pairs[rng.permutation(len(pairs))]
    pages = engine.array(source)
    engine.dedup()
    stats = engine.stats()
    assert (stats.pages_unshared, stats.pages_shared, stats.pages_sharing) == (400, 0, 0)
    assert len(smaps.vmas_in(*extent(pages))) == 1
    assert np.array_equal(pages, source)


@pytest.mark.parametrize("every", [1, 2, 7, 50])
@pytest.mark.parametrize("at_once", [True, False])
def test_a_copy_with_other_bytes_of_one_checksum(engine, rng, every, at_once):
    """Not even beside pages that are equal does a checksum tell that two pages are: that of the
    other may be long out of date, and each wrong guess of so many would leave pieces."""
    n_pages = 210
    source = random_pages(rng, n_pages).reshape(n_pages, PAGE)
    pretended = source.copy()
    wrong = np.arange(0, n_pages, every)
    for k in wrong:
        source[k], pretended[k] = pages_of_one_checksum(rng, 2)
    one, other = engine.array(source), engine.array(pretended)
    for _ in range(3):
        report = engine.dedup() if at_once else engine.scan()
        engine._core.check(are_filed=True)
        assert report.skipped["changed"] == 0
    stats = engine.stats()
    assert stats.pages_sharing == n_pages - len(wrong)
    assert stats.pages_unshared == 2 * len(wrong)
    assert np.array_equal(one, source)
    assert np.array_equal(other, pretended)


def test_in_content_order_bytes_decide(twins):
    with ksmcore.Engine(order="content") as engine:
        pages = engine.array(twins)
        assert engine.dedup().skipped["changed"] == 0
        engine._core.check(are_filed=True)
        assert engine.stats().pages_sharing == N_TWINS
        assert np.array_equal(pages, twins)


# ---- stretches of one page that go on from span to span ------------------------------------------

SPAN = 512


def hashed_by(engine, pages):
    engine.register(pages)
    return engine.dedup().pages_hashed


def test_a_long_stretch_is_read_by_the_guard_alone(engine, private_buffer):
    pages = octets(private_buffer(8 * SPAN)).reshape(-1, PAGE)
    pages[:] = 7
    assert hashed_by(engine, pages) <= 2 * SPAN
    engine._core.check(are_filed=True)
    stats = engine.stats()
    assert stats.pages_shared + stats.pages_sharing == len(pages)
    assert (pages == 7).all()


def test_what_the_map_budget_left_out_is_a_stretch_all_the_same(private_buffer):
    pages = octets(private_buffer(8 * SPAN)).reshape(-1, PAGE)
    pages[:] = 7
    with ksmcore.Engine(map_budget=0) as engine:
        engine.register(pages)
        assert engine.dedup().skipped["map_budget"] == len(pages)
        engine.configure(map_budget=2000)
        engine.dedup()
        stats = engine.stats()
        assert stats.pages_shared + stats.pages_sharing == len(pages)
        assert stats.maps_used < len(pages) // 8
        engine._core.check(are_filed=True)
        assert (pages == 7).all()


@pytest.mark.parametrize("immediate", [True, False])
def test_pages_that_only_begin_and_end_like_the_stretch(engine, private_buffer, rng, immediate):
    """What differs in the middle is told apart, and the stretch beside it is merged."""
    pages = octets(private_buffer(8 * SPAN)).reshape(-1, PAGE)
    pages[:] = 7
    differ = 2 * SPAN + rng.permutation(3 * SPAN)
    pages[differ, 2000] = 100 + np.arange(len(differ)) % 100
    pages[differ, 3000] = 50 + np.arange(len(differ)) // 200
    expected = pages.copy()
    engine.register(pages)
    if immediate:
        report = engine.dedup()
        assert 0 < report.skipped["changed"] <= SPAN
    else:
        for _ in range(3):
            engine.scan()
    engine._core.check(are_filed=True)
    stats = engine.stats()
    n_kept = len(np.unique(expected[:, [2000, 3000]], axis=0))
    assert stats.pages_shared + stats.pages_sharing + stats.pages_unshared == len(pages)
    # Stretches get some copies.
    assert n_kept <= stats.pages_shared + stats.pages_unshared <= n_kept + 200
    assert np.array_equal(pages, expected)


def test_what_is_filed_is_no_guess_where_sharers_are_bounded(private_buffer):
    pages = octets(private_buffer(8 * SPAN)).reshape(-1, PAGE)
    pages[:] = 7
    pages[3 * SPAN :, 2000] = 8
    with ksmcore.Engine(max_page_sharing=16) as engine:
        assert hashed_by(engine, pages) >= len(pages)
        engine._core.check(are_filed=True)
        assert (pages[3 * SPAN :, 2000] == 8).all()
