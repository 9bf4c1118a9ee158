"""Signals: handlers that write into merged memory, or come and go; threads that block SIGSEGV, or
that read what goes away."""

import ctypes
import logging
import signal
import threading

import numpy as np
import pytest

import ksmcore
from helpers.detector import WORDS, has_merged, private_pages
from helpers.handlers import N_WORDS, SOURCE, Handlers
from helpers.libc import libc
from helpers.loose import Loose, call
from helpers.memory import PAGE, private_memory, random_pages
from helpers.native import compiled
from helpers.processes import run_python
from helpers.waiting import wait_until
from ksmcore._engine.passes import EngineClosedError
from ksmcore._kernel import procfs
from ksmcore._testing import faults, hooks

N_PAGES = 64


# ---- handlers that write -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return ctypes.CDLL(str(compiled(tmp_path_factory.mktemp("handlers"), [SOURCE])))


@pytest.fixture
def words(engine):
    """Pages of few contents, registered."""
    _, pages = private_pages(N_PAGES)
    pages[:, :-N_WORDS] = np.arange(N_PAGES)[:, None] % 3 + 1
    engine.register(pages)
    return pages


def check(engine, pages, handlers):
    """What the handler wrote is there, and so is all the rest."""
    assert handlers.n_wrong == 0
    assert np.array_equal(
        pages[:, :-N_WORDS],
        np.broadcast_to(np.arange(N_PAGES)[:, None] % 3 + 1, (N_PAGES, WORDS - N_WORDS)),
    )
    engine._core.check()


def test_a_handler_writes_on_the_thread_that_scans(engine, words, library):
    handlers = Handlers(library, words, n_each=N_PAGES, pause_us=50)
    me = threading.get_native_id()

    def has_met() -> bool:
        engine.dedup()
        return has_merged(engine, 16 * N_PAGES) and handlers.n_runs(me) > 500

    with handlers.running():
        wait_until(has_met)
    check(engine, words, handlers)


def test_a_handler_writes_on_threads_that_unmerge_and_copy(engine, words, library):
    handlers = Handlers(library, words)
    stop = threading.Event()
    failed = []

    def unmerge() -> None:
        try:
            while not stop.is_set():
                engine.unmerge()
                engine.unregister(words)
                engine.register(words)
                # Merged, written, and seen to be written; or the next turn may come too early.
                engine.dedup()
                engine.dedup()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=unmerge)

    def has_met() -> bool:
        engine.dedup()
        n_runs = handlers.n_runs(thread.native_id or 0)
        return bool(failed) or (has_merged(engine, 1) and n_runs > 50)

    with handlers.running():
        thread.start()
        wait_until(has_met)
        stop.set()
        thread.join()
    assert failed == []
    check(engine, words, handlers)


def test_no_handler_runs_on_the_scanners_thread(engine, words, library):
    handlers = Handlers(library, words)

    def has_met() -> bool:
        return has_merged(engine, 4 * N_PAGES) and handlers.n_runs() > 200

    with engine.start(sleep_millisecs=0):
        scanner = threads_of_ours()
        assert len(scanner) == 1
        with handlers.running():
            wait_until(has_met)
            assert [handlers.n_runs(tid) for tid in scanner] == [0]
    check(engine, words, handlers)


def threads_of_ours():
    """Numbers of threads that Python's module threading does not know, and that block SIGUSR2."""
    known = {thread.native_id for thread in threading.enumerate()}
    masks = {}
    for status in procfs.TASKS.glob("*/status"):
        masks[int(status.parent.name)] = int(procfs.words(status).get("SigBlk", "0"), 16)
    bit = 1 << (signal.SIGUSR2 - 1)
    return [tid for tid, mask in masks.items() if tid not in known and mask & bit]


# ---- handlers of others that come and go ---------------------------------------------------------

