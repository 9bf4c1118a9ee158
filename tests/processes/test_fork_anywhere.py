"""Forks from where Python runs code in the midst of everything: signal handlers and finalisers."""

from helpers.processes import run_python

BEGIN = """
import gc, os, signal, sys, time
import numpy as np
import ksmcore

n_forks = 0

def fork():
    global n_forks
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    n_forks += 1

engine = ksmcore.Engine()
arrays = [engine.array(np.arange(1 << 16) % 1000) for _ in range(20)]
end = time.monotonic() + 60  # where nothing comes of it: then the test fails
"""

END = """
engine.stop()
print(n_forks, engine.stats().full_scans)
assert all((array == np.arange(1 << 16) % 1000).all() for array in arrays)
engine.close()
"""


def run(program):
    """A watchdog ends what waits for ever."""
    done = run_python(
        BEGIN, program, END, flags=("-W", "ignore::DeprecationWarning"), timeout_seconds=150
    )
    assert (done.returncode, done.stderr) == (0, "")
    return [int(word) for word in done.stdout.split()]


def test_finalisers_fork_in_the_scanner_thread_in_the_midst_of_batches():
    n_forks, n_passes = run("""
        class Forks:
            def __init__(self):
                self.me = self  # a cycle: only the collector ends it

            def __del__(self):
                fork()

        gc.set_threshold(20)
        engine.start(sleep_millisecs=0, pages_to_scan=64)
        n_made = 0
        while (n_forks < 200 or engine.stats().full_scans < 2) and time.monotonic() < end:
            if n_made < n_forks + 40:
                Forks()
                n_made += 1
            time.sleep(0.001)
        gc.set_threshold(0)
        del Forks.__del__  # at the interpreter's end nothing can be forked, since Python 3.13
    """)
    assert n_forks >= 200
    assert n_passes >= 2


def test_signal_handlers_fork_in_the_midst_of_forks():
    n_forks, n_passes = run("""
        inside, n_inside = [], 0

        def handler(*_):
            global n_inside
            if not inside:
                inside.append(True)
                fork()
                n_inside += 1
                inside.pop()

        engine.start(sleep_millisecs=1)
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, 0.005, 0.005)
        while (n_inside < 100 or engine.stats().full_scans < 2) and time.monotonic() < end:
            fork()
        signal.setitimer(signal.ITIMER_REAL, 0)
        assert n_inside >= 100
    """)
    assert n_forks >= 100
    assert n_passes >= 2


def test_handlers_that_raise_in_the_midst_of_forks_leave_nothing_taken():
    n_forks, n_passes = run("""
        def handler(*_):
            raise KeyboardInterrupt

        sys.unraisablehook = lambda *_: None
        signal.signal(signal.SIGALRM, handler)
        engine.start(sleep_millisecs=1)
        n_raised, random = 0, np.random.default_rng(1)
        while (n_raised < 100 or n_forks < 200) and time.monotonic() < end:
            try:
                signal.setitimer(signal.ITIMER_REAL, random.random() * 0.01 + 1e-6)
                fork()
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                n_raised += 1
        signal.setitimer(signal.ITIMER_REAL, 0)
        assert n_raised >= 100
        before = engine.stats().full_scans
        engine.register(bytearray(100_000))
        while engine.stats().full_scans == before:
            time.sleep(0.01)
    """)
    assert n_forks >= 200
    assert n_passes >= 1
