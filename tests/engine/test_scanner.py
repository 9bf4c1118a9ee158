"""The background scanner: what it merges, when it rests, and how it ends, whatever happens."""

import gc
import logging
import os
import threading
import time
import weakref

import numpy as np
import pytest

import ksmcore
from helpers.memory import PAGE
from helpers.processes import run_python
from helpers.waiting import WAIT_SECONDS, wait_until
from ksmcore._engine.scanner import LOOK_SECONDS
from ksmcore._kernel import procfs
from ksmcore._testing import hooks


def pass_over(engine, n=1):
    """Wait until n passes have begun and ended."""
    target = engine.stats().full_scans + n + 1
    wait_until(lambda: engine.stats().full_scans >= target, f"pass {target}")


def pages(engine, rng, n=64):
    array = engine.empty((n, PAGE), np.uint8)
    array[:] = rng.integers(1, 256, array.shape, dtype=np.uint8)
    return array


@pytest.fixture
def quick(engine, monkeypatch):
    """An engine whose scanner does not rest for long, whatever a pass took of a processor."""
    monkeypatch.setattr("ksmcore._engine.pacing.Pacer.idle_rest", lambda *_: 0.0)
    engine.configure(sleep_millisecs=0)
    yield engine
    if not engine.closed:
        engine.stop()


@pytest.fixture
def full_buffer(private_buffer, rng):
    """Makes buffers of 64 pages that are written before anybody registers them."""

    def make():
        memory = private_buffer(64)
        rows = np.frombuffer(memory, np.uint8)
        rows[:] = rng.integers(1, 256, rows.size, dtype=np.uint8)
        return memory

    return make


