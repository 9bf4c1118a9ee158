"""Calls that end otherwise than by returning leave nothing behind; those that last are held."""

import ctypes
import os
import signal
import socket
import threading

import pytest

import ksmcore
from helpers.forks import THREADS_RUN, in_child
from helpers.memory import PAGE, address, fill, octets, private_memory
from helpers.waiting import wait_until
from ksmcore._engine.settings import GUARDS
from ksmcore._hooks import calls as hooked
from ksmcore._testing import calls

pytestmark = pytest.mark.usefixtures("told")

READ_TOO, JUMP, FORK = range(3)
STACK_BYTES = 1 << 16


@pytest.fixture
def pipes():
    """Two pipes, as [(from, to), ...]."""
    made = [os.pipe(), os.pipe()]
    yield made
    for ends in made:
        for end in ends:
            os.close(end)


@pytest.fixture
def place():
    """The addresses of two pages that nobody else writes to."""
    memory = private_memory(4)
    at = address(octets(memory))
    yield at, at + 2 * PAGE
    del memory


class Interrupted(threading.Thread):
    """Reads eight bytes into a page, where a handler comes in between; see native.c."""

    def __init__(self, native, does, pipes, place, on_stack):
        super().__init__()
        self.native = native
        self.got = None
        # Bytes of its own for the handler's stack, which must outlive the call.
        self.stack = ctypes.create_string_buffer(STACK_BYTES)
        self.arguments = [
            ctypes.c_int(does),
            ctypes.c_int(pipes[0][0]),
            ctypes.c_void_p(place[0]),
            ctypes.c_size_t(8),
            ctypes.c_int(pipes[1][0]),
            ctypes.c_void_p(place[1]),
            ctypes.byref(self.stack) if on_stack else None,
            ctypes.c_size_t(STACK_BYTES),
        ]

    def run(self):
        self.got = self.native.native_interrupted(*self.arguments)

    def interrupt(self):
        signal.pthread_kill(self.ident, signal.SIGUSR1)


def is_told(at):
    return calls.first(at, PAGE) is not None


@pytest.fixture(params=[False, True], ids=["same stack", "stack of its own"])
def interrupted(request, native, pipes, place):
    """Maker of a thread that reads, once it does."""

    def make(does):
        thread = Interrupted(native, does, pipes, place, request.param)
        thread.start()
        wait_until(lambda: is_told(place[0]))
        return thread

    return make


def test_a_call_is_told_of_as_long_as_it_lasts(native, pipes, place):
    thread = threading.Thread(
        target=native.native_read, args=(pipes[0][0], ctypes.c_void_p(place[0] + 8), 16)
    )
    thread.start()
    wait_until(lambda: is_told(place[0]))
    assert calls.first(place[0], PAGE) == (place[0] + 8, 16)
    assert calls.first(place[0] + 10, 2) == (place[0] + 10, 2)
    assert calls.first(place[0], 8) is None
    assert calls.first(place[0] + 24, PAGE) is None
    assert not calls.shut(place[0], PAGE)
    assert calls.shut(place[1], PAGE)
    calls.let_in()
    os.write(pipes[0][1], b"12345678")
    thread.join()
    assert calls.first(place[0], PAGE) is None


def test_a_call_in_a_handler_is_held_too(interrupted, pipes, place, native):
    thread = interrupted(READ_TOO)
    thread.interrupt()
    wait_until(lambda: is_told(place[1]))
    assert is_told(place[0])
    os.write(pipes[1][1], b"12345678")
    wait_until(lambda: not is_told(place[1]))
    # Still there: it was interrupted, and is taken up again.
    assert is_told(place[0])
    thread.interrupt()
    wait_until(lambda: is_told(place[1]))
    os.write(pipes[1][1], b"12345678")
    wait_until(lambda: not is_told(place[1]))
    assert is_told(place[0])
    os.write(pipes[0][1], b"12345678")
    thread.join()
    assert thread.got == 8
    assert native.native_handler_read() == 8
    assert not is_told(place[0])


@pytest.mark.parametrize("n_parts", [1, 9, 10, 16])
def test_a_call_in_a_handler_waits_for_a_window(interrupted, pipes, place, native, n_parts):
    """Also where the one below has taken all places that a thread has for its ranges."""
    parts = ctypes.c_int.in_dll(native, "native_parts")
    parts.value = n_parts
    try:
        thread = interrupted(READ_TOO)
        os.write(pipes[1][1], b"12345678")
        assert calls.shut(place[1], PAGE)
        try:
            thread.interrupt()
            wait_until(lambda: hooked.counts()["waiting"] > 0)
            assert native.native_handler_read() == -1
        finally:
            calls.let_in()
        wait_until(lambda: native.native_handler_read() == 8)
        os.write(pipes[0][1], b"12345678")
        thread.join()
        assert thread.got == 8
        assert not is_told(place[0])
        assert not is_told(place[1])
    finally:
        parts.value = 1


def test_a_call_left_by_a_jump_is_forgotten(interrupted, place):
    thread = interrupted(JUMP)
    thread.interrupt()
    thread.join()
    assert thread.got == -2
    assert not is_told(place[0])


def test_a_call_left_by_a_jump_is_forgotten_while_the_thread_lives(native, pipes, place):
    seen = []

    def run():
        thread = Interrupted(native, JUMP, pipes, place, on_stack=False)
        thread.run()
        # As deep on the stack as before, by the next call.
        seen.append(is_told(place[0]))

    thread = threading.Thread(target=run)
    thread.start()
    wait_until(lambda: is_told(place[0]))
    signal.pthread_kill(thread.ident, signal.SIGUSR1)
    thread.join()
    assert seen == [False]


