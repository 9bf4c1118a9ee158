"""Forked children for the tests: steps told by pipes, a watchdog against hanging, all bytes known.

Nothing here needs pytest: children that `spawn` and `forkserver` make import this module too.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, NoReturn

import numpy as np

import ksmcore
from helpers.memory import PAGE, random_pages

if TYPE_CHECKING:
    from typing_extensions import Self

# What Python warns of, from 3.12 on, when a process with threads forks: just what is tested.
THREADS_RUN = "ignore:.*fork:DeprecationWarning"
# A child that hangs is ended by a signal, and its exit status is -14. None is near it otherwise.
WATCHDOG_SECONDS = 120
# Of an array of `Memory`, if nothing else is said.
N_PAGES = 32


def fork() -> int:
    """os.fork with the watchdog. Its users carry the mark THREADS_RUN."""
    pid = os.fork()
    if pid == 0:
        watch()
    return pid


def watch() -> None:
    """Let this process end by SIGALRM when it hangs. Needed in every child: alarms do not fork."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(WATCHDOG_SECONDS)


def finish(work: Callable[[], object]) -> NoReturn:
    """Run `work` and end this process, with status 0; or with 1 and a traceback where it raised."""
    status = 1
    try:
        work()
        status = 0
    except BaseException:
        # Past Python's buffers, which may hold what the parent had not yet written.
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(status)


def close_all_fds(but: Iterable[int] = ()) -> None:
    """As a daemon does, or a sandbox; standard input, output and error stay."""
    kept = sorted({2, *but, 4096})
    for before, after in itertools.pairwise(kept):
        os.closerange(before + 1, after)


def exit_code(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def in_child(work: Callable[[], object]) -> int:
    """Exit code of a forked child that runs `work`: 0 when that returned."""
    pid = fork()
    if pid == 0:
        finish(work)
    return exit_code(pid)


class Child:
    """A forked child that runs `work(pause)`; `pause()` there waits for the parent's `go()`.

    The child's ends of the two pipes are its descriptors 0 and 1, which outlive `close_all_fds`.
    Its own children may go on with them, when it has ended.
    """

    def __init__(self, work: Callable[[Callable[[], None]], object]) -> None:
        news, orders = os.pipe(), os.pipe()
        self.pid = fork()
        if self.pid == 0:
            os.dup2(orders[0], 0)
            os.dup2(news[1], 1)
            for fd in (*news, *orders):
                os.close(fd)
            finish(lambda: (work(_pause), os.write(1, b"e")))
        os.close(news[1])
        os.close(orders[0])
        self._news, self._orders = news[0], orders[1]
        self._code: int | None = None

    @property
    def fds(self) -> tuple[int, int]:
        """The parent's descriptors for this."""
        return self._news, self._orders

    def paused(self) -> None:
        """Wait until the child is in `pause()`."""
        assert os.read(self._news, 1) == b".", "the child ended"

    def go(self) -> None:
        os.write(self._orders, b"g")

    def step(self) -> None:
        """Let the child run until its next `pause()`."""
        self.go()
        self.paused()

    def ended(self) -> None:
        """Wait until `work` has returned, in the child or in a process that went on for it."""
        assert os.read(self._news, 1) == b"e", "the child failed, or it pauses"

    def gone(self) -> None:
        """Wait until all processes are gone that went on for the child. (A process gives its memory
        back before it closes its descriptors.)"""
        assert os.read(self._news, 1) == b"", "it pauses"

    def exit_code(self) -> int:
        if self._code is None:
            self._code = exit_code(self.pid)
        return self._code

    def end(self) -> None:
        """Let the child run to its end, which must be a good one."""
        self.go()
        self.ended()
        assert self.exit_code() == 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self._news)
        os.close(self._orders)
        if self._code is None:
            os.kill(self.pid, signal.SIGKILL)
            self.exit_code()


def _pause() -> None:
    os.write(1, b".")
    if os.read(0, 1) != b"g":
        raise EOFError("the parent is gone")


