"""Large NumPy arrays come from the arena: whose memory they get, when, and that it goes back."""

import asyncio
import ctypes
import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import ksmcore
from helpers.kernels_view import present_pages, pss_bytes
from helpers.memory import PAGE, address
from helpers.processes import FORK_OFTEN, run_python
from ksmcore._arrays import arena
from ksmcore._testing.arena import check_arena, is_here

MIB = 1 << 20
LIBC = ctypes.CDLL(None)


@pytest.fixture(autouse=True)
def _uninstalled():
    gc.collect()
    yield
    ksmcore.uninstall_allocator()
    gc.collect()
    assert check_arena() == 0
    ksmcore.default_engine()._core.check()


def handler_name(array=None):
    try:
        from numpy._core.multiarray import get_handler_name
    except ImportError:
        from numpy.core.multiarray import get_handler_name
    return get_handler_name() if array is None else get_handler_name(array)


# ---- which arrays -------------------------------------------------------------------------------


def test_large_arrays_begin_on_a_page_and_small_ones_are_left_to_numpy():
    with ksmcore.allocator():
        large, small = np.ones(65536, np.uint8), np.ones(65535, np.uint8)
    assert is_here(large)
    assert address(large) % PAGE == 0
    assert not is_here(small)


def test_the_threshold_is_in_bytes():
    with ksmcore.allocator(threshold_bytes=1000):
        assert is_here(np.empty(125, np.float64))
        assert not is_here(np.empty(124, np.float64))


@pytest.mark.parametrize("wrong", [0, -1, 2**63])
def test_a_threshold_must_be_positive(wrong):
    with pytest.raises(ValueError, match="threshold_bytes"):
        ksmcore.allocator(wrong)
    with pytest.raises(ValueError, match="threshold_bytes"):
        ksmcore.install_allocator(wrong)


@pytest.mark.parametrize("wrong", ["64k", 1.5, None])
def test_a_threshold_must_be_an_integer(wrong):
    with pytest.raises(TypeError):
        ksmcore.allocator(wrong)


def test_the_block_ends_also_by_an_exception_and_may_be_nested():
    allocator = ksmcore.allocator()
    before = handler_name()

    def fail():
        with allocator:
            with allocator, ksmcore.allocator(10 * MIB):
                assert not is_here(np.empty(MIB, np.uint8))
            assert is_here(np.empty(MIB, np.uint8))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert handler_name() == before
    assert not is_here(np.empty(MIB, np.uint8))


def test_one_allocator_in_two_threads_that_take_turns():
    allocator, turns, found = ksmcore.allocator(), threading.Barrier(2, timeout=60), {}

    def work(name, *, first):
        turns.wait()
        if first:
            allocator.__enter__()
        turns.wait()
        if not first:
            allocator.__enter__()
            allocator.__enter__()
        turns.wait()
        if first:
            allocator.__exit__(None, None, None)
        turns.wait()
        if not first:
            allocator.__exit__(None, None, None)
        found[name] = is_here(np.empty(MIB, np.uint8))

    with ThreadPoolExecutor(2) as pool:
        ends = [pool.submit(work, "left", first=True), pool.submit(work, "within", first=False)]
        for end in ends:
            end.result()
    assert found == {"left": False, "within": True}


def entered_by(generator_of_block):
    generator = generator_of_block()
    next(generator)
    return generator


def test_a_block_that_is_left_in_another_context_or_order_takes_nothing_of_others():
    allocator = ksmcore.allocator()

    def block():
        with allocator:
            yield

    left = entered_by(block)

    def work():
        with ksmcore.allocator():
            left.close()
            inside = is_here(np.empty(MIB, np.uint8))
        return inside, is_here(np.empty(MIB, np.uint8))

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(work).result() == (True, False)

    def interleaved():
        outer, inner = ksmcore.allocator(), ksmcore.allocator(10 * MIB)
        before = handler_name()
        outer.__enter__()
        inner.__enter__()
        outer.__exit__(None, None, None)
        assert not is_here(np.empty(MIB, np.uint8))
        assert is_here(np.empty(10 * MIB, np.uint8))
        inner.__exit__(None, None, None)
        assert handler_name() == before

    with ThreadPoolExecutor(1) as pool:
        pool.submit(interleaved).result()
    assert is_here(np.empty(MIB, np.uint8))  # here the first one was entered, and never left
    allocator.__exit__(None, None, None)
    assert not is_here(np.empty(MIB, np.uint8))


