"""Ctrl-C anywhere in a call, its traceback kept: nothing stays taken, and all bytes are right."""

import inspect
import signal
import sys
import threading

import numpy as np
import pytest

import ksmcore
from helpers.memory import PAGE
from helpers.stress import LONG
from helpers.waiting import WAIT_SECONDS
from ksmcore._core.scopes import LockScope, PassLock
from ksmcore._engine.hidden_thread import HiddenThread
from ksmcore._testing import hooks


def moments(call, interrupt_at=0):
    """Make a call, and raise KeyboardInterrupt in it at the n-th moment at which signal handlers
    may run: where a function begins, and where one of C or of Python has ended.

    Returns how many of them there were, and the error, which keeps all frames alive.
    """
    n = 0

    def profile(frame, event, arg):
        nonlocal n
        # What a generator yields is no end of it; who asked for it is told by "c_return".
        is_generator = frame.f_code.co_flags & inspect.CO_GENERATOR
        if event in ("call", "c_return") or (event == "return" and not is_generator):
            n += 1
            if n == interrupt_at:
                sys.setprofile(None)
                # No handler knows what has ended just now; this frame's traceback is kept.
                del arg
                raise KeyboardInterrupt

    sys.setprofile(profile)
    try:
        call()
    except KeyboardInterrupt as error:
        return n, error
    finally:
        sys.setprofile(None)
    return n, None


def hold(engine, array):
    with engine.hold(array):
        pass


CALLS = {
    "scan": lambda engine, array, plain: engine.scan(),
    "dedup": lambda engine, array, plain: engine.dedup(plain),
    "copy": lambda engine, array, plain: engine.copy(array),
    "estimate": lambda engine, array, plain: engine.estimate(),
    "hold": lambda engine, array, plain: hold(engine, array),
    "register": lambda engine, array, plain: engine.register(plain).close(),
    "unmerge": lambda engine, array, plain: engine.unmerge(),
}


def attempt(name, private_buffer, interrupt_at=0):
    """An engine of two merged arrays and its right bytes, after such a call."""
    content = np.arange(32 * PAGE // 8) // 1024
    engine = ksmcore.Engine()
    arrays = [engine.array(content), engine.array(content)]
    engine.dedup()
    plain = private_buffer(4)
    n, kept = moments(lambda: CALLS[name](engine, arrays[0], plain), interrupt_at)
    return engine, arrays, content, n, kept


# Files of /proc that were just opened are closed by the collector.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", CALLS)
def test_nothing_stays_taken(name, private_buffer):
    engine, *_, n_moments, _ = attempt(name, private_buffer)
    engine.close()
    assert n_moments > 10
    step = 1 if LONG else n_moments // 40 + 1
    n_interrupted = 0
    for moment in range(1, n_moments, step):
        engine, arrays, content, _, kept = attempt(name, private_buffer, moment)
        n_interrupted += kept is not None
        assert not hooks.handler_installed()
        other = threading.Thread(target=engine.dedup, daemon=True)
        other.start()
        other.join(WAIT_SECONDS)
        assert not other.is_alive(), f"at moment {moment}: another thread waits for ever"
        assert engine.scan().skipped["held"] == 0
        for array in arrays:
            assert np.array_equal(array, content)
        engine.close()
        assert engine.closed
    assert n_interrupted > 5


def test_no_signal_leaves_a_scope_taken():
    """Python 3.14 has handlers run between what a scope takes and its block."""

    class RingError(Exception):
        pass

    def ring(*_):
        raise RingError

    lock = PassLock()
    before = signal.signal(signal.SIGALRM, ring)
    try:
        for _ in range(500):
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.0002)
                while True:
                    with LockScope(lock):
                        pass
            except RingError:
                assert not lock.is_mine()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_hidden_thread_whose_start_is_cut_off_ends():
    n_moments, _ = moments(HiddenThread(bool, bool).start)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    for moment in range(1, n_moments + 1):
        thread = HiddenThread(bool, bool)
        _, kept = moments(thread.start, moment)
        assert kept is not None
        assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
        assert thread.join(WAIT_SECONDS), f"at moment {moment}: it never began, and never ends"
