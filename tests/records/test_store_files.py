"""The files of a store: after a fork, when the program has closed them, and under limits."""

import os
import resource
import signal

import numpy as np
import pytest

import ksmcore
from helpers.forks import N_PAGES, THREADS_RUN, Child, Memory, close_all_fds, in_child
from helpers.kernels_view import is_plain, store_bytes, store_mappings
from helpers.memory import PAGE, extent, random_pages

pytestmark = pytest.mark.filterwarnings(THREADS_RUN)

# So many have a descriptor at most.
MAX_FILES = 16


def held_pages(engine: ksmcore.Engine) -> int:
    """Pages of memory that the kernel counts for the files within reach."""
    return sum(os.fstat(fd).st_blocks for fd in engine._core.store_fds) * 512 // PAGE


def views() -> int:
    return sum(not vma.writable for vma in store_mappings())


# ---- a program that closes all descriptors -------------------------------------------------------


@pytest.mark.parametrize("how_often", [1, 4])
def test_what_comes_after_is_merged_in_another_file(how_often):
    def work() -> None:
        engine = ksmcore.Engine()
        memories = [Memory.merged(engine, 1)]
        for again in range(how_often):
            close_all_fds()
            assert engine._core.store_fds == []
            memories.append(Memory(engine, 2 + again))
            assert engine.dedup().bytes_saved == N_PAGES * PAGE
            engine._core.check()
            # Whatever was merged before stays so, and counts.
            stats = engine.stats()
            assert stats.pages_shared == stats.pages_sharing == N_PAGES * len(memories)
            assert len(engine._core.store_fds) == 1
        for memory in memories:
            memory.check()
            memory.write_some(5)
        engine.scan()
        engine._core.check()
        for memory in memories:
            memory.check()
            for array in memory.arrays:
                engine.unregister(array)
                assert is_plain(*extent(array))
            memory.check()
        engine.close()

    assert in_child(work) == 0


def test_the_default_engine_with_a_scanner_too():
    def work() -> None:
        engine = ksmcore.default_engine()
        memory = Memory.merged(engine, 1)
        ksmcore.start(sleep_millisecs=1)
        close_all_fds()
        young = Memory(engine, 2)
        done = engine.stats().full_scans
        while engine.stats().full_scans < done + 4:
            memory.check()
        assert engine.stats().pages_sharing == 2 * N_PAGES
        assert engine.scanning
        ksmcore.stop()
        young.check()

    assert in_child(work) == 0


def test_writes_are_tracked_again_after_it():
    if ksmcore.features()["tracking"] is not None:
        pytest.skip("no tracking here")

    def work() -> None:
        engine = ksmcore.Engine()
        quiet = engine.array(random_pages(1, 64))
        for _ in range(4):
            engine.scan()
        assert engine.stats().pages_quiet == 64
        close_all_fds()
        for _ in range(4):
            engine.scan()
        assert engine.stats().pages_quiet == 64
        assert engine.scan().pages_hashed == 0
        quiet[7 * PAGE] ^= 1
        assert engine.scan().pages_hashed == 1
        engine._core.check()
        engine.close()

    assert in_child(work) == 0


def test_nobody_joins_what_is_out_of_reach():
    """Equal pages find each other anew; copies get bytes of their own."""

    def work() -> None:
        engine = ksmcore.Engine()
        memory = Memory.merged(engine, 1)
        close_all_fds()
        engine.scan()
        copy = engine.copy(memory.arrays[0])
        assert np.array_equal(copy, memory.expected[0])
        engine._core.check()
        again = Memory(engine, 1)
        engine.dedup()
        engine._core.check()
        # The copy and the two arrays share, and so do the two from before.
        assert engine.stats().pages_shared == 2 * N_PAGES
        assert engine.stats().pages_sharing == 3 * N_PAGES
        for one in (memory, again):
            one.check()
        engine.close()

    assert in_child(work) == 0


def test_what_is_out_of_reach_goes_with_its_last_sharer():
    def work() -> None:
        engine = ksmcore.Engine()
        memory = Memory.merged(engine, 1)
        other = Memory.merged(engine, 2)
        n_views = views()
        close_all_fds()
        engine.scan()
        memory.write(3)
        other.arrays.clear()
        other.expected.clear()
        engine.scan()
        assert engine.dedup().bytes_saved == N_PAGES * PAGE
        engine._core.check()
        assert engine.stats().store_pages == N_PAGES
        assert views() == n_views
        # Its pages became equal again to what lies under them, which is another file's.
        memory.write(1)
        engine.scan()
        engine.dedup()
        engine.scan()
        memory.check()
        engine._core.check()
        engine.close()
        memory.check()
        for array in memory.arrays:
            assert not store_bytes(*extent(array))

    assert in_child(work) == 0


# ---- forks ---------------------------------------------------------------------------------------