class TestLife:
    def test_merges_in_the_background(self, quick, rng):
        a, b = pages(quick, rng), quick.empty((64, PAGE), np.uint8)
        b[:] = a
        assert not quick.scanning
        with quick.start() as engine:
            assert engine is quick
            assert quick.scanning
            assert quick.settings.run == quick.stats().run == 1
            wait_until(lambda: quick.stats().pages_sharing == 64)
        assert not quick.scanning
        assert quick.settings.run == 0
        assert quick.stats().pages_sharing == 64
        assert np.array_equal(a, b)

    def test_start_and_stop_any_number_of_times(self, quick):
        quick.stop()
        for _ in range(20):
            quick.start()
            quick.start(pages_to_scan=7)
            assert quick.settings.pages_to_scan == 7
            quick.stop()
            quick.stop()
        assert not quick.scanning

    def test_parks_while_nothing_is_registered_and_wakes(self, quick, full_buffer):
        buffer = full_buffer()
        with quick.start(sleep_millisecs=3_600_000):
            wait_until(lambda: quick._parts.scanner._is_resting)
            assert quick.stats().full_scans == 0
            quick.register(buffer)
            # Once, or twice: about to park, it may have seen the buffer before it is woken.
            wait_until(lambda: quick.stats().pages_hashed in (64, 128))

    def test_a_registration_ends_the_rest_of_an_idle_engine(self, quick, full_buffer, monkeypatch):
        rests = []

        def idle_rest(self, settings):
            rests.append(quick.stats().full_scans)
            return 3600.0

        monkeypatch.setattr("ksmcore._engine.pacing.Pacer.idle_rest", idle_rest)
        first, second = full_buffer(), full_buffer()
        quick.register(first)
        with quick.start():
            # With tracking the fourth pass reads nothing; without, every pass reads.
            if quick.stats().dirty == "pagemap":
                wait_until(lambda: rests)
                quick.register(second)
                wait_until(lambda: quick.stats().full_scans > rests[0])
                wait_until(lambda: quick.stats().pages_hashed >= 4 * 64)

    def test_after_a_pass_with_a_look_it_rests_whatever_is_registered(
        self, quick, rng, full_buffer, monkeypatch
    ):
        looks = []

        def rest_after_look(self, settings, look_seconds):
            looks.append(look_seconds)
            return 3600.0 if look_seconds > 0 else 0.0

        monkeypatch.setattr("ksmcore._engine.pacing.Pacer.rest_after_look", rest_after_look)
        source = rng.integers(0, 256, 16 * PAGE, np.uint8)
        arrays = [quick.array(source) for _ in range(2)]
        with quick.start():
            # Seen twice, and then merged, which takes a look.
            wait_until(lambda: looks and looks[-1] > 0)
            quick.register(full_buffer())
            assert quick.stats().pages_sharing == 16
            assert not quick._parts.scanner._is_resting
        assert looks[0] == 0
        assert all(np.array_equal(array, source) for array in arrays)

    @pytest.mark.parametrize("is_busy", [False, True])
    def test_it_sees_whether_the_program_wants_all_processors(
        self, quick, full_buffer, monkeypatch, is_busy
    ):
        told = []

        def rest(self, *_, is_crowded, **__):
            told.append(is_crowded)
            return 0.001

        n_processors = procfs.processors()
        speed = 1000 * n_processors if is_busy else 0.1
        monkeypatch.setattr(time, "process_time", lambda: time.monotonic() * speed)
        monkeypatch.setattr("ksmcore._engine.pacing.Pacer.rest", rest)
        quick.register(full_buffer())
        with quick.start():
            wait_until(lambda: len(told) > 2)
        assert set(told) == {is_busy}

    def test_close_stops_it(self, rng):
        engine = ksmcore.Engine(run=1, sleep_millisecs=0)
        array = pages(engine, rng)
        expected = array.copy()
        wait_until(lambda: engine.stats().full_scans > 2)
        engine.close()
        assert not engine.scanning
        assert np.array_equal(array, expected)

    @pytest.mark.filterwarnings("ignore:.*was never closed")
    def test_an_engine_that_nobody_knows_is_collected(self, private_buffer):
        def begin():
            engine = ksmcore.Engine(run=1, sleep_millisecs=0)
            engine.register(private_buffer(4))
            wait_until(lambda: engine.stats().full_scans > 2)
            return weakref.ref(engine), engine._parts.scanner._thread

        known, thread = begin()

        def is_gone():
            gc.collect()
            return known() is None

        wait_until(is_gone)
        wait_until(lambda: not thread.is_alive())

    @pytest.mark.filterwarnings("ignore:.*was never closed")
    def test_an_engine_that_nobody_knows_is_collected_while_its_scanner_is_parked(self):
        engine = ksmcore.Engine(run=1)
        known, thread = weakref.ref(engine), engine._parts.scanner._thread
        time.sleep(3 * LOOK_SECONDS)
        del engine

        def is_gone():
            gc.collect()
            return known() is None

        wait_until(is_gone)  # the scanner holds it for a moment at each look
        wait_until(lambda: not thread.is_alive())

    @pytest.mark.parametrize("ending", ["", "import sys; sys.exit(3)", "raise KeyError(1)"])
    def test_the_interpreter_ends(self, ending):
        script = (
            "import ksmcore, numpy as np\n"
            "a = ksmcore.zeros(1 << 20); a[::512] = range(2048)\n"
            "ksmcore.start(sleep_millisecs=0)\n"
            "while ksmcore.stats().full_scans < 2: pass\n" + ending
        )
        done = run_python(script, flags=())
        assert done.returncode == {"": 0, "import sys; sys.exit(3)": 3}.get(ending, 1)
        assert (done.stderr == "") == (not ending.startswith("raise"))
        assert "KeyError: 1" in done.stderr or not ending.startswith("raise")


