"""Forks of Python's find no thread of ours: those make way, and are there again after it.

What is asserted is what the kernel tells of the process at the last moment before the fork. Python
(3.12 and newer) counts the same for its warning.
"""

import os

import pytest

from helpers.cli import ksmcore
from helpers.processes import run_python

# The hook is there before ksmcore's, and so is called after it.
BEGIN = """
import os, signal, sys, threading, time
import warnings

def n_threads():
    with open("/proc/self/stat") as file:
        return int(file.read().rpartition(")")[2].split()[17])

counts, actions = [], []

def last():
    for action in list(actions):
        action()
    counts.append(n_threads())

if "NO_HOOK" not in os.environ:
    os.register_at_fork(before=last)
import numpy as np
import ksmcore
from ksmcore.cli.serving import Server

def fork(work=lambda: None):
    pid = os.fork()
    if pid == 0:
        work()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0

def until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)

def passes():
    return engine.stats().full_scans

def goes_on():
    before = passes()
    engine.register(bytearray(100_000))
    until(lambda: passes() > before)

engine = ksmcore.Engine()
arrays = [engine.array(np.arange(1 << 18) % 1000) for _ in range(10)]
"""

END = """
engine.stop()
assert all((array == np.arange(1 << 18) % 1000).all() for array in arrays)
engine.close()
"""


