"""What the lost-write tests share: how long they last, and their threads of C code (*.c)."""

import contextlib
import ctypes
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

import ksmcore
from helpers.memory import PAGE, private_memory
from helpers.stress import LONG

WORDS = PAGE // 8
# The long form lasts this much longer. Either then goes on until its numbers are reached, which may
# take a while on a busy machine; not for ever.
LONG_FACTOR = 10
LONGEST_SECONDS = 600.0
LONGEST_SHORT_SECONDS = 60.0

# The kinds of calls.c, in its order.
CALLS = (
    "pread",
    "stream",
    "datagram",
    "seqpacket",
    "process_vm_writev",
    "process_vm_writev (cold)",
    "/proc/self/mem",
    "parts",
    "message",
    "pipe",
    "fread",
    "direct",
)


def rounds(seconds: float, enough: Callable[[], bool] = lambda: True) -> Iterator[int]:
    """0, 1, 2, ... for `seconds`, in the long form for longer; and until there is `enough`."""
    start = time.monotonic()
    n_rounds = 0
    while True:
        gone = time.monotonic() - start
        over = gone >= seconds * (LONG_FACTOR if LONG else 1)
        if over and (enough() or gone >= (LONGEST_SECONDS if LONG else LONGEST_SHORT_SECONDS)):
            return
        yield n_rounds
        n_rounds += 1


def has_merged(engine: ksmcore.Engine, n_pages: int) -> bool:
    """More pages than that, some of which were written again and copied."""
    stats = engine.stats()
    return stats.pages_merged + stats.pages_zeroed > n_pages and stats.cow_breaks > 0


def at_least(n_long: int, n_short: int) -> int:
    """What a count must reach in the form that runs."""
    return n_long if LONG else n_short


def private_pages(n_pages: int) -> tuple[mmap.mmap, np.ndarray]:
    """Plain private memory, and its words page by page."""
    memory = private_memory(n_pages)
    return memory, np.frombuffer(memory, np.uint64).reshape(n_pages, WORDS)


def address(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.__array_interface__["data"][0])


@contextlib.contextmanager
def running(library: ctypes.CDLL, threads: list[threading.Thread]) -> Iterator[None]:
    """These threads run C code of `library` until the block is left."""
    library.writers_stop(0)
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        library.writers_stop(1)
        for thread in threads:
            thread.join()


@contextlib.contextmanager
def working(threads: Sequence[threading.Thread]) -> Iterator[None]:
    """These threads work until the block is left, when each is told by its `stopped`."""
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        for thread in threads:
            thread.stopped = True
        for thread in threads:
            thread.join()


class Writers:
    """Threads of writers_run over one array, and what they found."""

    def __init__(self, library: ctypes.CDLL, pages: np.ndarray, n_threads: int = 3) -> None:
        self.library = library
        self.pages = pages
        self.last = [np.zeros((len(pages), 8), np.uint64) for _ in range(n_threads)]
        self.wrong = [-1] * n_threads
        self.counts = np.zeros(n_threads, np.uint64)
        self.threads = [threading.Thread(target=self._run, args=(i,)) for i in range(n_threads)]

    def _run(self, i: int) -> None:
        self.wrong[i] = self.library.writers_run(
            address(self.pages),
            ctypes.c_long(len(self.pages)),
            ctypes.c_long(WORDS),
            ctypes.c_long(i),
            address(self.last[i]),
            ctypes.c_uint64(i + 1),
            ctypes.c_long(50),
            address(self.counts[i:]),
        )

    def running(self) -> contextlib.AbstractContextManager[None]:
        return running(self.library, self.threads)

    @property
    def n_writes(self) -> int:
        return int(self.counts.sum())

    def check(self) -> None:
        assert self.wrong == [0] * len(self.threads)


class Tally(ctypes.Structure):
    """struct tally of calls.c."""

    _fields_ = [
        *((name, ctypes.c_uint64) for name in "right failed short lost changed astray".split()),
        ("error", ctypes.c_int64),
    ]


@contextlib.contextmanager
def hard_scanning(library: ctypes.CDLL, engine: ksmcore.Engine, *threads: threading.Thread):
    """`running`, with what makes these threads meet windows often.

    The guard stays in place between passes: taking it away waits for milliseconds where threads are
    busy. And a thread of its own makes windows long.
    """
    entered = engine._core.enter_guard()
    try:
        with running(library, [*threads, threading.Thread(target=library.calls_jam)]):
            yield
    finally:
        engine._core.leave_guard(entered)


class Callers:
    """Threads of calls_run over one array of pages, and what they found."""

    # Few, so that a call often goes to a slot that is being merged.
    N_SLOTS, SLOT_PAGES = 12, 5

    def __init__(self, library: ctypes.CDLL, call: str, pages: np.ndarray) -> None:
        self.library = library
        self.call = call
        self.pages = pages
        # A processor is left for the scanner.
        n_threads = min(3, max(1, len(os.sched_getaffinity(0)) - 1))
        self.tallies = [Tally() for _ in range(n_threads)]
        self.threads = [threading.Thread(target=self._run, args=(i,)) for i in range(n_threads)]

    def _run(self, i: int) -> None:
        self.library.calls_run(
            ctypes.c_int(CALLS.index(self.call)),
            address(self.pages),
            ctypes.c_long(self.N_SLOTS),
            ctypes.c_long(PAGE),
            ctypes.c_long(self.SLOT_PAGES),
            ctypes.c_long(i),
            ctypes.c_long(len(self.threads)),
            ctypes.c_uint64(i + 1),
            ctypes.byref(self.tallies[i]),
        )

    def total(self, name: str) -> int:
        return sum(getattr(tally, name) for tally in self.tallies)

    @property
    def errors(self) -> list[str]:
        """Names of the errors that ended a thread."""
        return [os.strerror(tally.error) for tally in self.tallies if tally.error]

    def __str__(self) -> str:
        n_calls = self.total("right") + self.total("lost") + self.total("failed")
        return (
            f"{n_calls:,} calls: {self.total('failed')} failed "
            f"({self.total('failed') / max(n_calls, 1):.3%}), {self.total('short')} short, "
            f"{self.total('lost')} lost at once, {self.total('changed')} later"
        )
