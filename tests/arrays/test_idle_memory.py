"""Memory that arrays gave back: what is not needed again goes to the kernel, the rest is kept."""

import errno
import gc
import resource
import time

import numpy as np
import pytest

import ksmcore
from helpers.kernels_view import present_pages, pss_bytes
from helpers.memory import PAGE
from helpers.processes import run_python
from helpers.waiting import wait_until
from ksmcore._arrays import arena
from ksmcore._testing import faults
from ksmcore._testing.arena import check_arena

MIB = 1 << 20
HOURS = 24 * 3600.0


@pytest.fixture(autouse=True)
def _nothing_idle():
    """And nothing goes by itself, if a test does not say when."""
    before = keep_for(HOURS)
    gc.collect()
    settle()
    yield
    gc.collect()
    settle()
    arena.set_limits(*before)
    assert check_arena() == 0
    ksmcore.default_engine()._core.check()


def keep_for(seconds, most_bytes=1 << 40):
    return arena.set_limits(most_bytes, int(seconds * 1e9))


def settle():
    """The second call discards what the first one began to watch."""
    arena.give_back_idle()
    arena.give_back_idle()


def dirty_bytes():
    return arena.numbers()["dirty_bytes"]


def made(n, n_bytes, rng):
    with ksmcore.allocator():
        arrays = [np.empty(n_bytes, np.uint8) for _ in range(n)]
    for array in arrays:
        array[:] = rng.integers(0, 256, n_bytes, np.uint8)
    return arrays


def test_what_was_free_all_the_while_goes_back(rng):
    arrays = made(100, 200_000, rng)
    with_arrays = pss_bytes()
    kept = arrays.pop(50)
    value = kept.copy()
    arrays.clear()
    arena.give_back_idle()  # it was free for no time at all
    assert dirty_bytes() > 18 * MIB
    assert pss_bytes() > with_arrays - 3 * MIB
    arena.give_back_idle()
    assert dirty_bytes() == 0
    assert pss_bytes() < with_arrays - 16 * MIB
    assert (kept == value).all()