def test_the_block_is_for_its_own_context():
    async def other(ready, done):
        ready.set()
        await done.wait()
        return is_here(np.empty(MIB, np.uint8))

    async def main():
        ready, done = asyncio.Event(), asyncio.Event()
        task = asyncio.create_task(other(ready, done))
        await ready.wait()
        with ksmcore.allocator():
            done.set()
            return await task

    assert asyncio.run(main()) is False


def test_installed_it_holds_for_running_and_new_threads_alike():
    ready, go = threading.Event(), threading.Event()
    made = []

    def make():
        ready.set()
        assert go.wait(60)
        made.append(np.ones(MIB, np.uint8))

    running = threading.Thread(target=make)
    running.start()
    assert ready.wait(60)
    ksmcore.install_allocator()
    go.set()
    running.join()
    with ThreadPoolExecutor(2) as pool:
        made += pool.map(lambda _: np.ones(MIB, np.uint8), range(4))
    assert len(made) == 5
    assert all(map(is_here, made))
    ksmcore.uninstall_allocator()
    assert not is_here(np.ones(MIB, np.uint8))


def test_the_handler_tells_its_name_and_the_default_stays_the_default():
    with ksmcore.allocator():
        assert handler_name() == "ksmcore"
        array = np.ones(MIB, np.uint8)
    assert handler_name(array) == "ksmcore"
    ksmcore.install_allocator()
    assert handler_name() == "default_allocator"
    array = np.ones(MIB, np.uint8)
    assert is_here(array)
    ksmcore.uninstall_allocator()
    assert handler_name(array) == "default_allocator"
    assert (array == 1).all()


# ---- contents -----------------------------------------------------------------------------------


