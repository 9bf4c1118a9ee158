"""Written-page tracking: quiet pages are not read again, and no write to them goes unseen."""

import contextlib
import errno
import mmap
import os

import numpy as np
import pytest

import ksmcore
from helpers.forks import THREADS_RUN, in_child
from helpers.kernels_view import descriptors, store_bytes
from helpers.libc import libc, process_vm_writev
from helpers.memory import PAGE, extent, private_memory, random_pages
from helpers.watched import watched_from
from ksmcore._kernel import forks, smaps
from ksmcore._testing import faults, pagemap

N = 600

pytestmark = pytest.mark.skipif(
    ksmcore.features()["tracking"] is not None, reason="this kernel tracks no writes"
)


def random_words(rng):
    """N different pages, as words."""
    return random_pages(rng, N).view(np.int64).reshape(N, -1)


def unwritten(array):
    """Pages that the kernel takes for unwritten: asked of the kernel, not of the engine."""
    n_pages = array.nbytes // PAGE
    return n_pages - sum(n for _, n, _ in pagemap.survey(array.ctypes.data, n_pages, True))


def hashed_by(engine, scan=None):
    before = engine.stats().pages_hashed
    (scan or engine.scan)()
    return engine.stats().pages_hashed - before


@pytest.fixture
def quiet(engine, rng):
    """An array of N different pages, all of them quiet."""
    array = engine.array(random_words(rng))
    for _ in range(3):
        engine.scan()
    stats = engine.stats()
    assert stats.dirty == "pagemap"
    assert stats.pages_quiet == stats.pages_unshared == N
    assert unwritten(array) == N
    return array


# ---- what it is for ----------------------------------------------------------


def test_quiet_pages_are_not_read_again(engine, quiet):
    for _ in range(3):
        assert hashed_by(engine) == 0
        assert engine.stats().pages_quiet == N
    engine._core.check(are_filed=True)


@pytest.mark.parametrize("n_written", [1, 7, 100])
def test_a_pass_costs_what_was_written(engine, quiet, rng, n_written):
    rows = rng.choice(N, n_written, replace=False)
    quiet[rows, 5] += 1
    assert unwritten(quiet) == N - n_written
    # Changed; unchanged; protected and read once more.
    assert [hashed_by(engine) for _ in range(4)] == [n_written, n_written, n_written, 0]
    assert unwritten(quiet) == engine.stats().pages_quiet == N
    engine._core.check(are_filed=True)


def test_a_pass_that_merges_costs_what_was_written(engine, rng):
    content = random_words(rng)
    a, b = engine.array(content), engine.array(content)
    alone = engine.array(random_words(rng))
    for _ in range(4):
        engine.scan()
    assert engine.stats().pages_quiet == N
    assert hashed_by(engine) == 0
    a[3, 3] += 1
    alone[4, 4] += 1
    content[3, 3] += 1
    assert hashed_by(engine) == 2
    assert np.array_equal(a, content)
    assert not np.array_equal(a, b)


@pytest.mark.parametrize("how", ["store", "pread", "readinto", "writev", "mem"])
def test_every_way_of_writing_is_seen(engine, quiet, tmp_path, how):
    """What is written makes page 10 equal to page 20: it is merged as soon as it may be."""
    data = quiet[20].tobytes()
    if how == "store":
        quiet[10] = quiet[20]
    elif how in ("pread", "readinto"):
        (tmp_path / "data").write_bytes(data)
        with open(tmp_path / "data", "rb", buffering=0) as file:
            if how == "pread":
                assert os.preadv(file.fileno(), [quiet[10]], 0) == PAGE
            else:
                assert file.readinto(quiet[10]) == PAGE
    elif how == "writev":
        assert process_vm_writev(quiet[20].ctypes.data, quiet[10].ctypes.data, PAGE) == PAGE
    else:
        with open("/proc/self/mem", "r+b", buffering=0) as memory:
            memory.seek(quiet[10].ctypes.data)
            assert memory.write(data) == PAGE
    assert unwritten(quiet) == N - 1
    engine.scan()
    engine.scan()
    assert engine.stats().pages_sharing == 1
    assert quiet[10].tobytes() == quiet[20].tobytes() == data