class TestRun:
    def test_2_unmerges_and_keeps_what_is_registered(self, quick, rng):
        a = pages(quick, rng)
        b = quick.array(a)
        with quick.start():
            wait_until(lambda: quick.stats().pages_sharing == 64)
            quick.configure(run=2)
            assert not quick.scanning
            stats = quick.stats()
            assert (stats.run, stats.pages_shared, stats.regions) == (2, 0, 2)
            quick.configure(run=1)
            wait_until(lambda: quick.stats().pages_sharing == 64)
        assert np.array_equal(a, b)

    def test_0_keeps_what_is_merged(self, quick, rng):
        a = pages(quick, rng)
        b = quick.array(a)
        quick.configure(run=1)
        wait_until(lambda: quick.stats().pages_sharing == 64)
        quick.configure(run=0)
        assert quick.stats().pages_sharing == 64
        assert np.array_equal(a, b)

    @pytest.mark.parametrize("run", [3, -1])
    def test_others_are_refused(self, engine, run):
        with pytest.raises(ValueError, match="run must be"):
            engine.configure(run=run)


class TestSettings:
    @pytest.mark.parametrize("most", [1, 5, 100])
    def test_max_pages_to_merge_bounds_every_batch(self, quick, rng, monkeypatch, most):
        a = pages(quick, rng, 700)
        b = quick.array(a)
        zeros = quick.zeros((50, PAGE), np.uint8)
        zeros[:] = 0
        made = []

        make = quick._parts.passes.make_batch

        def make_batch(cursor, n_pages):
            before = quick._core.snapshot()
            cursor = make(cursor, n_pages)
            after = quick._core.snapshot()
            # A pair that becomes one shared page is one merge of two pages.
            founded = after["store_pages"] - before["store_pages"]
            grown = [after[name] - before[name] for name in ("pages_merged", "pages_zeroed")]
            made.append(sum(grown) - founded)
            return cursor

        monkeypatch.setattr(quick._parts.passes, "make_batch", make_batch)
        with quick.start(max_pages_to_merge=most):
            wait_until(lambda: quick.stats().bytes_saved == 750 * PAGE)
        assert max(made) == most
        assert sum(made) == 750
        assert np.array_equal(a, b)
        assert not zeros.any()

    def test_pages_to_scan_bounds_every_batch(self, quick, rng):
        array = pages(quick, rng, 2000)
        passes = quick._parts.passes
        cursor, begun = 0, passes.begin_batches()
        while cursor < 2**64 - 1:
            before = quick.stats().pages_hashed
            cursor, _ = passes.make_batch(cursor, 100)
            # A span of a block of pages is not cut.
            assert quick.stats().pages_hashed - before <= 100 + 512
        assert passes.end_batches(begun).pages_hashed == len(array)

    def test_changes_hold_from_the_next_batch_on(self, quick, rng):
        array = pages(quick, rng)
        with quick.start(sleep_millisecs=3_600_000):
            wait_until(lambda: quick.stats().pages_hashed == len(array))
            assert quick.stats().full_scans == 0
            quick.configure(sleep_millisecs=0)
            wait_until(lambda: quick.stats().full_scans > 5)
        assert array.any()


class TestOthersAtWork:
    def test_scans_and_dedups_of_the_program(self, quick, rng):
        a = pages(quick, rng)
        with quick.start():
            for n in range(30):
                b = quick.array(a)
                b[n] = n
                quick.dedup()
                quick.scan()
                assert np.array_equal(np.delete(a, n, 0), np.delete(b, n, 0))
                assert (b[n] == n).all()
            assert quick.scanning
        quick._core.check()

    def test_writers_and_registrations(self, quick, rng, private_buffer):
        """Values that change, each checked: a lost write would show."""
        a = pages(quick, rng, 256)
        failed = []
        ending = threading.Event()

        def write(rows):
            count = 0
            while not ending.is_set():
                count += 1
                rows[:, 0] = count & 0xFF
                if not (rows[:, 0] == count & 0xFF).all():
                    failed.append(count)
                if count % 8 == 0:
                    rows[:] = 5
                time.sleep(0.001)

        threads = [threading.Thread(target=write, args=(a[k::4],)) for k in range(4)]
        for thread in threads:
            thread.start()
        with quick.start():
            for _ in range(100):
                memory = private_buffer(8)
                view = np.frombuffer(memory, np.uint8)
                view[:] = 5
                with quick.register(memory):
                    assert (view == 5).all()
                assert (view == 5).all()
                del view
                memory.close()
        ending.set()
        for thread in threads:
            thread.join()
        assert not failed
        quick._core.check()

    def test_stop_within_a_pass_of_the_same_thread_is_refused(self, quick, rng):
        array = pages(quick, rng)
        seen = []

        def progress(done, in_all):
            with pytest.raises(RuntimeError, match="in the middle of a pass"):
                quick.stop()
            seen.append(quick.scanning)

        with quick.start():
            quick.scan(progress=progress)
            assert seen
            assert all(seen)
            assert quick.settings.run == 1
        assert array.any()