def test_zeros_touches_no_page_also_where_other_arrays_were_before():
    with ksmcore.allocator():
        for _ in range(3):
            used = np.full(8 * MIB, 7, np.uint8)
            del used
        zeros = np.zeros(8 * MIB, np.uint8)
        # Huge pages of others may reach into both ends.
        assert sum(present_pages(zeros.ctypes.data, 8 * MIB // PAGE)) < 4 * MIB // PAGE
        assert not zeros.any()
        zeros[5] = 1
        assert zeros.sum() == 1


def test_resize_keeps_the_contents_across_the_threshold_and_back():
    values = np.arange(50_000, dtype=np.int64)
    with ksmcore.allocator():
        array = values.copy()
        assert is_here(array)
        for n in (50_001, 400_000, 5_000_000, 60_000, 100, 1, 100_000):
            array.resize(n, refcheck=False)
            kept = min(n, len(values))
            assert np.array_equal(array[:kept], values[:kept])
            values = values[:kept]
            assert not array[kept:].any() or n < len(array)
            assert check_arena() == 0
        small = np.arange(10)
        small.resize(100_000, refcheck=False)
        assert np.array_equal(small[:10], np.arange(10))
        assert not small[10:].any()


def test_a_large_array_that_becomes_small_gives_its_memory_back():
    with ksmcore.allocator():
        array = np.ones(200 * MIB, np.uint8)
        before = ksmcore.memory_info().rss
        array.resize(150 * MIB, refcheck=False)
        assert is_here(array)
        assert before - ksmcore.memory_info().rss > 40 * MIB
        array.resize(180 * MIB, refcheck=False)
        assert (array[: 150 * MIB : PAGE] == 1).all()
        array.resize(100_000, refcheck=False)
    assert before - ksmcore.memory_info().rss > 190 * MIB
    assert (array == 1).all()


class Arrays(RuleBasedStateMachine):
    """Any order of making, writing, growing, merging and giving back: every array keeps what was
    written to it."""

    def __init__(self):
        super().__init__()
        self.allocator = ksmcore.allocator()
        self.kept = []

    @rule(
        n_bytes=st.sampled_from([65536, 70_000, 100_000, 5 * PAGE + 65536, MIB, 5 * MIB, 40 * MIB]),
        value=st.integers(0, 255),
        zeroed=st.booleans(),
    )
    def make(self, n_bytes, value, zeroed):
        with self.allocator:
            array = np.zeros(n_bytes, np.uint8) if zeroed else np.empty(n_bytes, np.uint8)
        assert is_here(array)
        if zeroed:
            assert not array.any()
            value = 0
        else:
            array[:] = value
        self.kept.append([array, value])

    @precondition(lambda self: self.kept)
    @rule(data=st.data())
    def give_back(self, data):
        del self.kept[data.draw(st.integers(0, len(self.kept) - 1))]

    @precondition(lambda self: self.kept)
    @rule(data=st.data(), value=st.integers(1, 255))
    def write(self, data, value):
        one = data.draw(st.sampled_from(self.kept))
        one[0][:] = one[1] = value

    @precondition(lambda self: self.kept)
    @rule(data=st.data(), n_bytes=st.sampled_from([70_000, 300_000, 6 * MIB]))
    def resize(self, data, n_bytes):
        one = data.draw(st.sampled_from(self.kept))
        before = one[0].size
        with self.allocator:
            one[0].resize(n_bytes, refcheck=False)
        assert (one[0][:before] == one[1]).all()
        one[0][:] = one[1]

    @rule()
    def merge(self):
        ksmcore.dedup()

    @rule()
    def scan(self):
        ksmcore.scan()

    @rule()
    def give_back_what_is_idle(self):
        arena.give_back_idle()

    @invariant()
    def every_byte_is_right(self):
        for array, value in self.kept:
            assert array[0] == array[-1] == value
            assert (array == value).all()

    @invariant()
    def the_arena_adds_up(self):
        assert check_arena() == 0
        assert arena.numbers()["taken_bytes"] >= sum(array.nbytes for array, _ in self.kept)

    def teardown(self):
        self.every_byte_is_right()
        self.kept.clear()
        gc.collect()
        ksmcore.default_engine()._core.check()


TestArrays = Arrays.TestCase
TestArrays.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)


# ---- merging ------------------------------------------------------------------------------------


def test_arrays_are_merged_and_come_from_a_few_regions():
    regions_before = ksmcore.stats().regions
    with ksmcore.allocator():
        arrays = [np.arange(25_000, dtype=np.int32) for _ in range(1000)]
        assert all(map(is_here, arrays))
    assert ksmcore.stats().regions - regions_before <= 3
    before = pss_bytes()
    report = ksmcore.dedup()
    assert report.bytes_saved > 1000 * 24 * PAGE * 0.95
    assert before - pss_bytes() > 0.9 * report.bytes_saved
    expected = np.arange(25_000, dtype=np.int32)
    assert all(np.array_equal(array, expected) for array in arrays)


def test_the_memory_of_collected_arrays_goes_back_merged_or_not():
    start = pss_bytes()
    with ksmcore.allocator():
        different = [np.random.default_rng(i).bytes(MIB) for i in range(8)]
        arrays = [np.frombuffer(different[i % 8], np.uint8).copy() for i in range(200)]
    ksmcore.dedup()
    assert (arrays[199] == np.frombuffer(different[199 % 8], np.uint8)).all()
    scanned = ksmcore.stats().pages_sharing
    assert scanned > 190 * MIB // PAGE
    del arrays
    gc.collect()
    assert pss_bytes() - start < 50 * MIB  # 8 MiB of bytes, 32 MiB at hand
    ksmcore.uninstall_allocator()  # gives back the rest
    assert pss_bytes() - start < 16 * MIB
    assert ksmcore.stats().pages_sharing == 0
    assert ksmcore.stats().pages_shared == 0


def test_discarded_pages_are_not_scanned():
    with ksmcore.allocator():
        arrays = [np.random.default_rng(i).integers(0, 255, MIB, np.uint8) for i in range(100)]
    ksmcore.scan()
    kept = arrays[::10]
    del arrays
    gc.collect()
    ksmcore.uninstall_allocator()
    looked_at = ksmcore.scan().pages_scanned
    assert looked_at <= (len(kept) * MIB + 4 * MIB) // PAGE


def test_holes_in_merged_memory_keep_to_the_map_budget():
    """Every second array goes: to take each one's pages out of the mappings would take two more."""
    done = run_python("""
        import numpy as np
        import ksmcore
        from ksmcore._testing.arena import check_arena
        from ksmcore._kernel import smaps
        ksmcore.configure(map_budget=200)
        ksmcore.install_allocator()
        rng = np.random.default_rng(1)
        contents = [rng.integers(0, 255, 1 << 16, np.uint8) for _ in range(1000)]
        arrays = [[array.copy() for array in contents] for _ in range(2)]
        assert ksmcore.dedup().bytes_saved > 60 << 20
        before = smaps.count_maps()
        for some in arrays:
            some[1::2] = [None] * 500
        stats = ksmcore.stats()
        assert stats.maps_used <= stats.maps_allowed == 200
        assert smaps.count_maps() - before <= 200
        for some in arrays:
            assert all(np.array_equal(a, b) for a, b in zip(some, contents) if a is not None)
        zeros = [np.zeros(1 << 16, np.uint8) for _ in range(1200)]
        assert not any(array.any() for array in zeros)
        assert check_arena() == 0
    """)
    assert (done.returncode, done.stderr) == (0, "")


def test_zeros_are_zeros_where_merged_arrays_were():
    with ksmcore.allocator():
        arrays = [np.full(MIB, 9, np.uint8) for _ in range(100)]
        ksmcore.dedup()
        del arrays
        gc.collect()
        again = [np.zeros(MIB, np.uint8) for _ in range(150)]
    assert not any(array.any() for array in again)


def test_reused_memory_takes_writes_where_merged_arrays_were():
    with ksmcore.allocator():
        arrays = [np.full(100_000, 9, np.uint8) for _ in range(50)]
        ksmcore.dedup()
        survivor = arrays[25]
        del arrays
        again = [np.full(100_000, i, np.uint8) for i in range(49)]
    assert (survivor == 9).all()
    assert all((array == i).all() for i, array in enumerate(again))


def test_many_threads_make_write_and_give_back_while_the_scanner_runs():
    limits = arena.set_limits(0, 0)  # discarding happens with everything that comes or goes
    ksmcore.install_allocator()
    wrong = []

    def work(seed):
        rng = np.random.default_rng(seed)
        kept = []
        for i in range(300):
            value = int(rng.integers(0, 4))
            array = np.empty(int(rng.integers(65536, 400_000)), np.uint8)
            array[:] = value
            kept.append((array, value))
            if len(kept) > 20:
                array, value = kept.pop(int(rng.integers(0, 20)))
                if not (array == value).all():
                    wrong.append((seed, i))
                array[:] = 255
        wrong.extend((seed, -1) for array, value in kept if not (array == value).all())

    with ksmcore.start(sleep_millisecs=0):
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    arena.set_limits(*limits)
    assert wrong == []
    assert check_arena() == 0


def test_arrays_may_be_given_back_by_another_thread_and_after_it_was_uninstalled():
    ksmcore.install_allocator()
    arrays = [np.ones(MIB, np.uint8) for _ in range(10)]
    ksmcore.uninstall_allocator()
    taken = arena.numbers()["taken_bytes"]
    thread = threading.Thread(target=arrays.clear)
    thread.start()
    thread.join()
    assert arena.numbers()["taken_bytes"] == taken - 10 * MIB


def test_an_array_of_the_allocator_can_be_deduplicated_and_held_but_not_registered_again():
    with ksmcore.allocator():
        one, two = np.full(MIB, 3, np.uint8), np.full(MIB, 3, np.uint8)
    assert ksmcore.dedup(one, two).bytes_saved >= 2 * MIB - 16 * PAGE
    with ksmcore.hold(one):
        one[0] = 4
    with pytest.raises(ValueError, match="already registered"):
        ksmcore.register(one)
    with pytest.raises(ValueError, match="lies in memory"):
        ksmcore.unregister(one)
    assert two[0] == 3


def test_estimate_counts_the_arrays_also_while_they_are_given_back():
    with ksmcore.allocator():
        arrays = [np.arange(60 * MIB // 8) for _ in range(4)]
    found = ksmcore.estimate()
    assert found.bytes_saved >= 3 * 60 * MIB
    assert not is_here(np.empty(3))

    def give_back(done, n_pages):
        del done, n_pages
        if arrays:
            arrays.pop()

    ksmcore.estimate(progress=give_back)
    assert arrays == []
    gc.collect()
    before = arena.numbers()["chunks"]
    assert before <= 2
    assert ksmcore.estimate().bytes_saved < found.bytes_saved


# ---- processes ----------------------------------------------------------------------------------


def test_a_forked_child_keeps_its_arrays_and_makes_its_own():
    done = run_python("""
        import gc, os
        import numpy as np
        import ksmcore
        from ksmcore._arrays import arena
        from ksmcore._testing.arena import check_arena, is_here

        ksmcore.install_allocator()
        arrays = [np.full(1 << 20, i % 3 + 1, np.uint8) for i in range(60)]
        ksmcore.dedup()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                assert all((array == i % 3 + 1).all() for i, array in enumerate(arrays))
                del arrays[::2]
                fresh = [np.zeros(1 << 20, np.uint8) for _ in range(40)]
                assert all(map(is_here, fresh)) and not any(array.any() for array in fresh)
                for array in fresh:
                    array[:] = 5
                assert ksmcore.dedup().bytes_saved > 35 << 20
                assert all((array == 5).all() for array in fresh)
                for i, array in enumerate(arrays):
                    assert (array == (2 * i + 1) % 3 + 1).all()
                    array[:] = 7
                assert check_arena() == 0
                del array; arrays.clear(); fresh.clear(); gc.collect()
                assert check_arena() == 0 and arena.numbers()["taken_bytes"] == 0
                code = 0
            finally:
                os._exit(code)
        assert os.waitpid(pid, 0)[1] == 0
        assert all((array == i % 3 + 1).all() for i, array in enumerate(arrays))
        assert check_arena() == 0
    """)
    assert (done.returncode, done.stderr) == (0, "")


def test_forks_beside_threads_that_allocate():
    program = """
        import threading
        import ksmcore

        ksmcore.install_allocator()
        over = threading.Event()
        def work():
            while not over.is_set():
                np.ones(200_000, np.uint8)
        def tidy():
            while not over.is_set():
                arena.give_back_idle()
                arena.give_back()
        threads = [threading.Thread(target=one) for one in (work, work, work, tidy)]
        fork_often(threads, over.set, 40)
    """
    done = run_python(FORK_OFTEN, program)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("scanning", [False, True])
def test_arrays_that_outlive_the_interpreter(scanning):
    done = run_python(f"""
        import sys
        import numpy as np
        import ksmcore
        ksmcore.install_allocator()
        if {scanning}:
            ksmcore.start(sleep_millisecs=0)
        sys.kept = [np.full(1 << 20, i % 3, np.uint8) for i in range(50)]
        cycle = [np.ones(1 << 20)]
        cycle.append(cycle)
        class Late:
            def __init__(self):
                self.array = np.ones(1 << 20)
            def __del__(self):
                self.array = np.concatenate([self.array, self.array])
        sys.late = Late()
        ksmcore.dedup()
    """)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_closed_engine_leaves_its_arrays_as_they_are():
    done = run_python("""
        import gc
        import numpy as np
        import ksmcore
        from ksmcore._arrays import arena
        from ksmcore._testing.arena import check_arena
        ksmcore.install_allocator()
        arrays = [np.full(1 << 20, 3, np.uint8) for _ in range(50)]
        ksmcore.dedup()
        ksmcore.default_engine().close()
        assert all((array == 3).all() for array in arrays)
        del arrays[::2]
        more = [np.full(1 << 20, 4, np.uint8) for _ in range(50)]
        zeros = [np.zeros(1 << 20, np.uint8) for _ in range(50)]
        assert all((array == 3).all() for array in arrays)
        assert not any(array.any() for array in zeros)
        del arrays, more, zeros
        gc.collect()
        assert check_arena() == 0 and arena.numbers()["taken_bytes"] == 0
    """)
    assert (done.returncode, done.stderr) == (0, "")


def test_disabled_it_leaves_memory_alone():
    done = run_python(
        """
        import numpy as np
        import ksmcore
        from ksmcore._arrays import arena
        with ksmcore.allocator(), ksmcore.allocator(1):
            arrays = [np.ones(1 << 20, np.uint8) for _ in range(10)]
        ksmcore.install_allocator(1 << 16)
        arrays.append(np.ones(1 << 20, np.uint8))
        if ksmcore.features()["memory"] is None:
            ksmcore.install_allocator(1 << 16, memory="all")
        arrays.append(np.frombuffer(bytearray(b"\\1") * (1 << 20), np.uint8))
        assert arena.numbers()["chunks"] == 0
        ksmcore.uninstall_allocator()
        assert ksmcore.dedup().bytes_saved == 0
        assert ksmcore.stats().regions == 0
        assert all((array == 1).all() for array in arrays)
        """,
        KSMCORE_DISABLE="1",
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_where_the_kernel_knows_no_huge_pages():
    done = run_python("""
        import numpy as np
        import ksmcore
        from ksmcore._arrays import arena
        from ksmcore._testing import faults
        ksmcore.install_allocator()
        faults.inject("madvise", 22, count=1000)
        arrays = [np.empty(5 << 20, np.uint8) for _ in range(20)]
        assert arena.numbers()["chunks"] == 2, arena.numbers()
    """)
    assert (done.returncode, done.stderr) == (0, "")


def test_without_address_space_numpy_says_no_and_the_next_array_is_made():
    done = run_python("""
        import resource
        import numpy as np
        import ksmcore
        from ksmcore._arrays import arena
        ksmcore.install_allocator()
        kept = np.ones(1 << 20, np.uint8)
        with open("/proc/self/statm") as statm:
            used = int(statm.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (30 << 20), resource.RLIM_INFINITY))
        try:
            np.ones(1 << 30, np.uint8)
        except MemoryError:
            pass
        else:
            raise SystemExit("made")
        assert arena.numbers()["refused"] > 0
        more = [np.full(1 << 20, i, np.uint8) for i in range(20)]
        assert all((array == i).all() for i, array in enumerate(more)) and (kept == 1).all()
    """)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_scanner_that_ran_before_the_first_array_merges():
    done = run_python("""
        import time
        import numpy as np
        import ksmcore
        ksmcore.start(sleep_millisecs=0)
        time.sleep(0.1)
        ksmcore.install_allocator()
        arrays = [np.full(1 << 20, 3, np.uint8) for _ in range(50)]
        end = time.monotonic() + 60
        while ksmcore.stats().pages_sharing < 49 * 256 and time.monotonic() < end:
            time.sleep(0.01)
        assert ksmcore.stats().pages_sharing >= 49 * 256, ksmcore.stats()
        assert all((array == 3).all() for array in arrays)
    """)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not hasattr(LIBC, "mallinfo2"), reason="the C library does not tell")
@pytest.mark.parametrize("kept", [True, False])
def test_the_c_library_keeps_for_others_what_it_would_have_kept_without_us(kept):
    """It keeps freed blocks as large as those that it has seen freed, and sees none of NumPy's. For
    everybody's arrays only: else those of others would lie at any offset in a page."""
    done = run_python(
        """
        import ctypes, sys
        import numpy as np
        import ksmcore

        class Numbers(ctypes.Structure):
            _fields_ = [(name, ctypes.c_size_t) for name in "abcdefghij"]

        libc = ctypes.CDLL(None)
        libc.mallinfo2.restype = Numbers
        libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]

        def mapped_bytes():
            return libc.mallinfo2().e  # hblkhd: in blocks with a mapping each

        if sys.argv[1] == "True":
            ksmcore.install_allocator()
        with ksmcore.allocator():
            np.empty(6 << 20, np.uint8)
        before = mapped_bytes()
        assert libc.malloc(5 << 20)
        assert (mapped_bytes() == before) is (sys.argv[1] == "True")
        """,
        arguments=[str(kept)],
    )
    assert (done.returncode, done.stderr) == (0, "")
