"""All mappings are counted when something is to be merged, and else once a second."""

import errno
import fcntl
import mmap
import struct

import numpy as np
import pytest

import ksmcore
from helpers.loose import call
from helpers.memory import PAGE, random_pages
from ksmcore._kernel import smaps
from ksmcore._testing import faults

N_PAGES = 64
ALWAYS = 10**6
PROCMAP_QUERY, OR_NEXT = 0xC0686611, 0x10


def can_be_asked_for_one() -> bool:
    """Does the kernel (from 6.11 on) tell of single mappings?"""
    with open("/proc/self/maps") as maps:
        try:
            fcntl.ioctl(maps, PROCMAP_QUERY, struct.pack("<QQ88x", 104, OR_NEXT))
        except OSError:
            return False
    return True


pytestmark = pytest.mark.skipif(
    ksmcore.features()["tracking"] is not None or not can_be_asked_for_one(),
    reason="this kernel is not asked for single mappings",
)


@pytest.fixture
def merged(engine, rng):
    """Two equal arrays and one of other pages; all mappings were counted a moment ago."""
    source = random_pages(rng, N_PAGES)
    a, b = engine.array(source), engine.array(source)
    other = engine.array(random_pages(rng, N_PAGES))
    assert engine.dedup().bytes_saved == a.nbytes
    for _ in range(4):
        engine.scan()
    return a, b, other


def refused():
    """No list of mappings can be read."""
    faults.inject("pread", errno.EIO, count=ALWAYS)


def allowed() -> bool:
    """It can be again. Was there an attempt?"""
    return faults.clear() != ALWAYS


def a_quiet_second(what) -> bool:
    """Did none of ten passes try to read the list, once? It is read once a second."""
    for _ in range(5):
        what()
        refused()
        try:
            for _ in range(10):
                what()
        except OSError:
            allowed()
            continue
        if not allowed():
            return True
    return False


def test_passes_that_merge_nothing_do_not_read_the_list(engine, merged):
    assert a_quiet_second(engine.scan)
    a, b, _ = merged
    assert np.array_equal(a, b)


def test_pages_that_change_and_meet_nothing_do_not_either(engine, merged):
    _, _, other = merged

    def write():
        other[::PAGE] += 1
        engine.scan()

    assert a_quiet_second(write)


def test_nothing_is_merged_on_an_old_count(engine, merged, rng):
    """Where it is not known how many mappings there are none is made; the pages wait for later."""
    _, _, other = merged
    for _ in range(5):
        other[:] = np.tile(random_pages(rng, 2), N_PAGES // 2)
        engine.scan()  # they are seen to change
        before = engine.stats().pages_sharing
        refused()
        try:
            report = engine.scan()
        except OSError:
            allowed()  # that was a second after the last time
            continue
        assert allowed()
        assert report.bytes_saved == 0
        assert engine.stats().pages_sharing == before
        # That is no want of room, which a larger limit would help against.
        assert report.skipped["refused"] > 0
        assert report.skipped["map_budget"] == 0
        break
    else:
        pytest.fail("each pass counts all mappings")
    for _ in range(3):
        engine.scan()
    assert engine.stats().pages_sharing >= before + N_PAGES - 2
    engine._core.check()


def test_what_was_moved_into_a_region_is_found_at_once(engine, merged):
    """The mappings of regions are looked at in every pass."""
    _, _, other = merged
    engine.scan()
    start = other.ctypes.data
    call("mprotect", start, PAGE, mmap.PROT_READ)
    try:
        refused()
        report = engine.scan()
        was_read = allowed()
        assert not was_read
        assert report.skipped["altered"] > 0
    finally:
        faults.clear()
        call("mprotect", start, PAGE, mmap.PROT_READ | mmap.PROT_WRITE)
    assert engine.scan().skipped["altered"] == 0


def test_advice_is_kept_in_every_round_of_a_merge(engine, rng):
    """Pages that the map budget left out get another; none loses what it was given."""
    n_pages = 600
    source = random_pages(rng, n_pages).reshape(n_pages, PAGE)
    a, b = engine.array(source), engine.array(source[rng.permutation(n_pages)])
    for array in (a, b):
        call("madvise", array.ctypes.data, array.nbytes, mmap.MADV_DONTDUMP)
    # A part of it is held back in each round but the last.
    engine.configure(map_budget=n_pages + n_pages // 8)
    report = engine.dedup(a, b)
    assert report.bytes_saved > a.nbytes // 2
    # The report tells of the last round.
    assert engine.stats().skipped["map_budget"] > report.skipped["map_budget"] > 0
    for array in (a, b):
        start = array.ctypes.data
        vmas = smaps.vmas_in(start, start + array.nbytes)
        assert len(vmas) > 1
        assert all("dd" in vma.flags for vma in vmas)