def run(*program, flags=("-W", "error"), **env):
    """Warnings are errors, but that of the forks of the test's own threads."""
    done = run_python(
        BEGIN,
        *program,
        END,
        flags=flags,
        timeout_seconds=150,
        OPENBLAS_NUM_THREADS="1",
        **env,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_no_thread_is_there_and_the_scanner_goes_on_where_it_was():
    run("""
        server = Server(lambda: {})
        engine.start(sleep_millisecs=0, pages_to_scan=10**9)  # batches of whole passes
        until(lambda: n_threads() == 3)
        for n in range(100):
            for array in arrays:
                array[:: 1 << 10] = n
            fork()
            assert engine.scanning
        assert counts == [1] * 100, counts
        for array in arrays:
            array[:] = np.arange(1 << 18) % 1000
        goes_on()
        until(lambda: n_threads() == 3)
        server.stop()
    """)


def test_a_rest_is_not_cut_short_and_one_in_it_is_still_woken():
    run("""
        engine.start(sleep_millisecs=10_000)
        until(lambda: engine.stats().scanner_seconds > 0)  # it rests
        scanned = engine.stats().pages_scanned
        for _ in range(50):
            fork()
        assert engine.stats().pages_scanned == scanned
        engine.configure(sleep_millisecs=1)
        until(lambda: passes() > 2)
        assert counts == [1] * 50, counts
    """)


def test_one_that_has_just_been_stopped_is_gone():
    run("""
        for _ in range(100):
            engine.start()
            engine.stop()
            fork()
        assert counts == [1] * 100, counts
    """)


def test_what_forks_by_the_library():
    run("""
        import multiprocessing, subprocess

        engine.start(sleep_millisecs=0)
        if sys.version_info < (3, 12):
            warnings.simplefilter("ignore")
        context = multiprocessing.get_context("fork")
        process = context.Process(target=int)
        process.start()
        process.join()
        assert process.exitcode == 0
        subprocess.run(["true"], preexec_fn=int, check=True)
        pid, fd = os.forkpty()
        if pid == 0:
            os._exit(0)
        os.close(fd)
        os.waitpid(pid, 0)
        assert counts == [1] * 3, counts
    """)


def test_a_child_starts_its_own():
    run("""
        def work():
            assert n_threads() == 1 and not engine.scanning
            engine.start(sleep_millisecs=0)
            array = engine.array(np.zeros(1 << 16))
            until(lambda: passes() > 0)
            fork()
            assert counts[-1] == 1
            engine.stop()

        engine.start(sleep_millisecs=0)
        for _ in range(10):
            fork(work)
        goes_on()
    """)


def test_forks_in_the_midst_of_forks_start_nothing_before_the_outer_one():
    run("""
        def inner():
            actions.clear()
            fork()
            assert n_threads() == 1
            assert engine.scanning

        engine.start(sleep_millisecs=0)
        for _ in range(20):
            actions.append(inner)
            fork()
        assert counts == [1] * 40, counts
        goes_on()
    """)


def test_threads_that_fork_at_a_time():
    """What one of them started again another may ask to make way at once."""
    run(
        """
        engine.start(sleep_millisecs=0)
        server = Server(lambda: {})

        def forks():
            for _ in range(60):
                fork()

        threads = [threading.Thread(target=forks) for _ in range(3)]
        for thread in threads:
            thread.start()
        for n in range(60):
            arrays[0][:] = n
            fork()
        for thread in threads:
            thread.join()
        arrays[0][:] = np.arange(1 << 18) % 1000
        goes_on()
        until(lambda: n_threads() == 3)
        server.stop()
        assert len(counts) == 240
    """,
        flags=("-W", "ignore"),  # these are threads of the program
    )


def test_whoever_stops_one_that_is_away_need_not_wait():
    run("""
        def stop():
            actions.clear()
            engine.stop()
            assert not engine.scanning

        for _ in range(20):
            engine.start(sleep_millisecs=0)
            actions.append(stop)
            fork()
            assert not engine.scanning
            assert n_threads() == 1
        engine.start()
        goes_on()
    """)


def test_where_there_is_no_further_thread_after_a_fork_it_comes_back_later():
    run("""
        import _thread

        def refused(*_):
            raise RuntimeError("can't start new thread")

        engine.start(sleep_millisecs=0)
        real, _thread.start_new_thread = _thread.start_new_thread, refused
        fork()
        assert n_threads() == 1
        fork()
        _thread.start_new_thread = real
        goes_on()
        _thread.start_new_thread = refused
        fork()
        _thread.start_new_thread = real
        fork()
        assert n_threads() == 2
        assert engine.scanning
    """)


@pytest.mark.parametrize("where", ["a callback of the scanner", "a callback of a pass"])
def test_forks_in_callbacks(where):
    """The first is in the thread that would have to make way; the other holds what the scanner
    waits for."""
    run(
        f"where = {where!r}",
        """
        n_forks = 0

        def callback(*_):
            global n_forks
            if n_forks < 20:
                fork()
                n_forks += 1

        if where == "a callback of the scanner":
            engine.on_pass = callback
        engine.start(sleep_millisecs=0)
        until(passes)
        while n_forks < 20:
            arrays[0][:] = n_forks
            engine.scan(progress=callback if where == "a callback of a pass" else None)
        arrays[0][:] = np.arange(1 << 18) % 1000
        goes_on()
    """,
        flags=("-W", "ignore"),  # it is a process of two threads, then
    )


def test_a_handler_that_raises_is_not_lost_in_a_hook():
    """Python drops what a hook raises, with a message; and one of the module logging, in Python
    code, is called after ours."""
    run(
        """
        class Now(BaseException):
            pass

        came = []

        def handler(*_):
            came.append(True)
            raise Now

        sys.unraisablehook = lambda *_: None
        signal.signal(signal.SIGALRM, handler)
        engine.start(sleep_millisecs=0, pages_to_scan=10**9)
        server = Server(lambda: {})
        random, n_raised = np.random.default_rng(1), 0
        for n in range(100):
            parent = os.getpid()
            came.clear()
            try:
                for array in arrays:
                    array[:: 1 << 10] = n
                # In the hook, most of the time.
                signal.setitimer(signal.ITIMER_REAL, random.random() * 0.001 + 1e-6)
                try:
                    pid = os.fork()
                    if pid == 0:
                        os._exit(0)
                    os.waitpid(pid, 0)
                finally:
                    if os.getpid() != parent:
                        os._exit(0)
                until(lambda: came)
            except Now:
                n_raised += 1
        # One that comes between the last line before and the hook is lost without us, too.
        assert n_raised >= 90, n_raised
        for array in arrays:
            array[:] = np.arange(1 << 18) % 1000
        goes_on()
        server.stop()
    """,
        NO_HOOK="1",
    )


def test_signals_are_let_in_again_in_parent_and_child():
    run("""
        import subprocess

        def blocked():
            return signal.pthread_sigmask(signal.SIG_BLOCK, [])

        def check():
            assert blocked() == {signal.SIGUSR1}

        def inner():
            actions.clear()
            fork(lambda: None)

        signal.pthread_sigmask(signal.SIG_SETMASK, [signal.SIGUSR1])
        engine.start(sleep_millisecs=0)
        fork(check)
        check()
        actions.append(inner)
        fork(check)
        check()
        subprocess.run(["true"], preexec_fn=check, check=True)
        check()
        # A program that is run by a fork's child has the signals of before.
        def becomes():
            code = "import signal; print(len(signal.pthread_sigmask(signal.SIG_BLOCK, [])))"
            os.execv(sys.executable, [sys.executable, "-c", code])
        fork(becomes)
    """)


def test_a_bell_is_never_half_rung():
    done = run_python("""
        import signal, time
        import numpy as np
        from ksmcore._core.making_way import Bell

        class Now(Exception):
            pass

        def handler(*_):
            raise Now

        signal.signal(signal.SIGALRM, handler)
        bell, random, n_raised = Bell(), np.random.default_rng(1), 0
        while n_raised < 300:
            try:
                signal.setitimer(signal.ITIMER_REAL, random.random() * 0.001 + 1e-6)
                while True:
                    bell.ring()
                    bell.ring()
                    bell.wait(0.001)
                    bell.wait(0.001)
            except Now:
                n_raised += 1
            bell.ring()
            assert bell.wait(0)
            assert not bell.wait(0)
    """)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("command", ["run", "estimate"])
def test_a_program_that_forks_has_its_own_output(tmp_path, command):
    program = tmp_path / "program.py"
    program.write_text(
        "import os\n"
        "import numpy as np\n"
        "arrays = [np.ones(1 << 17) for _ in range(8)]\n"
        "for _ in range(10):\n"
        "    if os.fork() == 0:\n"
        "        os._exit(0)\n"
        "    assert os.wait()[1] == 0\n"
        "print('done')\n"
    )
    env = {**os.environ, "PYTHONWARNINGS": "error", "OPENBLAS_NUM_THREADS": "1"}
    done = ksmcore(command, program, env=env)
    assert (done.returncode, done.stdout) == (0, "done\n")
    assert "Warning" not in done.stderr