def test_after_a_fork_what_is_new_goes_to_another_file(engine):
    memory = Memory.merged(engine, 1)
    (first,) = engine._core.store_fds
    with Child(lambda pause: (pause(), memory.check())) as child:
        child.paused()
        before = os.fstat(first).st_blocks
        young = Memory.merged(engine, 2)
        assert os.fstat(first).st_blocks == before
        assert len(engine._core.store_fds) == 2
        # What was shared goes on being shared, with newcomers too.
        third = engine.array(memory.expected[0])
        assert engine.dedup().bytes_saved == N_PAGES * PAGE
        assert np.array_equal(third, memory.expected[0])
        engine._core.check()
        child.end()
    young.check()
    memory.check()
    assert held_pages(engine) == 2 * N_PAGES


def test_without_new_pages_a_fork_makes_no_file(engine):
    memory = Memory.merged(engine, 1)
    for _ in range(3):
        assert in_child(memory.check) == 0
        engine.scan()
        assert len(engine._core.store_fds) == 1


def test_a_file_that_nothing_is_used_of_goes(engine):
    memory = Memory.merged(engine, 1)
    for seed in range(2, 8):
        assert in_child(memory.check) == 0
        memory.write(seed)
        engine.scan()
        engine.dedup()
        engine.scan()
        assert len(engine._core.store_fds) == 1
        assert held_pages(engine) == N_PAGES
        memory.check()
    engine._core.check()


def test_there_are_only_so_many_files(engine):
    """The least of what cannot be written any more gets out of reach, and stays right."""
    memories = []
    for seed in range(2 * MAX_FILES):
        memories.append(Memory.merged(engine, seed, 4 + seed % 3))
        assert in_child(memories[0].check) == 0
        assert len(engine._core.store_fds) <= MAX_FILES
        engine._core.check()
    stats = engine.stats()
    assert stats.pages_shared == stats.pages_sharing == sum(4 + n % 3 for n in range(len(memories)))
    for n, memory in enumerate(memories):
        memory.check()
        memory.write(1000 + n)
    engine.scan()
    engine.dedup()
    for memory in memories:
        memory.check()
    engine._core.check()
    engine.scan()
    assert len(engine._core.store_fds) == 1
    assert engine.stats().store_pages == engine.stats().pages_shared


def test_pages_that_were_written_over_a_file_that_went_are_plain_after_all(engine):
    """Nothing is shared of it, but the mapping is still there: it is known for ours."""
    memory = Memory.merged(engine, 1)
    assert in_child(memory.check) == 0
    memory.write(2)
    engine.scan()
    Memory.merged(engine, 3)
    engine.scan()
    engine.scan()
    assert engine.scan().skipped["altered"] == 0
    for array in memory.arrays:
        engine.unregister(array)
        assert is_plain(*extent(array))
    memory.check()


# ---- limits on the size of files -----------------------------------------------------------------


def limited(n_bytes: int) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))


# What may be merged at most: of each file the first page is never used.
@pytest.mark.parametrize(
    ("limit", "most"),
    [
        (0, 0),
        (PAGE, 0),
        (2 * PAGE, MAX_FILES),
        (3 * PAGE + 1, 2 * MAX_FILES),
        (100 * PAGE, 1000),
        (70 << 20, 1000),
    ],
)
@pytest.mark.parametrize("default", [False, True], ids=["", "the signal ends a process"])
def test_under_a_limit_there_are_more_files_and_then_a_reason(limit, most, default):
    def work() -> None:
        if default:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        limited(limit)
        engine = ksmcore.Engine()
        memory = Memory(engine, 1, 1000)
        report = engine.dedup()
        assert engine.stats().pages_shared == most
        assert report.skipped["file_size"] == 1000 - most
        assert report.skipped["store"] == 0
        memory.check()
        engine._core.check()
        limited(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
        engine.dedup()
        assert engine.stats().pages_shared == 1000
        memory.check()
        engine.close()

    assert in_child(work) == 0


def test_a_limit_that_comes_later():
    def work() -> None:
        engine = ksmcore.Engine()
        first = Memory.merged(engine, 1, 200)
        limited(100 * PAGE)
        # The file is longer than that already: what is new goes to others.
        second = Memory(engine, 2, 150)
        assert engine.dedup().skipped["file_size"] > 0
        engine.dedup()
        assert engine.stats().pages_shared == 350
        engine._core.check()
        first.check()
        second.check()
        engine.close()

    assert in_child(work) == 0


def test_a_signal_that_waits_already_is_left_to_wait():
    """SIGXFSZ of the program's own, which blocks it; and none of ours reaches a handler."""

    def work() -> None:
        came = []
        signal.signal(signal.SIGXFSZ, lambda *_: came.append(1))
        limited(2 * PAGE)
        with ksmcore.Engine() as engine:
            memory = Memory(engine, 1)
            engine.dedup()
            assert came == []
            assert engine.stats().skipped["file_size"] > 0
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGXFSZ])
            signal.raise_signal(signal.SIGXFSZ)
            engine.dedup()
            assert signal.sigpending() == {signal.SIGXFSZ}
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGXFSZ])
            assert came == [1]
            memory.check()

    assert in_child(work) == 0
