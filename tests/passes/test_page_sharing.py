"""max_page_sharing: never more pages on one shared page than were asked for, and none left over."""

import errno

import numpy as np
import pytest

import ksmcore
from helpers.kernels_view import store_mappings
from helpers.memory import PAGE, extent
from ksmcore import Settings
from ksmcore._testing import faults


def most_on_one_slot(engine, arrays):
    """Asked of the kernel: how often the page of the store that is mapped most often is mapped."""
    counts = {}
    for array in arrays:
        start, end = extent(array)
        for vma in store_mappings(start, end):
            first, stop = max(vma.start, start), min(vma.end, end)
            slot = (vma.offset + first - vma.start) // PAGE
            for used in range(slot, slot + (stop - first) // PAGE):
                counts[used] = counts.get(used, 0) + 1
    assert sum(counts.values()) == engine.stats().pages_sharing + engine.stats().pages_shared
    return max(counts.values(), default=0)


def scattered(engine, rng, n_equal):
    """Equal pages with different ones between them, so that none is the other's neighbour."""
    array = engine.empty((2 * n_equal, PAGE // 8), np.int64)
    array[:] = rng.integers(0, 2**62, array.shape, dtype=np.int64)
    array[::2] = 7
    return array


@pytest.mark.parametrize("how", ["dedup", "scan"])
@pytest.mark.parametrize("most", [2, 3, 10, 256])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_scattered_pages(rng, how, most, k):
    for n in (k * most - 1, k * most, k * most + 1):
        with ksmcore.Engine(max_page_sharing=most) as engine:
            array = scattered(engine, rng, n)
            expected = array.copy()
            for _ in range(3):
                engine.dedup() if how == "dedup" else engine.scan()
            stats = engine.stats()
            # A page that is left over waits for another one: on its own it would save nothing.
            n_merged = n - (n % most == 1)
            n_shared = -(-n_merged // most)
            assert (stats.pages_shared, stats.pages_sharing) == (n_shared, n_merged - n_shared)
            assert stats.pages_unshared == n + (n - n_merged)
            assert most_on_one_slot(engine, [array]) <= most
            assert np.array_equal(array, expected)
            engine._core.check(are_filed=True)


@pytest.mark.parametrize("most", [2, 7, 100])
@pytest.mark.parametrize("n", [13, 100, 1000, 5000])
def test_a_stretch_lies_over_copies(rng, most, n):
    with ksmcore.Engine(max_page_sharing=most) as engine:
        array = engine.full(n * PAGE, 9, np.uint8)
        engine.dedup()
        stats = engine.stats()
        assert stats.pages_shared + stats.pages_sharing >= n - 1
        assert most_on_one_slot(engine, [array]) <= most
        # As few mappings as copies allow.
        assert engine.stats().maps_used <= 2 * (n // most + 60) + n // 8
        engine._core.check(are_filed=True)
        array[::2] = 1
        for _ in range(4):
            engine.scan()
        assert most_on_one_slot(engine, [array]) <= most
        engine._core.check(are_filed=True)
        assert (array.reshape(-1, PAGE)[1::2] == 9).any()


def test_pages_that_leave_make_room(engine, rng):
    engine.configure(max_page_sharing=10)
    array = scattered(engine, rng, 30)
    engine.dedup()
    assert engine.stats().pages_shared == 3
    array[0:12:2, 0] = 8  # six leave, and equal each other
    engine.dedup()
    more = scattered(engine, rng, 6)
    engine.dedup()
    stats = engine.stats()
    assert (stats.pages_shared, stats.pages_sharing) == (4, 32)
    assert most_on_one_slot(engine, [array, more]) <= 10
    engine._core.check(are_filed=True)


def test_it_can_be_changed_at_any_time(engine, rng):
    """What is merged already stays so; the kernel's own setting is refused meanwhile."""
    array = scattered(engine, rng, 40)
    engine.dedup()
    assert engine.stats().pages_shared == 1
    engine.configure(max_page_sharing=20)
    more = scattered(engine, rng, 40)
    engine.dedup()
    stats = engine.stats()
    assert (stats.pages_shared, stats.pages_sharing) == (3, 77)
    engine.configure(max_page_sharing="auto")
    last = scattered(engine, rng, 40)
    engine.dedup()
    assert engine.stats().pages_shared == 3
    assert len({array[0, 0], more[0, 0], last[0, 0]}) == 1
    engine._core.check(are_filed=True)


@pytest.mark.parametrize("most", [2, 3, 16])
@pytest.mark.parametrize("how", ["dedup", "scan"])
def test_full_pages_are_not_walked(rng, most, how):
    """Searches cost the same however many full shared pages there are."""
    compares, arrays = [], []
    with ksmcore.Engine(max_page_sharing=most) as engine:
        for _ in range(4):
            before = engine.stats().page_compares
            arrays.append(scattered(engine, rng, 600))
            for _ in range(2):
                engine.dedup(arrays[-1]) if how == "dedup" else engine.scan()
            compares.append(engine.stats().page_compares - before)
        stats = engine.stats()
        assert (stats.pages_shared, stats.pages_sharing) == (2400 // most, 2400 - 2400 // most)
        # One with what a search finds, a few when that is full.
        assert max(compares) <= 8 * 600
        engine._core.check(are_filed=True)


def with_room(engine, rng, n_shared):
    """An array over so many shared pages of three pages each, that one page has left each."""
    array = scattered(engine, rng, 3 * n_shared)
    engine.dedup(array)
    assert engine.stats().pages_shared == n_shared
    # Equal pages are merged in their order.
    array[::6] = np.arange(100, 100 + n_shared)[:, np.newaxis]
    engine.dedup(array)
    stats = engine.stats()
    assert (stats.pages_shared, stats.pages_sharing) == (n_shared, n_shared)
    engine._core.check(are_filed=True)
    return array


@pytest.mark.parametrize("order", ["digest", "content"])
def test_room_that_comes_back_in_many_full_pages_is_found(rng, order):
    with ksmcore.Engine(max_page_sharing=3, order=order, use_zero_pages=False) as engine:
        array = with_room(engine, rng, 40)
        more = scattered(engine, rng, 40)
        engine.dedup(more)
        stats = engine.stats()
        assert (stats.pages_shared, stats.pages_sharing) == (40, 80)
        assert (array[2::6] == 7).all()
        assert (more[::2] == 7).all()
        engine._core.check(are_filed=True)


@pytest.mark.parametrize("order", ["digest", "content"])
@pytest.mark.parametrize("after", [3, 9])
def test_room_that_merges_which_failed_were_to_fill_is_found(rng, order, after):
    with ksmcore.Engine(max_page_sharing=3, order=order, use_zero_pages=False) as engine:
        array = with_room(engine, rng, 40)
        more = scattered(engine, rng, 40)
        faults.inject("mmap", errno.ENOMEM, after=after, count=20)
        report = engine.dedup(more)
        faults.clear()
        assert 0 < report.pages_merged < 40
        engine._core.check(are_filed=True)
        engine.dedup(more)
        stats = engine.stats()
        assert (stats.pages_shared, stats.pages_sharing) == (40, 80)
        assert (array[2::6] == 7).all()
        assert (more[::2] == 7).all()
        engine._core.check(are_filed=True)


@pytest.mark.parametrize("order", ["digest", "content"])
def test_full_pages_are_filled_further_when_more_are_allowed(rng, order):
    with ksmcore.Engine(max_page_sharing=2, order=order) as engine:
        array = scattered(engine, rng, 40)
        engine.dedup()
        assert engine.stats().pages_shared == 20
        engine.configure(max_page_sharing=4)
        engine._core.check(are_filed=True)
        more = scattered(engine, rng, 40)
        engine.dedup()
        stats = engine.stats()
        assert (stats.pages_shared, stats.pages_sharing) == (20, 60)
        assert most_on_one_slot(engine, [array, more]) == 4
        engine._core.check(are_filed=True)


@pytest.mark.parametrize("value", [1, 0, -3])
def test_less_than_two_is_refused(value):
    with pytest.raises(ValueError, match="max_page_sharing must be a whole number of at least 2"):
        Settings(max_page_sharing=value)


@pytest.mark.parametrize("value", [2.0, "many", None, True])
def test_no_number_is_refused(value):
    with pytest.raises(TypeError, match=r'a whole number of at least 2 or "auto"'):
        Settings(max_page_sharing=value)
