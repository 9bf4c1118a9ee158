"""What nobody wrote is passed over by one question, and nothing that changes is missed by it."""

import errno
import mmap

import numpy as np
import pytest

import ksmcore
from helpers.loose import call, map_at
from helpers.mappings import counted_anew
from helpers.memory import PAGE, address, octets, private_memory, random_pages
from ksmcore._testing import faults

HUGE = 2 << 20
# Passes of which one asks with care (see still).
CAREFUL = 8

pytestmark = pytest.mark.skipif(
    ksmcore.features()["tracking"] is not None, reason="this kernel tracks no writes"
)


@pytest.fixture(params=[mmap.MADV_NOHUGEPAGE, mmap.MADV_HUGEPAGE], ids=["small", "huge"])
def pages(request, engine, rng):
    """Three huge pages' worth of different pages, all of them quiet; aligned as huge pages are."""
    n_pages = 4 * HUGE // PAGE
    memory = private_memory(n_pages)
    memory.madvise(request.param)
    everything = octets(memory)
    start = -address(everything) % HUGE
    part = everything[start : start + 3 * HUGE].reshape(-1, PAGE)
    part[:] = random_pages(rng, len(part)).reshape(-1, PAGE)
    engine.register(part)
    for _ in range(4):
        engine.scan()
    assert engine.scan().pages_hashed == 0
    return part


def test_a_pass_asks_one_question_and_looks_at_no_page(engine, pages):
    engine.scan()  # of which one in some asks with care
    faults.inject("pagemap_scan", errno.ENOTTY, after=2, count=100)
    faults.inject("mincore", errno.EPERM, count=100)
    report = engine.scan()
    assert (report.pages_scanned, report.pages_hashed) == (len(pages), 0)
    assert faults.clear() == 200


@pytest.mark.parametrize("which", [0, 1, 700, 1535])
def test_one_written_page_is_met(engine, pages, which):
    for _ in range(3):
        pages[which, 9] += 1
        # Seen to change; unchanged, and protected.
        assert [engine.scan().pages_hashed for _ in range(4)] == [1, 1, 1, 0]
    engine._core.check()


@pytest.mark.parametrize(("first", "n"), [(0, 512), (512, 512), (512, 1024), (0, 1536), (100, 3)])
def test_what_the_program_gives_up_is_forgotten_within_some_passes(engine, pages, first, n):
    """Also where no page table is left that could tell."""
    call("madvise", address(pages[first]), n * PAGE, mmap.MADV_DONTNEED)
    for _ in range(CAREFUL):
        engine.scan()
    stats = engine.stats()
    assert stats.pages_unshared == stats.pages_tracked == len(pages) - n
    assert engine.scan().pages_scanned == len(pages) - n
    engine._core.check()


@pytest.mark.parametrize("n_passes_between", [0, 1, CAREFUL])
def test_and_what_comes_back_there_is_merged(engine, pages, n_passes_between):
    kept = pages[:512].copy()
    call("madvise", address(pages[512]), HUGE, mmap.MADV_DONTNEED)
    for _ in range(n_passes_between):
        engine.scan()
    pages[512:1024] = kept
    for _ in range(3):
        engine.scan()
    assert engine.stats().pages_sharing == 512
    assert np.array_equal(pages[:512], kept)
    assert np.array_equal(pages[512:1024], kept)
    engine._core.check()


@pytest.mark.parametrize("what", ["munmap", "mprotect", "replace"])
def test_memory_that_was_altered_a_moment_ago_is_told(engine, pages, what):
    """Though all mappings were looked at in this second."""
    where = address(pages[512])
    if what == "munmap":
        call("munmap", where, HUGE)
    elif what == "mprotect":
        call("mprotect", where, HUGE, mmap.PROT_READ)
    else:
        map_at(where, HUGE // PAGE, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
    assert engine.scan().skipped["altered"] == len(pages)
    map_at(where, HUGE // PAGE)
    assert engine.scan().skipped["altered"] == 0
    pages[512:1024] = pages[:512]
    for _ in range(3):
        engine.scan()
    assert engine.stats().pages_sharing == 512


def test_a_region_that_is_registered_in_the_same_second_counts(engine, pages, rng):
    other = octets(private_memory(64))
    other[:] = random_pages(rng, 64)
    pages[:64] = other.reshape(-1, PAGE)
    engine.register(other)
    assert engine.dedup().pages_merged == 128
    before = engine.stats().maps_used
    # But for what lies beside the four ends, which costs a mapping or none.
    assert abs(counted_anew(engine) - before) <= 4
    engine._core.check()


def test_a_large_region_is_asked_about_in_pieces(engine):
    """Of more pages than one question is for."""
    memory = private_memory(1 << 18)
    memory.madvise(mmap.MADV_HUGEPAGE)
    words = np.frombuffer(memory, np.uint64).reshape(-1, PAGE // 8)
    words[:, 0] = np.arange(1, len(words) + 1)
    engine.register(memory)
    for _ in range(4):
        engine.scan()
    for which in (0, 100_000, 140_000, len(words) - 1):
        words[which, 1] += 1
        for n_hashed in (1, 1, 1, 0):
            report = engine.scan()
            assert (report.pages_scanned, report.pages_hashed) == (len(words), n_hashed)


def test_two_regions_of_one_mapping_with_a_gap_between_them(engine, rng):
    """A mapping that has both is told twice, and each of them is to count once."""
    memory = octets(private_memory(201)).reshape(-1, PAGE)
    memory[:] = random_pages(rng, 201).reshape(-1, PAGE)
    memory[101:] = memory[:100]
    first, second = memory[:100], memory[101:]
    engine.register(first)
    engine.register(second)
    for _ in range(3):
        report = engine.scan()
    assert report.skipped["altered"] == 0
    assert engine.stats().pages_sharing == 100
    engine._core.check()


def test_a_part_that_was_made_read_only_a_moment_ago_is_left_alone(engine, rng):
    """Whatever else lies in the same mappings as the rest of its region."""
    memory = octets(private_memory(201)).reshape(-1, PAGE)
    memory[:] = random_pages(rng, 201).reshape(-1, PAGE)
    engine.register(memory[:100])
    engine.register(memory[101:])
    engine.scan()
    memory[:50] = memory[101:151]
    call("mprotect", address(memory), 50 * PAGE, mmap.PROT_READ)
    for _ in range(4):
        report = engine.scan()
    assert report.skipped["altered"] == 100
    assert engine.stats().pages_sharing == 0
    call("mprotect", address(memory), 50 * PAGE, mmap.PROT_READ | mmap.PROT_WRITE)
    for _ in range(3):
        engine.scan()
    assert engine.stats().pages_sharing == 50