def test_a_thread_that_is_cancelled_leaves_nothing(native, pipes, place):
    for _ in range(20):
        assert native.native_start(pipes[0][0], ctypes.c_void_p(place[0]), ctypes.c_size_t(8)) == 0
        wait_until(lambda: is_told(place[0]))
        native.native_cancel()
        assert native.native_join() == 1
        assert not is_told(place[0])


def test_a_fork_in_a_handler_leaves_the_call_to_both(interrupted, pipes, place, native):
    thread = interrupted(FORK)
    thread.interrupt()
    wait_until(lambda: native.native_child() > 0)
    assert is_told(place[0])
    os.write(pipes[0][1], b"12345678" * 2)
    thread.join()
    assert thread.got == 8
    assert os.waitstatus_to_exitcode(native.native_child_status()) == 8


@pytest.mark.filterwarnings(THREADS_RUN)
def test_a_child_knows_of_no_call_of_other_threads(native, pipes, place):
    thread = threading.Thread(
        target=native.native_read, args=(pipes[0][0], ctypes.c_void_p(place[0]), 8)
    )
    thread.start()
    wait_until(lambda: is_told(place[0]))
    assert in_child(lambda: _child_is_free(place[0], native, pipes[1])) == 0
    assert is_told(place[0])
    os.write(pipes[0][1], b"12345678")
    thread.join()


def _child_is_free(at, native, pipe):
    assert calls.shut(at, PAGE)
    calls.let_in()
    # Calls of its own are told of, and windows of its own see them.
    thread = threading.Thread(target=native.native_read, args=(pipe[0], ctypes.c_void_p(at), 8))
    thread.start()
    wait_until(lambda: is_told(at))
    assert not calls.shut(at, PAGE)
    os.write(pipe[1], b"12345678")
    thread.join()
    assert calls.shut(at, PAGE)
    calls.let_in()


def test_more_calls_than_there_are_places_for(native, pipes, place):
    """Then no window is opened anywhere, for as long as that lasts."""
    wanted = 400
    probes = calls.probe(0)
    threads = (ctypes.c_ulong * wanted)()
    fd, at = ctypes.c_int(pipes[0][0]), ctypes.c_void_p(place[0])
    n = native.native_crowd(threads, wanted, fd, at)
    try:
        if n == wanted:
            wait_until(lambda: hooked.counts()["untold"] > 0)
            assert not calls.shut(place[1], PAGE)
    finally:
        os.write(pipes[0][1], b"x" * n)
        assert native.native_crowd_join(threads, n) == 0
        calls.probe(probes)
    if n < wanted:
        pytest.skip(f"only {n} threads are to be had")
    assert hooked.counts()["untold"] == 0
    assert calls.shut(place[0], 4 * PAGE)
    calls.let_in()
    # And the places of the threads that ended are free.
    for _ in range(3):
        n = native.native_crowd(threads, 100, fd, at)
        wait_until(lambda: is_told(place[0]))
        assert hooked.counts()["untold"] == 0
        os.write(pipes[0][1], b"x" * n)
        assert native.native_crowd_join(threads, n) == 0


def test_sigsegv_stays_out_of_masks(native):
    assert native.native_masks() == 0
    calls.begin(False)
    calls.end(True)
    try:
        assert native.native_masks() == 0b111
    finally:
        calls.begin(True)
        calls.end(False)


def test_python_blocks_all_signals_but_that_one():
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGSEGV, signal.SIGUSR2})
    try:
        now = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        assert signal.SIGUSR2 in now
        assert signal.SIGSEGV not in now
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


WEAK = [name for name in GUARDS[1:] if ksmcore.features()[name] is None]


@pytest.fixture(params=WEAK)
def guard(request):
    """Those that cannot make a system call wait."""
    return request.param


def receiving(memory, first, n):
    """A thread that waits in recv() for these pages, and the socket to feed it by."""
    near, far = socket.socketpair()

    def receive():
        with near:
            view = memoryview(memory)[first * PAGE : (first + n) * PAGE]
            assert near.recv_into(view, flags=socket.MSG_WAITALL) == n * PAGE

    thread = threading.Thread(target=receive)
    thread.start()
    wait_until(lambda: calls.first(address(octets(memory)) + first * PAGE, n * PAGE))
    return thread, far


def feed(thread, far, n):
    with far:
        far.sendall(b"\x07" * n * PAGE)
    thread.join()


def test_what_a_call_waits_for_is_not_merged_and_the_rest_is(engine):
    memory = private_memory(400)
    fill(memory)
    engine.register(memory)
    thread, far = receiving(memory, 150, 3)
    report = engine.dedup()
    assert report.skipped["in_call"] == 3
    assert report.pages_merged == 397
    feed(thread, far, 3)
    assert bytes(memory[150 * PAGE : 153 * PAGE]) == b"\x07" * 3 * PAGE
    report = engine.dedup()
    assert report.skipped["in_call"] == 0
    stats = engine.stats()
    assert stats.pages_sharing + stats.pages_shared == 400


def test_memory_becomes_plain_again_though_a_call_waits(engine):
    memory = private_memory(400)
    before = fill(memory)
    region = engine.register(memory)
    engine.dedup()
    assert engine.stats().pages_merged == 400
    thread, far = receiving(memory, 150, 3)
    # It waits for the call, and not for ever.
    region.close()
    assert bytes(memory) == before
    feed(thread, far, 3)
    assert bytes(memory[150 * PAGE : 153 * PAGE]) == b"\x07" * 3 * PAGE