class Memory:
    """Arrays of one engine, and in plain memory the bytes that each of them must show."""

    def __init__(self, engine: ksmcore.Engine, seed: int, n_pages: int = N_PAGES) -> None:
        self.engine = engine
        source = random_pages(seed, n_pages)
        self.arrays = [engine.array(source), engine.array(source)]
        self.expected = [source.copy(), source.copy()]

    @classmethod
    def merged(cls, engine: ksmcore.Engine, seed: int, n_pages: int = N_PAGES) -> Memory:
        memory = cls(engine, seed, n_pages)
        assert engine.dedup(*memory.arrays).bytes_saved == n_pages * PAGE
        return memory

    def check(self) -> None:
        """Every byte is as it must be."""
        for array, expected in zip(self.arrays, self.expected, strict=True):
            assert np.array_equal(array, expected), f"{np.sum(array != expected)} bytes are wrong"

    def write(self, seed: int) -> None:
        """New bytes everywhere, the same in all arrays, so that they can be merged again."""
        source = random_pages(seed, len(self.expected[0]) // PAGE)
        for array, expected in zip(self.arrays, self.expected, strict=True):
            array[:] = source
            expected[:] = source

    def write_some(self, seed: int) -> None:
        """One byte of every third page of one array."""
        rng = np.random.default_rng(seed)
        which = int(rng.integers(len(self.arrays)))
        places = np.arange(0, len(self.expected[which]), 3 * PAGE) + rng.integers(PAGE)
        values = rng.integers(1, 256, len(places))
        self.arrays[which][places] = values
        self.expected[which][places] = values

    def remake(self, seed: int) -> None:
        """Drop the arrays, and make others instead, most likely at the same addresses."""
        n_pages = len(self.expected[0]) // PAGE
        self.arrays.clear()
        source = random_pages(seed, n_pages)
        self.arrays = [self.engine.array(source), self.engine.array(source)]
        for expected in self.expected:
            expected[:] = source


def live(memory: Memory, seed: int) -> None:
    """All that a process does with an engine, over and over, every byte compared after each step.

    What is merged changes completely, twice: so the store gives pages back and uses them again.
    """
    engine = memory.engine
    memory.check()
    for again in range(3):
        memory.write(seed + 10 * again)
        memory.check()
        engine.dedup()
        memory.check()
        memory.write_some(seed + 10 * again + 1)
        engine.scan()
        memory.check()
        with engine.register(bytearray(random_pages(seed + 10 * again + 2, 4))):
            engine.scan()
        memory.check()
    engine._core.check()


def live_anew(inherited: Memory, seed: int) -> None:
    """`live` in a child, whose engine starts empty; in between it writes to what it inherited."""
    inherited.check()
    own = Memory(inherited.engine, seed + 100)
    live(own, seed + 200)
    inherited.check()
    inherited.write(seed)
    live(own, seed + 300)
    inherited.write_some(seed + 1)
    inherited.check()
    own.check()


@contextlib.contextmanager
def scanning(memory: Memory, between: Callable[[int], object] = lambda n: None) -> Iterator[None]:
    """Meanwhile a thread merges without pause. What `memory` shows does not change, though the
    thread writes it (the same bytes) all the time: so its pages are merged and copied back over and
    over. The thread has arrays of its own too, which change.

    `between` is called by the thread before each pass, with a number.
    """
    engine = memory.engine
    stop, begun = threading.Event(), threading.Event()
    failures: list[BaseException] = []

    def scan() -> None:
        n_passes = 0
        try:
            busy = Memory(engine, 10**6, 48)
            while not stop.is_set():
                n_passes += 1
                between(n_passes)
                for array, expected in zip(memory.arrays, memory.expected, strict=True):
                    array[:] = expected
                busy.write_some(n_passes)
                if n_passes % 8 == 0:
                    busy.write(n_passes)
                (engine.dedup if n_passes % 4 else engine.scan)()
                begun.set()
                busy.check()
        except BaseException as error:
            failures.append(error)
            begun.set()

    scanner = threading.Thread(target=scan)
    scanner.start()
    begun.wait()
    try:
        yield
    finally:
        stop.set()
        scanner.join()
    if failures:
        raise failures[0]
    memory.check()
    engine._core.check()


def life_of_a_worker(seed: int, given: np.ndarray) -> np.ndarray:
    """A task for a process of a pool: returns what it was given, backwards."""
    kept = given.copy()
    memory = Memory(ksmcore.default_engine(), 10**5 + seed, 8)
    live(memory, 10**5 + 100 * seed)
    memory.arrays[0], memory.expected[0] = ksmcore.copy(given), kept
    memory.arrays[1], memory.expected[1] = ksmcore.copy(given), kept
    assert ksmcore.dedup(*memory.arrays).pages_merged == given.nbytes // PAGE * 2
    memory.check()
    return memory.arrays[0][::-1]


class Paused:
    """A function that another thread calls and does not come back from until it is let go."""

    def __init__(self, function: Callable[..., object]) -> None:
        self.function = function
        self.reached = threading.Event()
        self.may_go = threading.Event()
        self.pid = os.getpid()

    def __call__(self, *arguments: object) -> object:
        if os.getpid() == self.pid:
            self.reached.set()
            self.may_go.wait()
        return self.function(*arguments)


@contextlib.contextmanager
def another_is_in(paused: Paused, act: Callable[[], object]) -> Iterator[None]:
    """A thread does this, and has come to what is paused."""
    thread = threading.Thread(target=act)
    thread.start()
    try:
        paused.reached.wait()
        yield
    finally:
        paused.may_go.set()
        thread.join()