# ---- merging with quiet pages ----------------------------------------------------------


def test_a_new_page_finds_a_quiet_one(engine, quiet):
    other = engine.array(quiet[100:200])
    engine.scan()
    assert engine.stats().pages_sharing == 0  # seen for the first time
    engine.scan()
    stats = engine.stats()
    assert (stats.pages_shared, stats.pages_sharing) == (100, 100)
    assert stats.pages_quiet == N - 100
    assert np.array_equal(other, quiet[100:200])
    # What is merged is no anonymous memory, the rest is watched as before.
    assert unwritten(quiet) == N - 100
    engine._core.check(are_filed=True)


def test_dedup_finds_quiet_pages_at_once(engine, quiet):
    other = engine.array(quiet)
    assert engine.dedup(other).pages_merged == 2 * N
    assert engine.stats().pages_quiet == 0
    assert np.array_equal(other, quiet)


@pytest.mark.parametrize("place", [0, N - 1])
def test_a_quiet_partner_that_was_written_has_its_turn(engine, quiet, place):
    """Written with its own bytes: found in the quiet tree, it is no quiet page any more."""
    other = engine.array(quiet[place])
    engine.scan()
    quiet[place] = quiet[place].copy()
    assert unwritten(quiet) == N - 1
    engine.scan()
    stats = engine.stats()
    assert (stats.pages_sharing, stats.pages_quiet) == (1, N - 1)
    assert np.array_equal(other, quiet[place])
    engine._core.check(are_filed=True)


def test_pages_that_could_not_be_merged_are_looked_at_again(engine, quiet):
    """Out of the quiet tree, and so not protected any more, even where no window was opened."""
    engine.configure(map_budget=0)
    other = engine.array(quiet[:50])
    for _ in range(3):
        engine.scan()
    stats = engine.stats()
    assert stats.pages_sharing == 0
    assert stats.skipped["map_budget"] > 0
    assert unwritten(quiet) + unwritten(other) <= stats.pages_quiet
    engine.configure(map_budget="auto")
    engine.scan()
    engine.scan()
    assert engine.stats().pages_sharing == 50
    engine._core.check(are_filed=True)


# Of some calls the first one makes the guard ready.
@pytest.mark.parametrize(
    ("call", "after"), [("uffd_register", 1), ("uffd_move", 0), ("mmap", 1), ("tracker", 0)]
)
def test_windows_that_fail(engine, quiet, call, after):
    other = engine.array(quiet)
    engine.scan()
    faults.inject(call, errno.ENOMEM, after=after, count=3)
    engine.scan()
    faults.clear()
    assert unwritten(quiet) + unwritten(other) <= engine.stats().pages_quiet
    for _ in range(4):
        engine.scan()
    assert engine.stats().pages_sharing == N
    assert np.array_equal(quiet, other)
    engine._core.check(are_filed=True)


def test_what_was_merged_and_is_different_for_good_becomes_plain_memory(engine, rng):
    content = random_words(rng)
    a, b = engine.array(content), engine.array(content)
    engine.dedup()
    assert store_bytes(*extent(a)) == store_bytes(*extent(b)) == N * PAGE
    a[100:200, 0] = np.arange(100)
    a[300, 0] = 1
    content[100:200, 0] = np.arange(100)
    content[300, 0] = 1
    for _ in range(3):
        engine.scan()
    # Found changed, found unchanged, found unchanged once more.
    assert store_bytes(*extent(a)) == (N - 101) * PAGE
    for _ in range(3):
        engine.scan()
    assert np.array_equal(a, content)
    assert unwritten(a) == engine.stats().pages_quiet == 101
    assert hashed_by(engine) == 0
    a[150] = b[150]
    a[300] = b[300]
    for _ in range(2):
        engine.scan()
    assert store_bytes(*extent(a)) == (N - 99) * PAGE
    engine._core.check(are_filed=True)