class TestErrors:
    def test_what_it_ends_by_is_kept_and_raised_by_stop(self, quick, rng, caplog):
        a = pages(quick, rng)
        b = quick.array(a)

        def fail(report):
            raise LookupError("no more passes")

        quick.on_pass = fail
        with caplog.at_level(logging.ERROR, "ksmcore"):
            quick.start()
            wait_until(lambda: not quick.scanning)
        assert "no more passes" in caplog.text
        assert quick.stats().scanner_error == "LookupError('no more passes')"
        with pytest.raises(LookupError, match="no more passes"):
            quick.stop()
        assert quick.stats().scanner_error is None
        quick.stop()
        assert not hooks.handler_installed()
        quick.on_pass = None
        with quick.start():
            wait_until(lambda: quick.stats().pages_sharing == 64)
        assert np.array_equal(a, b)

    def test_an_engine_whose_scanner_died_can_be_closed(self, rng, caplog):
        engine = ksmcore.Engine(sleep_millisecs=0)
        array = pages(engine, rng)

        def fail(report):
            raise OSError(5, "as ordered")

        engine.on_pass = fail
        engine.start()
        wait_until(lambda: not engine.scanning)
        engine.close()
        assert "as ordered" in caplog.text
        assert array.any()

    def test_the_callback_may_stop_the_scanner(self, quick, rng):
        reports = []

        def note(report):
            reports.append(report)
            if len(reports) == 3:
                quick.stop()

        quick.on_pass = note
        array = pages(quick, rng)
        quick.start()
        wait_until(lambda: not quick.scanning)
        time.sleep(0.05)
        assert len(reports) == 3
        assert reports[0].pages_hashed == len(array)
        assert quick.scan() is reports[-1]

    def test_the_callback_may_start_it_anew(self, quick, rng):
        threads = set()

        def note(report):
            threads.add(quick._parts.scanner._thread)
            if len(threads) < 4:
                quick.stop()
                quick.start()

        array = pages(quick, rng)
        quick.on_pass = note
        quick.start()
        wait_until(lambda: len(threads) == 4)
        wait_until(lambda: sum(thread.is_alive() for thread in threads) == 1)
        quick.stop()
        assert not any(thread.is_alive() for thread in threads)
        assert array.any()

    @pytest.mark.parametrize("orders", ["stop", "start", "stop start", "stop start stop", "close"])
    def test_the_callback_may_do_so_while_another_thread_stops_it(self, quick, rng, orders):
        inside, seen = threading.Event(), []

        def note(report):
            quick.on_pass = None
            inside.set()
            wait_until(lambda: not quick.scanning)  # `stop` waits for this thread
            for order in orders.split():
                getattr(quick, order)()
            seen.append(report)

        array = pages(quick, rng)
        expected = array.copy()
        quick.on_pass = note
        quick.start()
        assert inside.wait(WAIT_SECONDS)
        stopper = threading.Thread(target=quick.stop, daemon=True)
        stopper.start()
        stopper.join(WAIT_SECONDS)
        assert not stopper.is_alive()
        assert len(seen) == 1
        if orders != "close":
            assert quick.scanning == orders.endswith("start")
            if quick.scanning:
                pass_over(quick, 2)
            quick.stop()
        assert np.array_equal(array, expected)

    def test_whoever_stops_waits_for_the_end_of_the_batch(self, quick, rng):
        """Also where another has stopped it already."""
        array = pages(quick, rng)
        ends, inside = threading.Event(), threading.Event()

        def note(report):
            quick.on_pass = None
            inside.set()
            assert ends.wait(WAIT_SECONDS)

        quick.on_pass = note
        quick.start()
        assert inside.wait(WAIT_SECONDS)
        stoppers = [threading.Thread(target=quick.stop) for _ in range(2)]
        for stopper in stoppers:
            stopper.start()
            stopper.join(0.1)
            assert stopper.is_alive()
        ends.set()
        for stopper in stoppers:
            stopper.join(WAIT_SECONDS)
            assert not stopper.is_alive()
        assert not quick._parts.scanner._thread.is_alive()
        assert array.any()

    def test_programs_that_join_all_threads_do_not_wait_for_it(
        self, quick, rng, caplog, monkeypatch
    ):
        array = pages(quick, rng)
        before = threading.enumerate()
        with quick.start():
            wait_until(lambda: quick.stats().full_scans > 1)
            assert quick.scanning
            assert threading.enumerate() == before
        # Also where somebody asks for the current thread, as each message that is logged does.
        quick.on_pass = lambda report: threading.current_thread()
        caplog.set_level(logging.DEBUG, "ksmcore")
        seen = []

        def emit(record):
            if record.levelno == logging.DEBUG:  # by the scanner, of each pass
                seen.append(threading.enumerate())

        monkeypatch.setattr(caplog.handler, "emit", emit)
        with quick.start():
            passed = quick.stats().full_scans
            wait_until(lambda: quick.stats().full_scans > passed + 2)
            wait_until(lambda: threading.enumerate() == before)
        assert threading.enumerate() == before
        assert len(seen) > 2
        assert all(threads == before for threads in seen)
        assert array.any()

    def test_run_2_unmerges_though_the_scanner_had_died(self, quick, rng):
        a = pages(quick, rng)
        b = quick.array(a)
        quick.dedup()

        def fail(report):
            raise LookupError

        quick.on_pass = fail
        quick.start()
        wait_until(lambda: not quick.scanning)
        with pytest.raises(LookupError):
            quick.configure(run=2)
        assert quick.stats().pages_shared == 0
        assert np.array_equal(a, b)


