"""A page here and there in memory that is nowhere else: holes are passed over as a whole."""

import contextlib
import mmap

import numpy as np
import pytest

import ksmcore
from helpers.kernels_view import store_bytes
from helpers.memory import PAGE, address, random_pages

MAP_NORESERVE = 0x4000
N_PAGES = 1 << 24  # 64 GiB of pages of 4 KiB: to look at each would take a second
PLACES = [0, 1, 511, 512, 70_000, 70_001, 70_003, N_PAGES // 2, N_PAGES - 1]


@pytest.fixture
def sparse(each_guard):
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    try:
        memory = mmap.mmap(-1, N_PAGES * PAGE, flags=flags)
    except (OSError, ValueError) as error:
        pytest.skip(f"no addresses for it: {error}")
    # Whatever the machine's setting: a huge page would bring 511 pages of zeros with each.
    with contextlib.suppress(OSError):
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    with ksmcore.Engine(guard=each_guard) as engine:
        yield engine, np.frombuffer(memory, np.uint8)


def put(array, bytes_of_page):
    for place in PLACES:
        array[place * PAGE : (place + 1) * PAGE] = bytes_of_page


def read(array, place):
    return array[place * PAGE : (place + 1) * PAGE]


def test_pages_far_from_each_other_are_found_merged_and_given_back(sparse, rng):
    engine, array = sparse
    value = random_pages(rng, 1)
    put(array, value)
    region = engine.register(array)
    estimate = engine.estimate()
    assert (estimate.pages, estimate.pages_present) == (N_PAGES, len(PLACES))
    assert estimate.bytes_saved == (len(PLACES) - 1) * PAGE
    for _ in range(3):
        engine.scan()
    assert engine.stats().pages_sharing == len(PLACES) - 1
    assert region.stats().pages_merged == len(PLACES)
    assert all(np.array_equal(read(array, place), value) for place in PLACES)
    read(array, PLACES[4])[0] ^= 1
    assert engine.scan().cow_breaks == 1
    engine._core.check()
    assert not array[PAGE * 100_000 : PAGE * 100_010].any()
    engine.unregister(region)
    assert store_bytes(address(array), N_PAGES * PAGE) == 0
    assert read(array, PLACES[4])[0] == value[0] ^ 1
    assert all(np.array_equal(read(array, place), value) for place in PLACES if place != PLACES[4])


def test_what_is_given_up_in_a_hole_is_forgotten(sparse, rng):
    engine, array = sparse
    for place in PLACES:
        array[place * PAGE : (place + 1) * PAGE] = random_pages(rng, 1)
    engine.register(array)
    for _ in range(2):
        engine.scan()
    assert engine.stats().pages_unshared == len(PLACES)
    buffer = array.base.obj if isinstance(array.base, memoryview) else array.base
    buffer.madvise(mmap.MADV_DONTNEED, PAGE, (N_PAGES - 2) * PAGE)
    # One pass of eight asks with care whether pages have gone (see still).
    for _ in range(8):
        engine.scan()
    stats = engine.stats()
    assert stats.pages_unshared + stats.pages_volatile == 2
    engine._core.check()


def test_a_step_over_what_is_merged_and_not_read_since_is_bounded(rng):
    """A hole to the kernel's eyes, of which each page has a record: the lock is held meanwhile."""
    n_pages = 40_000
    with ksmcore.Engine() as engine:
        first = engine.array(random_pages(rng, n_pages))
        second = engine.array(first)
        assert engine.dedup(first, second).pages_merged >= n_pages
        start = address(second)
        engine._core.begin_pass()
        cursor, steps = start, 0
        while cursor < start + n_pages * PAGE:
            before = cursor
            cursor = engine._core.walk(cursor, start + n_pages * PAGE, 1, False)
            assert before < cursor <= before + 20_000 * PAGE
            steps += 1
        assert steps >= 2
        assert engine.stats().pages_sharing == n_pages
        engine._core.check()
        assert np.array_equal(first, second)
