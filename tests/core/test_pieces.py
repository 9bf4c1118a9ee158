"""Memory that was merged here and there is one mapping again on the way back, where that can be."""

import mmap

import numpy as np
import pytest

import ksmcore
from helpers.forks import THREADS_RUN, Child
from helpers.kernels_view import is_plain, own_pages, present_pages
from helpers.memory import PAGE, extent, private_memory, random_pages
from ksmcore._kernel import smaps
from ksmcore._testing import faults

N_PAGES = 96
# Ends of what is watched, or moved, or beside it.
FEW = 4


@pytest.fixture
def engine(each_guard):
    with ksmcore.Engine(guard=each_guard) as engine:
        yield engine


def strewn(engine, distance=3, seed=1):
    """Memory of which every so many-th page is merged with another array's."""
    memory = private_memory(N_PAGES)
    pages = np.frombuffer(memory, np.uint8).reshape(N_PAGES, PAGE)
    pages[:] = random_pages(seed, N_PAGES).reshape(N_PAGES, PAGE)
    twin = engine.array(pages[::distance])
    n_merged = len(pages[::distance])
    assert engine.dedup(memory, twin).pages_merged == 2 * n_merged
    assert len(mappings(pages)) >= 2 * n_merged - FEW
    return memory, pages, twin


def mappings(pages):
    return smaps.Snapshot().vmas_in(*extent(pages))


@pytest.mark.parametrize("how", ["unregister", "unmerge", "close"])
@pytest.mark.parametrize("distance", [2, 3, 17])
def test_one_mapping_again(engine, how, distance):
    memory, pages, twin = strewn(engine, distance)
    expected = pages.copy()
    if how == "unregister":
        engine.unregister(memory)
    else:
        getattr(engine, how)()
    assert len(mappings(pages)) <= FEW
    assert is_plain(*extent(pages))
    assert np.array_equal(pages, expected)
    pages += 1
    assert np.array_equal(pages, expected + 1)
    assert np.array_equal(twin, expected[::distance])


def test_far_from_each_other_they_stay_as_they_are(engine):
    """To copy all that lies between would cost more than it is worth."""
    memory, pages, _ = strewn(engine, 19)
    engine.unregister(memory)
    assert len(mappings(pages)) >= 2 * len(pages[::19]) - FEW


def test_what_is_not_there_does_not_come_to_be(engine):
    memory, pages, _ = strewn(engine, 4)
    memory.madvise(mmap.MADV_DONTNEED, 41 * PAGE, PAGE)
    memory.madvise(mmap.MADV_DONTNEED, 61 * PAGE, 2 * PAGE)
    engine.unregister(memory)
    there = present_pages(extent(pages)[0], N_PAGES)
    assert [page for page in range(N_PAGES) if not there[page]] == [41, 61, 62]
    # At each hole a piece ends.
    assert len(mappings(pages)) <= FEW + 2 * 2
    assert not pages[41].any()
    assert not pages[61:63].any()


def test_what_was_advised_page_by_page_stays_so(engine):
    memory, pages, _ = strewn(engine)
    memory.madvise(mmap.MADV_DONTFORK, 30 * PAGE, 20 * PAGE)
    expected = pages.copy()
    engine.unregister(memory)
    start = extent(pages)[0]
    kept_back = [
        page
        for vma in mappings(pages)
        if "dc" in vma.flags
        for page in range((vma.start - start) // PAGE, (vma.end - start) // PAGE)
    ]
    assert kept_back == list(range(30, 50))
    assert np.array_equal(pages, expected)


@pytest.mark.filterwarnings(THREADS_RUN)
def test_pages_that_a_child_shares_are_not_copied(engine):
    """They would be there twice."""
    memory, pages, _ = strewn(engine)
    with Child(lambda pause: pause()) as child:
        child.paused()
        engine.unregister(memory)
        is_own = own_pages(extent(pages)[0], N_PAGES)
        assert is_own == [page % 3 == 0 for page in range(N_PAGES)]
        child.end()


def test_unmerged_memory_goes_on_to_be_watched(engine):
    """It is registered, and written pages are found in it as before."""
    memory, pages, twin = strewn(engine)
    for _ in range(4):
        engine.scan()
    engine.unmerge()
    assert len(mappings(pages)) <= FEW
    pages[1::3] = pages[::3]
    expected = pages.copy()
    for _ in range(3):
        engine.scan()
    assert engine.stats().pages_sharing >= 2 * len(pages[::3])
    assert np.array_equal(pages, expected)
    assert np.array_equal(twin, expected[::3])
    engine._core.check()
    del memory


@pytest.mark.parametrize("call", ["mremap", "uffd_move", "uffd_register", "tracker", "mprotect"])
def test_whatever_fails_the_bytes_are_right(engine, call):
    for skipped in (0, 1, 40, 63, 64, 65, 66):
        memory, pages, _ = strewn(engine, 2, seed=skipped)
        expected = pages.copy()
        faults.inject(call, 12, after=skipped, count=2)
        try:
            engine.unregister(memory)
        except (OSError, MemoryError):
            faults.clear()
            assert np.array_equal(pages, expected)
            engine.unregister(memory)
        faults.clear()
        assert np.array_equal(pages, expected)
        pages += 1
        assert np.array_equal(pages, expected + 1)
        engine._core.check()