def test_it_stays_over_the_store_where_the_map_budget_ends(engine, rng):
    content = random_words(rng)
    a, b = engine.array(content), engine.array(content)
    engine.dedup()
    engine.configure(map_budget=10)
    a[::2, 0] = np.arange(N // 2)
    skipped = engine.stats().pages_skipped
    for _ in range(6):
        engine.scan()
    assert store_bytes(*extent(a)) > (N - 20) * PAGE
    assert engine.stats().pages_skipped == skipped  # nothing could have been saved
    assert engine.stats().pages_unshared == N // 2
    assert np.array_equal(a[1::2], b[1::2])
    engine._core.check(are_filed=True)


# ---- what a program may do meanwhile ----------------------------------------------------------


def test_memory_given_up_by_the_program(engine, quiet):
    assert libc.madvise(quiet.ctypes.data, 10 * PAGE, mmap.MADV_DONTNEED) == 0
    engine.scan()
    assert engine.stats().pages_unshared == N - 10
    assert not quiet[:10].any()
    quiet[:10] = quiet[10:20]
    for _ in range(3):
        engine.scan()
    assert engine.stats().pages_sharing == 10
    engine._core.check(are_filed=True)


def test_all_descriptors_closed(engine, quiet):
    for fd in descriptors("userfaultfd"):
        os.close(fd)
    assert unwritten(quiet) == 0  # the kernel has let go of all of it
    quiet[1] = quiet[2]
    assert hashed_by(engine) == N
    engine.scan()
    assert engine.stats().pages_sharing == 1
    engine.scan()
    engine.scan()
    assert engine.stats().pages_quiet == unwritten(quiet) == N - 2
    engine._core.check(are_filed=True)


@pytest.mark.filterwarnings(THREADS_RUN)
def test_a_forked_child_is_not_watched(engine, quiet):
    before = quiet.copy()

    def work():
        assert unwritten(quiet) == 0
        quiet[0] += 1
        with ksmcore.Engine() as own:
            array = own.array(quiet)
            for _ in range(4):
                own.scan()
            assert own.stats().pages_quiet == N
            assert np.array_equal(array, quiet)
        assert forks.generation() > 0

    assert in_child(work) == 0
    # The fork itself wrote nothing, and the child's writes are its own.
    assert hashed_by(engine) == 0
    assert np.array_equal(quiet, before)


def test_nothing_stays_behind(rng):
    array = np.frombuffer(private_memory(N), np.int64)
    array[:] = rng.integers(0, 2**63, array.size, dtype=np.int64)
    inner = array[2 * PAGE // 8 : -2 * PAGE // 8]

    def flags():
        return {flag for vma in smaps.vmas_in(*extent(array)) for flag in vma.flags}

    with ksmcore.Engine() as engine:
        region = engine.register(inner)
        for _ in range(2):
            engine.scan()
        used = engine.stats().maps_used  # by stores that other tests have left behind
        assert "uw" not in flags()
        engine.scan()
        assert "uw" in flags()
        assert engine.stats().maps_used == used + 2
        region.close()
        assert "uw" not in flags()
        assert engine.stats().maps_used == used
        assert unwritten(inner) == 0
        engine.register(inner)
        for _ in range(4):
            engine.scan()
        assert engine.stats().pages_quiet == N - 4
    assert "uw" not in flags()


def test_what_is_registered_can_be_asked_about(engine, quiet):
    assert engine.estimate(quiet).pages_distinct == N
    assert engine.estimate().pages_distinct == N
    assert engine.dedup(quiet).pages_merged == 0


def test_unmerged_memory_is_watched_again(engine, rng):
    content = random_words(rng)
    a = engine.array(content)
    for _ in range(3):
        engine.scan()
    b = engine.array(content)
    engine.dedup()
    engine.unmerge()
    a[:, 0] = np.arange(N)
    b[:, 0] = np.arange(N) + N
    for _ in range(3):
        engine.scan()
    assert hashed_by(engine) == 0
    assert unwritten(a) + unwritten(b) == engine.stats().pages_quiet == 2 * N


# ---- without it ----------------------------------------------------------


def test_checksum_on_request(rng):
    with ksmcore.Engine(dirty="checksum") as engine:
        array = engine.array(random_words(rng))
        assert [hashed_by(engine) for _ in range(5)] == [N] * 5
        assert engine.stats().dirty == "checksum"
        assert engine.stats().pages_quiet == unwritten(array) == 0


def test_content_order_has_checksums(rng):
    with ksmcore.Engine(order="content") as engine:
        array = engine.array(random_words(rng))
        assert [hashed_by(engine) for _ in range(5)] == [N] * 5
        assert engine.stats().dirty == "checksum"
        assert unwritten(array) == 0
    with pytest.raises(ValueError, match="dirty='pagemap' needs order='digest'"):
        ksmcore.Engine(order="content", dirty="pagemap")


def test_where_it_is_not_to_be_had(rng):
    faults.inject("tracker", errno.EPERM)
    with pytest.raises(ValueError, match="dirty='pagemap' is not to be had here"):
        ksmcore.Engine(dirty="pagemap")
    faults.inject("tracker", errno.EPERM)
    with ksmcore.Engine() as engine:
        assert engine.stats().dirty == "checksum"
        array = engine.array(random_words(rng))
        assert [hashed_by(engine) for _ in range(4)] == [N] * 4
        assert unwritten(array) == 0


def test_a_kernel_without_pagemap_scan(rng):
    faults.inject("pagemap_scan", errno.ENOTTY)
    with ksmcore.Engine() as engine:
        assert engine.stats().dirty == "checksum"
        content = random_words(rng)
        a, b = engine.array(content), engine.array(content)
        engine.dedup()
        assert engine.stats().pages_sharing == N
        a[5, 5] += 1
        assert [hashed_by(engine) for _ in range(2)] == [1, 1]
        assert not np.array_equal(a, b)
        engine._core.check(are_filed=True)


@pytest.mark.parametrize(
    ("call", "after"),
    [("tracker", 0), ("tracker", 1), ("pagemap_scan", 1), ("pagemap_scan", 2), ("pagemap_scan", 3)],
)
def test_watching_that_fails(rng, call, after):
    """Each call of the pass that first protects pages."""
    with ksmcore.Engine() as engine:
        array = engine.array(random_words(rng))
        engine.scan()
        engine.scan()
        faults.inject(call, errno.EPERM, after=after)
        # A survey that failed says so; the rest goes on with checksums.
        with contextlib.suppress(PermissionError):
            engine.scan()
        assert faults.clear() == 0
        assert unwritten(array) <= engine.stats().pages_quiet
        array[1] = array[2]
        for _ in range(3):
            engine.scan()
        assert engine.stats().pages_sharing == 1
        engine._core.check(are_filed=True)


def test_small_regions_are_not_watched(engine, rng):
    with watched_from(N + 1):
        array = engine.array(random_words(rng))
        assert [hashed_by(engine) for _ in range(4)] == [N] * 4
        assert unwritten(array) == engine.stats().pages_quiet == 0


def test_close_gives_the_descriptor_back(rng):
    """At once, whoever still knows the engine."""
    before = len(descriptors())
    engine = ksmcore.Engine(dirty="pagemap")
    opened = len(descriptors()) - before
    array = engine.empty(300 * PAGE, np.uint8)
    array[:] = random_pages(rng, 300)
    for _ in range(3):
        engine.scan()
    assert engine.stats().pages_quiet == 300
    assert len(descriptors()) == before + opened + 1
    engine.close()
    assert len(descriptors()) == before + opened