COMING_AND_GOING = """
    import ctypes, faulthandler, sys, numpy as np, ksmcore
    from ksmcore._testing import hooks
    engine = ksmcore.Engine(guard=sys.argv[1])
    a, b = engine.zeros(1 << 20, np.uint8), engine.zeros(1 << 20, np.uint8)
    a[:] = b[:] = np.arange(1 << 20) // 4096 % 250
    def with_pass(change):
        todo = [change]
        b[::4096] ^= 1
        engine.dedup(progress=lambda done, total: todo and todo.pop()())
        assert not todo
"""


@pytest.mark.parametrize("n_times", [1, 20])
def test_a_true_crash_ends_the_process_after_handlers_came_and_went(guard, n_times):
    """More often than there are links in a chain."""
    done = run_python(
        COMING_AND_GOING,
        f"""
        for n in range({n_times}):
            with_pass(faulthandler.enable)
            with_pass(faulthandler.disable)
        assert not hooks.handler_installed()
        print("before", flush=True)
        ctypes.string_at(16)
        """,
        flags=(),
        arguments=[guard],
    )
    assert (done.stdout, done.stderr) == ("before\n", "")
    assert done.returncode == -11


@pytest.mark.parametrize("last", ["enable", "disable"])
def test_a_true_crash_in_a_pass_ends_the_process_after_handlers_came_and_went(guard, last):
    done = run_python(
        COMING_AND_GOING,
        f"""
        for n in range(10):
            with_pass(faulthandler.enable)
            engine.dedup()
            with_pass(faulthandler.disable)
        with_pass(faulthandler.{last})
        def crash():
            ctypes.string_at(16)
        print("before", flush=True)
        with_pass(crash)
        """,
        flags=(),
        arguments=[guard],
    )
    assert done.stdout == "before\n"
    assert done.returncode == -11
    assert ("in crash" in done.stderr) == (last == "enable")


def test_a_handler_that_is_enabled_between_passes_stays(guard):
    done = run_python(
        COMING_AND_GOING,
        """
        for n in range(20):
            with_pass(faulthandler.enable)
            engine.dedup()
            with_pass(faulthandler.disable)
            faulthandler.enable()
            engine.dedup()
            assert faulthandler.is_enabled()
            assert not hooks.handler_installed()
            faulthandler.disable()
        faulthandler.enable()
        engine.dedup()
        def crash():
            ctypes.string_at(16)
        crash()
        """,
        flags=(),
        arguments=[guard],
    )
    assert done.returncode == -11
    assert "in crash" in done.stderr


# ---- threads that block SIGSEGV ------------------------------------------------------------------


class Blocking(threading.Thread):
    """Blocks SIGSEGV until it is told to unblock it, or to end."""

    def __init__(self, name: str = "request-7") -> None:
        super().__init__(name=name)
        self.blocks = threading.Event()
        self.unblock = threading.Event()
        self.unblocked = threading.Event()
        self.end = threading.Event()

    def run(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGSEGV])
        self.blocks.set()
        self.unblock.wait()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGSEGV])
        self.unblocked.set()
        self.end.wait()

    def __enter__(self):
        self.start()
        self.blocks.wait()
        return self

    def finish(self) -> None:
        self.unblock.set()
        self.end.set()
        self.join()

    def __exit__(self, *_exception: object) -> None:
        self.finish()


@pytest.fixture
def mprotect():
    """An engine with the guard that needs the signal, which nothing keeps out of masks."""
    with ksmcore.Engine(guard="mprotect", hold_calls=False) as engine:
        yield engine
        engine._core.check()


@pytest.fixture
def twins(mprotect, rng):
    source = random_pages(rng, N_PAGES)
    return mprotect.array(source), mprotect.array(source)


@pytest.mark.parametrize("how", ["unblocks", "ends"])
def test_no_window_is_opened_while_a_thread_blocks_sigsegv(mprotect, twins, how, caplog):
    with Blocking() as thread:
        for _ in range(3):
            report = mprotect.dedup()
            assert report.pages_merged == 0
            assert report.skipped["sigsegv_blocked"] == 2 * N_PAGES
        assert mprotect.stats().pages_sharing == 0
        (told,) = [r for r in caplog.records if "SIGSEGV" in r.getMessage()]
        assert told.levelno == logging.WARNING
        assert "request-7" in told.getMessage()
        if how == "ends":
            thread.finish()
        else:
            thread.unblock.set()
            thread.unblocked.wait()
        wait_until(lambda: mprotect.dedup().pages_merged, "merging")
        wait_until(lambda: mprotect.dedup() and mprotect.stats().pages_sharing == N_PAGES)
    assert np.array_equal(*twins)