@pytest.mark.parametrize("n_bytes", [100_000, MIB, 8 * MIB])
def test_what_is_needed_again_stays_at_hand(n_bytes, rng):
    made(24 * MIB // n_bytes, n_bytes, rng)
    n_needed = 8 * MIB // n_bytes
    for _ in range(3):
        arrays = made(n_needed, n_bytes, rng)
        arrays.clear()
        arena.give_back_idle()
        if n_bytes < 4 * MIB:  # of memory for larger ones, huge pages go as a whole
            assert dirty_bytes() >= n_needed * n_bytes
    assert dirty_bytes() < 2 * n_needed * n_bytes
    assert check_arena() == 0
    if n_bytes < 4 * MIB:
        with ksmcore.allocator():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            for _ in range(n_needed):
                arrays.append(np.empty(n_bytes, np.uint8))
                arrays[-1][:] = 1
            faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        assert faults < 8 * MIB // PAGE // 4
        del arrays[:]


def test_no_scanner_is_needed_for_it(rng):
    arrays = made(24, MIB, rng)
    keep_for(0.05)
    arrays.clear()

    def look():
        made(1, 100_000, rng)  # whatever comes or goes
        return dirty_bytes() < MIB

    wait_until(look)


def test_no_more_than_the_limit_is_kept(rng):
    keep_for(HOURS, 8 * MIB)
    for _ in range(3):
        made(24, MIB, rng).clear()
        assert dirty_bytes() <= 8 * MIB
    keep_for(HOURS, 64 * MIB)
    made(24, MIB, rng).clear()
    assert dirty_bytes() > 20 * MIB


def test_the_limit_is_a_setting(rng):
    with pytest.raises(ValueError, match="max_free_bytes must be from 0 "):
        ksmcore.install_allocator(max_free_bytes=-1)
    with pytest.raises(TypeError):
        ksmcore.install_allocator(max_free_bytes=1.5)
    ksmcore.install_allocator(max_free_bytes=6 * MIB)
    made(24, MIB, rng).clear()
    assert dirty_bytes() <= 6 * MIB
    ksmcore.install_allocator(max_free_bytes=0)
    assert dirty_bytes() <= 6 * MIB
    made(24, MIB, rng).clear()
    assert dirty_bytes() == 0
    ksmcore.uninstall_allocator()


@pytest.mark.parametrize("n_bytes", [100_000, MIB, 5 * MIB, 20 * MIB])
def test_large_amounts_that_are_needed_again_take_no_faults(n_bytes):
    """More than a chunk, all of it freed in between."""

    def faults_of_a_round():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        with ksmcore.allocator():
            arrays = [np.full(n_bytes, 1, np.uint8) for _ in range(200 * MIB // n_bytes)]
        assert all(array[-1] == 1 for array in arrays)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    faults_of_a_round()
    assert faults_of_a_round() < 200 * MIB // PAGE // 10
    n_chunks = arena.numbers()["chunks"]
    settle()
    assert arena.numbers()["chunks"] < n_chunks  # and goes as a whole
    assert check_arena() == 0


@pytest.mark.parametrize("n_bytes", [100_000, MIB, 20 * MIB])
def test_zeros_over_and_over_take_no_more_memory_each_time(n_bytes):
    n_rounds = 400 * MIB // n_bytes
    before = arena.numbers()["mapped_bytes"]
    with ksmcore.allocator():
        for _ in range(n_rounds):
            array = np.zeros(n_bytes, np.uint8)
            assert not array.any()
            array[:] = 7
            del array
    assert arena.numbers()["mapped_bytes"] <= before + 128 * MIB
    assert check_arena() == 0


def test_a_zeroed_array_where_free_memory_cannot_be_emptied():
    with ksmcore.allocator():
        arrays = [np.full(20 * MIB, 7, np.uint8) for _ in range(3)]
        arrays.clear()
        faults.inject("madvise", errno.ENOMEM, count=10_000)
        try:
            assert not np.zeros(20 * MIB, np.uint8).any()
        finally:
            faults.clear()
    assert check_arena() == 0


# ---- young memory --------------------------------------------------------------------------------


@pytest.fixture
def batch():
    """One batch of the background scanner over everything, to which what is younger than so many
    seconds is young; returns what was skipped for that."""
    passes = ksmcore.default_engine()._now().passes

    def make(young_seconds):
        passes.tidy(idle_only=True, young_seconds=young_seconds)
        before = ksmcore.stats()
        begun = passes.begin_batches()
        passes.make_batch(0, 1 << 40)
        passes.end_batches(begun)
        after = ksmcore.stats()
        return after.skipped["young"] - before.skipped["young"]

    return make


@pytest.mark.parametrize("n_bytes", [100_000, 5 * MIB, 40 * MIB])
def test_the_scanner_leaves_alone_what_was_just_made(n_bytes, rng, batch):
    arrays = made(1, n_bytes, rng)
    with ksmcore.allocator():
        arrays.append(arrays[0].copy())
    before = ksmcore.stats()
    for _ in range(3):
        assert batch(HOURS) >= 2 * (n_bytes // PAGE)
    after = ksmcore.stats()
    assert (after.pages_merged, after.pages_volatile) == (before.pages_merged, 0)
    for _ in range(3):
        assert batch(0) == 0
    assert ksmcore.stats().pages_merged - before.pages_merged >= n_bytes // PAGE
    assert np.array_equal(*arrays)


def test_the_scanner_comes_back_when_what_was_young_is_so_no_more(rng, monkeypatch):
    """However long it would rest after a pass that read nothing."""
    monkeypatch.setattr("ksmcore._engine.pacing.Pacer.idle_rest", lambda *_: 3600.0)
    arrays = made(1, 5 * MIB, rng)
    with ksmcore.allocator():
        arrays.append(arrays[0].copy())
    before = ksmcore.stats()
    with ksmcore.start():
        wait_until(lambda: ksmcore.stats().pages_sharing - before.pages_sharing >= 5 * MIB // PAGE)
    assert np.array_equal(*arrays)


def test_free_memory_is_left_alone_however_old(rng, batch):
    made(20, MIB, rng).clear()
    hashed = ksmcore.stats().pages_hashed
    assert batch(0) >= 20 * MIB // PAGE
    assert ksmcore.stats().pages_hashed == hashed
    assert dirty_bytes() >= 20 * MIB


def test_what_was_merged_and_written_is_no_saving_however_young(rng, batch):
    one = made(1, MIB, rng)[0]
    with ksmcore.allocator():
        others = [one.copy() for _ in range(8)]
        ksmcore.dedup()
        merged = ksmcore.stats().pages_sharing
        assert merged >= 8 * MIB // PAGE
        del others[:]
        others = [np.empty(MIB, np.uint8) for _ in range(8)]
        for i, other in enumerate(others):
            other[:] = rng.integers(0, 256, MIB, np.uint8)
            other[0] = i
    broken = ksmcore.stats().cow_breaks
    batch(HOURS)
    assert ksmcore.stats().cow_breaks - broken >= 8 * MIB // PAGE
    assert ksmcore.stats().pages_sharing <= merged - 8 * MIB // PAGE
    assert [int(other[0]) for other in others] == list(range(8))


def test_who_asks_for_a_scan_gets_all_of_it(rng):
    arrays = made(1, MIB, rng)
    with ksmcore.allocator():
        arrays.append(arrays[0].copy())
    ksmcore.scan()
    assert ksmcore.scan().pages_merged + ksmcore.scan().pages_merged >= MIB // PAGE


# ---- merged memory that was given back -----------------------------------------------------------


@pytest.mark.parametrize("act", [ksmcore.dedup, ksmcore.scan, ksmcore.unmerge])
def test_merged_memory_that_was_given_back_is_no_saving_any_more(act, rng):
    before = ksmcore.stats().bytes_saved
    one = made(1, MIB, rng)[0]
    with ksmcore.allocator():
        arrays = [one.copy() for _ in range(16)]
    ksmcore.dedup()
    assert ksmcore.stats().bytes_saved > before + 15 * MIB
    arrays.clear()
    report = act()
    assert ksmcore.stats().bytes_saved < before + PAGE * 32
    assert report is None or report.bytes_saved <= PAGE * 32
    with ksmcore.allocator():
        assert not np.zeros(16 * MIB, np.uint8).any()


def test_to_merge_one_array_leaves_what_is_not_idle(rng):
    arrays = made(20, MIB, rng)
    one = arrays.pop()
    arrays.clear()
    ksmcore.dedup(one)
    assert dirty_bytes() > 18 * MIB
    keep_for(0)
    ksmcore.dedup(one)
    ksmcore.dedup(one)
    assert dirty_bytes() == 0


def test_freed_memory_is_not_estimated(rng):
    arrays = made(3, MIB, rng)
    with ksmcore.allocator():
        copies = [arrays[0].copy() for _ in range(16)]
    before = ksmcore.estimate()
    assert before.bytes_saved >= 16 * MIB
    copies.clear()
    del arrays[1]
    after = ksmcore.estimate()
    assert dirty_bytes() > 16 * MIB  # it is there still
    assert before.bytes_saved - after.bytes_saved == 16 * MIB
    assert before.pages - after.pages == 17 * MIB // PAGE


@pytest.mark.parametrize("interval_ms", [1, 10_000])
def test_the_background_scanner_gives_it_back(interval_ms, rng):
    """Also while it rests."""
    keep_for(0.01)
    made(20, MIB, rng).clear()
    assert dirty_bytes() > 19 * MIB
    with ksmcore.start(sleep_millisecs=interval_ms, pages_to_scan=64):
        end = time.monotonic() + 60
        while dirty_bytes() > 0 and time.monotonic() < end:
            time.sleep(0.01)
        left = dirty_bytes()
    ksmcore.configure(sleep_millisecs=20, pages_to_scan=4096)
    assert left == 0


def test_a_scanner_that_never_rests_leaves_what_is_not_idle(rng):
    made(20, MIB, rng).clear()
    passes = ksmcore.stats().full_scans
    with ksmcore.start(sleep_millisecs=0):
        end = time.monotonic() + 60
        while ksmcore.stats().full_scans < passes + 4 and time.monotonic() < end:
            time.sleep(0.01)
    ksmcore.configure(sleep_millisecs=20)
    assert ksmcore.stats().full_scans >= passes + 4
    assert dirty_bytes() > 19 * MIB


def test_what_a_huge_page_brought_beyond_an_array_goes_with_it():
    """In a process of its own, where nothing else lies in the chunk."""
    done = run_python("""
        import numpy as np
        import ksmcore
        from ksmcore._arrays import arena
        from ksmcore._kernel import smaps
        from ksmcore._testing.arena import check_arena

        with ksmcore.allocator():
            array = np.empty((4 << 20) + 4096, np.uint8)
        array[:] = 1
        addr = array.__array_interface__["data"][0]

        def resident():
            return sum(vma.rss for vma in smaps.Snapshot().vmas_in(addr, addr + (8 << 20)))

        assert resident() >= 4 << 20
        ksmcore.scan(); ksmcore.scan()
        del array
        ksmcore.scan()
        assert arena.numbers()["dirty_bytes"] == 0
        assert resident() == 0, resident()
        assert ksmcore.stats().bytes_saved == 0, ksmcore.stats()
        assert check_arena() == 0
    """)
    assert (done.returncode, done.stderr) == (0, "")


def test_what_huge_pages_bring_to_free_memory_is_no_saving():
    """While the arrays live: behind the last one, and in a hole between two."""
    done = run_python("""
        import numpy as np
        import ksmcore
        from ksmcore._arrays import arena
        from ksmcore._testing.arena import check_arena

        rng = np.random.default_rng(1)
        arrays = []
        with ksmcore.allocator():
            for _ in range(3):
                arrays.append(np.empty((5 << 20) + 4096, np.uint8))
        del arrays[1]
        arena.give_back()  # the hole is clean
        for array in arrays:
            array[:] = rng.integers(1, 256, array.size, np.uint8)
        for act in (ksmcore.dedup, ksmcore.scan, ksmcore.scan, ksmcore.dedup):
            act()
            assert ksmcore.stats().ksm_zero_pages == 0, (act, ksmcore.stats())
        arrays[0][:] = 0
        assert ksmcore.dedup().pages_zeroed >= (5 << 20) // 4096
        assert ksmcore.stats().bytes_saved == (5 << 20) + 4096, ksmcore.stats()
        assert check_arena() == 0
    """)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("make", ["ksmcore.empty", "np.empty"])
def test_small_arrays_have_the_pages_that_were_written_and_no_others(make):
    """Whatever the setting of huge pages; also in memory that was merged before, and freed."""
    done = run_python(f"""
        import numpy as np
        import ksmcore
        from helpers.kernels_view import present_pages
        from helpers.memory import PAGE

        N_BYTES = 3 << 20
        N_PAGES = N_BYTES // PAGE
        values = np.random.default_rng(1).integers(1, 256, N_BYTES, np.uint8)
        with ksmcore.allocator():
            for _ in range(2):
                arrays = [{make}(N_BYTES, np.uint8) for _ in range(6)]
                for array in arrays:
                    array[7 * PAGE] = 1
                    assert sum(present_pages(array.ctypes.data, N_PAGES)) == 1
                before = ksmcore.stats().pages_scanned
                ksmcore.dedup()
                assert ksmcore.stats().pages_scanned - before == 6
                assert ksmcore.stats().ksm_zero_pages == 0, ksmcore.stats()
                for array in arrays:
                    array[:] = values
                ksmcore.dedup()
                assert ksmcore.stats().bytes_saved == 5 * N_BYTES, ksmcore.stats()
                del array
                arrays.clear()
                ksmcore.dedup()
                assert ksmcore.stats().bytes_saved == 0, ksmcore.stats()
    """)
    assert (done.returncode, done.stderr) == (0, "")


def test_memory_that_the_kernel_does_not_take_stays_and_goes_later(rng):
    arrays = made(40, MIB, rng)
    with ksmcore.allocator():
        arrays += [array.copy() for array in arrays]
    ksmcore.dedup()
    kept, values = arrays[1::8], [array.copy() for array in arrays[1::8]]
    arrays.clear()
    free = dirty_bytes()
    for call in ("madvise", "mmap"):
        faults.inject(call, errno.ENOMEM, count=10_000)
    try:
        arena.give_back()
    finally:
        faults.clear()
    assert check_arena() == 0
    assert dirty_bytes() == free > 0
    assert all(np.array_equal(a, b) for a, b in zip(kept, values, strict=True))
    arena.give_back()
    assert dirty_bytes() == 0
    assert all(np.array_equal(a, b) for a, b in zip(kept, values, strict=True))


def test_arrays_whose_pages_cannot_be_had_at_once(rng):
    ksmcore.scan()
    faults.inject("madvise", errno.EINVAL, count=1000)
    try:
        arrays = made(10, 200_000, rng)
    finally:
        faults.clear()
    copies = [array.copy() for array in arrays]
    ksmcore.scan()
    assert all(np.array_equal(a, b) for a, b in zip(arrays, copies, strict=True))


def test_small_arrays_have_their_pages_at_once_and_large_ones_and_zeros_do_not():
    rounds = 8
    with ksmcore.allocator():
        for n_bytes, make, at_once in (
            (200_000, np.empty, True),
            (1_000_000, np.empty, False),
            (200_000, np.zeros, False),
        ):
            arrays, found = [], 0
            ksmcore.scan()  # nothing dirty is left
            for _ in range(rounds):
                arrays.append(make(n_bytes, np.uint8))
                found += sum(present_pages(arrays[-1].ctypes.data, n_bytes // PAGE))
            assert (found > 0) == at_once, (n_bytes, make, found)


def test_other_engines_have_nothing_to_do_with_it(rng):
    made(20, MIB, rng).clear()
    with ksmcore.Engine() as engine:
        for _ in range(3):
            engine.scan()
    assert dirty_bytes() > 19 * MIB