class TestForks:
    pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")

    def test_parent_goes_on_and_child_does_not_scan(self, quick, rng):
        a = pages(quick, rng)
        b = quick.array(a)
        with quick.start():
            for n in range(40):
                pid = os.fork()
                if pid == 0:
                    good = not quick.scanning and quick.settings.run == 0
                    good = good and np.array_equal(a, b) and quick.stats().regions == 0
                    if n % 2 and good:
                        own = quick.array(a)
                        quick.start(sleep_millisecs=0)
                        while quick.stats().full_scans < 3:
                            pass
                        quick.stop()
                        good = np.array_equal(own, a)
                    os._exit(0 if good else 1)
                assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
                assert quick.scanning
            pass_over(quick)
            wait_until(lambda: quick.stats().pages_sharing == 64)
        quick._core.check()

    def test_two_threads_fork(self, quick, rng):
        array = pages(quick, rng)
        other = ksmcore.Engine(run=1, sleep_millisecs=0)
        codes = []

        def fork_often():
            for _ in range(25):
                pid = os.fork()
                if pid == 0:
                    os._exit(0)
                codes.append(os.waitpid(pid, 0)[1])

        threads = [threading.Thread(target=fork_often) for _ in range(2)]
        with quick.start():
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(WAIT_SECONDS)
                assert not thread.is_alive()
        other.close()
        assert codes == [0] * 50
        assert array.any()