def test_other_guards_do_not_mind(engine, guard, rng):
    if guard == "mprotect":
        pytest.skip("this one does")
    source = random_pages(rng, N_PAGES)
    twins = [engine.array(source) for _ in range(2)]
    with Blocking():
        report = engine.dedup()
    assert report.pages_merged == 2 * N_PAGES
    assert report.skipped["sigsegv_blocked"] == 0
    assert all(np.array_equal(twin, source) for twin in twins)


def test_the_way_back_waits_and_then_says_why_not(mprotect, twins):
    mprotect.dedup()
    before = twins[0].copy()
    with Blocking() as thread:
        with pytest.raises(RuntimeError, match="blocks SIGSEGV"):
            mprotect.unmerge()
        assert np.array_equal(twins[0], before)
        thread.unblock.set()
        thread.unblocked.wait()
        mprotect.unmerge()
    assert mprotect.stats().pages_sharing == 0
    assert all(np.array_equal(twin, before) for twin in twins)


def test_a_thread_that_writes_with_sigsegv_blocked_survives():
    """As servers have them that block all signals in the threads for requests."""
    done = run_python(
        """
        import signal, threading, numpy as np, ksmcore
        from helpers.waiting import wait_until
        engine = ksmcore.Engine(guard="mprotect", hold_calls=False)
        frames = [engine.array(np.ones(1 << 16, np.uint8)) for _ in range(8)]
        stop, failed = threading.Event(), []
        def work(k):
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
            n = 0
            while not stop.is_set():
                n += 1
                frame = frames[n % 4 * 2 + k]
                frame[:] = n % 3 + 1
                if not (frame == n % 3 + 1).all():
                    failed.append(n)
        threads = [threading.Thread(target=work, args=(k,)) for k in range(2)]
        with engine.start(sleep_millisecs=0):
            wait_until(lambda: engine.stats().pages_sharing)
            for thread in threads:
                thread.start()
            late = [engine.array(np.full(1 << 16, 9, np.uint8)) for _ in range(8)]
            wait_until(lambda: engine.stats().skipped["sigsegv_blocked"] > 1000)
            stop.set()
            for thread in threads:
                thread.join()
            merged = engine.stats().pages_merged
            wait_until(lambda: engine.stats().pages_merged > merged)
        assert not failed and all((frame == 9).all() for frame in late)
        """,
        flags=(),
    )
    assert done.returncode == 0, done.stderr


def test_threads_that_write_into_no_memory_of_the_program_may_block_it(mprotect, twins):
    named = threading.Event()

    class OfALibrary(Blocking):
        def run(self) -> None:
            libc.prctl(15, b"ZMQbg/IO/0", 0, 0, 0)  # PR_SET_NAME
            named.set()
            super().run()

    with OfALibrary():
        assert named.is_set()
        assert mprotect.dedup().pages_merged == 2 * N_PAGES
    assert np.array_equal(*twins)


# ---- threads that read what goes away ------------------------------------------------------------


@pytest.mark.parametrize("blocks", [False, True])
def test_every_thread_that_reads_has_a_place(engine, blocks):
    """More at once than one block of places has; each comes back from memory that is not there."""
    n_threads = 90
    gone = Loose(np.ones((1, PAGE), np.uint8))
    call("mprotect", gone.addr, PAGE, 0)
    there = Loose(np.ones((1, PAGE), np.uint8))
    all_in, found = threading.Barrier(n_threads), []
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])

    def read() -> None:
        if blocks:
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
        hooks.enter_reader()
        try:
            all_in.wait()
            answers = [hooks.can_read(addr) for addr in (gone.addr, there.addr, gone.addr)]
        finally:
            hooks.leave_reader()
        found.append((answers, signal.pthread_sigmask(signal.SIG_BLOCK, []) == mask))

    threads = [threading.Thread(target=read) for _ in range(n_threads)]
    entered = engine._core.enter_guard()
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        engine._core.leave_guard(entered)
    assert found == [([False, True, False], True)] * n_threads
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
    call("mprotect", gone.addr, PAGE, 3)
    gone.unmap()
    there.unmap()


