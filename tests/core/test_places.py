"""Merged memory that changes places: what is remembered is which page lies where, not how many."""

import ctypes
import itertools

import numpy as np
import pytest

from helpers.libc import libc
from helpers.memory import PAGE, address, private_memory, random_pages

N = 64
MREMAP_MAYMOVE, MREMAP_FIXED = 1, 2


@pytest.fixture
def guard(each_guard):
    return each_guard


def moved(old, new, len_bytes):
    sizes = ctypes.c_size_t(len_bytes), ctypes.c_size_t(len_bytes)
    found = libc.mremap(
        ctypes.c_void_p(old), *sizes, MREMAP_MAYMOVE | MREMAP_FIXED, ctypes.c_void_p(new)
    )
    assert found == new, ctypes.get_errno()


def rotate(arrays, first, n_pages, spare):
    """Each array's pages from `first` on take the place of the next one's."""
    places = [address(array) + first * PAGE for array in arrays]
    n_bytes = n_pages * PAGE
    moved(places[-1], address(spare), n_bytes)
    for old, new in reversed(list(itertools.pairwise(places))):
        moved(old, new, n_bytes)
    moved(address(spare), places[0], n_bytes)
    # Nobody else's memory is to come where it was.
    again = libc.mmap(ctypes.c_void_p(address(spare)), ctypes.c_size_t(n_bytes), 3, 0x32, -1, 0)
    assert again == address(spare)


@pytest.fixture
def spare():
    """Room to move through."""
    return np.frombuffer(private_memory(N), np.uint8)


@pytest.mark.parametrize(("n_arrays", "first", "n_pages"), [(2, 0, N), (2, 7, 20), (3, 0, N)])
def test_merged_pages_that_change_places_keep_their_bytes(
    engine, rng, spare, n_arrays, first, n_pages
):
    contents = [random_pages(rng, N) for _ in range(n_arrays)]
    arrays = [engine.array(content) for content in contents]
    twins = [engine.array(content) for content in contents]
    engine.dedup()
    before = [array.copy() for array in arrays]
    rotate(arrays, first, n_pages, spare)
    part = slice(first * PAGE, (first + n_pages) * PAGE)
    expected = [content.copy() for content in before]
    for to in range(n_arrays):
        expected[to][part] = before[to - 1][part]
    # The sharers whose number is known go: were slots released by it, the moved pages would show.
    for twin in twins:
        twin += 1
    engine.scan()
    engine.scan()
    others = [engine.array(random_pages(rng, N)) for _ in range(2)]
    others.append(engine.array(others[0]))
    engine.dedup()
    for array, content in zip(arrays, expected, strict=True):
        assert np.array_equal(array, content)
    engine._core.check()
    engine.unmerge()
    for array, content in zip(arrays, expected, strict=True):
        assert np.array_equal(array, content)


def test_a_buffer_that_goes_after_it_changed_places_leaves_the_other_right(engine, rng, spare):
    contents = [random_pages(rng, N) for _ in range(2)]
    arrays = [engine.array(content) for content in contents]
    twins = [engine.array(content) for content in contents]
    engine.dedup()
    rotate(arrays, 0, N, spare)
    del twins
    engine.unregister(arrays[0])
    engine.scan()
    engine.dedup(engine.array(random_pages(rng, N)), engine.full(N * PAGE, 3, np.uint8))
    assert np.array_equal(arrays[0], contents[1])
    assert np.array_equal(arrays[1], contents[0])