def test_many_engines_scan_and_restore_what_goes_away(guard):
    """Each in a thread of its own, while another thread takes the memory away and gives it back."""
    n_threads, n_rounds = 90, 1
    source = np.arange(N_PAGES)[:, None] % 5 + np.ones((1, PAGE), np.uint8)
    engines = [ksmcore.Engine(guard=guard) for _ in range(n_threads)]
    buffers = [private_memory(N_PAGES) for _ in engines]
    views = [np.frombuffer(buffer, np.uint8).reshape(N_PAGES, PAGE) for buffer in buffers]
    stop, failed = threading.Event(), []
    begun = threading.Barrier(n_threads)
    for engine, view in zip(engines, views, strict=True):
        view[:] = source
        engine.register(view)

    def work(engine: ksmcore.Engine) -> None:
        begun.wait()
        for _ in range(n_rounds):
            try:
                engine.dedup()
                engine.unmerge()
            except RuntimeError:
                pass  # what cannot be read cannot be restored
            except BaseException as error:
                failed.append(error)

    def take_away() -> None:
        addresses = [view.__array_interface__["data"][0] for view in views]
        while not stop.is_set():
            for addr in addresses:
                call("mprotect", addr, N_PAGES // 2 * PAGE, 0)
                call("mprotect", addr, N_PAGES // 2 * PAGE, 3)

    taker = threading.Thread(target=take_away)
    threads = [threading.Thread(target=work, args=(engine,)) for engine in engines]
    taker.start()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stop.set()
    taker.join()
    assert failed == []
    for engine, view in zip(engines, views, strict=True):
        assert np.array_equal(view, source)
        engine._core.check()
        engine.close()
        assert np.array_equal(view, source)


@pytest.mark.parametrize("n_failures", [1, 50])
def test_what_goes_away_while_it_is_restored_is_looked_at_again(engine, rng, n_failures):
    """A thread may take pages away after they were seen to be there, and give them back."""
    source = random_pages(rng, N_PAGES)
    a, b = private_memory(N_PAGES), private_memory(N_PAGES)
    regions = [engine.register(buffer) for buffer in (a, b)]
    for buffer in (a, b):
        np.frombuffer(buffer, np.uint8)[:] = source
    assert engine.dedup().pages_merged == 2 * N_PAGES
    faults.inject("mremap", 14, count=n_failures)  # EFAULT
    regions[0].close()
    assert faults.clear() == 0
    assert np.array_equal(np.frombuffer(a, np.uint8), source)
    engine.unmerge()
    assert np.array_equal(np.frombuffer(b, np.uint8), source)


def test_what_goes_away_again_and_again_is_said_to_be_away(engine, rng):
    source = random_pages(rng, N_PAGES)
    a, b = engine.array(source), private_memory(N_PAGES)
    np.frombuffer(b, np.uint8)[:] = source
    region = engine.register(b)
    engine.dedup()
    faults.inject("mremap", 14, count=1_000_000)
    with pytest.raises(RuntimeError, match="cannot be read and written any more"):
        region.close()
    assert not region.closed
    faults.clear()
    region.close()
    assert np.array_equal(np.frombuffer(b, np.uint8), source)
    assert np.array_equal(a, source)


# ---- closing -------------------------------------------------------------------------------------


def test_an_engine_that_is_closed_while_its_scanner_begins_logs_nothing(guard, caplog):
    for _ in range(20):
        engine = ksmcore.Engine(guard=guard, sleep_millisecs=0)
        engine.zeros(1 << 16, np.uint8)
        engine.start()
        passes = engine._open().passes
        closer = threading.Thread(target=engine.close)
        closer.start()
        closer.join()
        with pytest.raises(EngineClosedError):
            passes.begin_batches()
    assert caplog.records == []
