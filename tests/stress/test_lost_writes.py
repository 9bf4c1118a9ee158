"""The lost-write detector: user code writes while the scanner merges, unmerges and forks.

About a second each in `make test`; KSMCORE_STRESS=1 (`make stress`) makes them long, and asserts
how much was written.
"""

import ctypes
import itertools
import os
import threading
import time

import numpy as np
import pytest

import ksmcore
from helpers.detector import (
    WORDS,
    Writers,
    address,
    at_least,
    has_merged,
    private_pages,
    rounds,
    running,
    working,
)
from ksmcore._testing import faults

N_PAGES = 600
# So often that writers met windows, and copied what was merged.
N_MERGED = N_PAGES // 4
# Words that each guard has to see written in the long form, by C and by NumPy.
N_WRITES = 10_000_000

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")

# Every two of these values meet in one case; all guards run all cases.
CASES = [
    ("digest", "three contents", "pagemap"),
    ("digest", "zero", "mincore"),
    ("content", "three contents", "mincore"),
    ("content", "zero", "pagemap"),
]


@pytest.mark.parametrize(("order", "fill", "presence"), CASES)
def test_no_word_is_lost(writers, guard, order, fill, presence, record_property):
    if presence == "mincore":
        faults.inject("open", 13)
    memory, pages = private_pages(N_PAGES)
    if fill != "zero":
        pages[:, 64:] = np.arange(N_PAGES)[:, None] % 3 + 1
    fixed = pages[:, 64:].copy()
    with ksmcore.Engine(guard=guard, order=order) as engine:
        assert engine.stats().presence == presence
        engine.register(memory)
        bystander = engine.empty((300, WORDS), np.uint64)
        bystander[:] = 7
        bystander[:, 0] = np.arange(300) % 5
        expected = bystander.copy()
        threads = Writers(writers, pages)
        enough = at_least(N_WRITES // len(CASES), 1000)
        waited = engine.stats().guard_waits
        with threads.running():
            for n in rounds(
                1.2, lambda: threads.n_writes >= enough and has_merged(engine, N_MERGED)
            ):
                (engine.scan if n % 2 else engine.dedup)()
                if n % 16 == 0:
                    engine._core.check()
                    assert np.array_equal(bystander, expected)
                    assert np.array_equal(pages[:, 64:], fixed)
        stats = engine.stats()
        record_property("words", f"{threads.n_writes:,}; waits: {stats.guard_waits - waited}")
        threads.check()
        assert np.array_equal(pages[:, 64:], fixed)
        assert np.array_equal(bystander, expected)
        assert threads.n_writes >= enough
        assert has_merged(engine, N_MERGED)
        engine._core.check()


def test_pages_that_become_zero_are_given_back_among_writers(writers, guard, record_property):
    """Nothing but zero pages, given back as often as can be. A page that is written
    just then is new memory for the writer, and every thread has to see that at once."""
    memory, pages = private_pages(N_PAGES)
    with ksmcore.Engine(guard=guard, max_shared_pages=0) as engine:
        engine.register(memory)
        threads = Writers(writers, pages)
        with threads.running():
            for _ in rounds(2.0, lambda: engine.stats().pages_zeroed > N_PAGES // 4):
                engine.dedup()
        record_property("words", f"{threads.n_writes:,}; zeroed: {engine.stats().pages_zeroed:,}")
        threads.check()
        assert engine.stats().pages_zeroed > N_PAGES // 4


class Calculator(threading.Thread):
    """Writes its part of an array with NumPy, which lets go of the GIL, and checks every word.

    The contents are the same pattern in every page, plus a number: one of four, now and then a
    count that never comes back. Half of the writes add to what is there, half copy over it.
    """

    def __init__(self, part: np.ndarray, pattern: np.ndarray, seed: int) -> None:
        super().__init__()
        self.part = part
        self.pattern = pattern
        self.random = np.random.default_rng(seed)
        self.stopped = False
        self.n_writes = 0
        self.n_wrong = 0

    def run(self) -> None:
        expected = self.pattern.copy()
        self.n_wrong += np.count_nonzero(self.part != expected)
        number = 0
        while not self.stopped:
            few, add, rest = self.random.integers(8), self.random.integers(2), self.random.random()
            before, number = number, int(few % 4) if few else self.n_writes + 4
            expected = self.pattern + np.uint64(number)
            if add:
                # Unsigned: what is taken away comes back by wrapping round.
                np.add(self.part, np.uint64((number - before) % 2**64), out=self.part)
            else:
                np.copyto(self.part, expected)
            self.n_writes += self.part.size
            self.n_wrong += np.count_nonzero(self.part != expected)
            time.sleep(0.004 * rest)
            self.n_wrong += np.count_nonzero(self.part != expected)


def test_no_word_of_numpy_is_lost(guard, record_property):
    with ksmcore.Engine(guard=guard) as engine:
        words = engine.empty(N_PAGES * WORDS, np.uint64)
        pattern = np.tile(np.arange(WORDS, dtype=np.uint64) * np.uint64(3), N_PAGES)
        words[:] = pattern
        # Parts that do not end where pages end: threads share those pages.
        ends = [0, words.size // 3 + 5, words.size // 3 * 2 + 77, words.size]
        threads = [
            Calculator(words[start:end], pattern[start:end], seed)
            for seed, (start, end) in enumerate(itertools.pairwise(ends))
        ]

        def n_writes() -> int:
            return sum(thread.n_writes for thread in threads)

        enough = at_least(N_WRITES, 1000)
        with working(threads):
            for n in rounds(1.5, lambda: n_writes() >= enough and has_merged(engine, N_MERGED)):
                (engine.scan if n % 2 else engine.dedup)()
        record_property("words", f"{n_writes():,}")
        assert [thread.n_wrong for thread in threads] == [0] * len(threads)
        assert n_writes() >= enough
        assert has_merged(engine, N_MERGED)
        engine._core.check()


def test_no_word_is_lost_while_regions_come_and_go(writers, guard, record_property):
    memory, pages = private_pages(N_PAGES)
    stop = threading.Event()
    failures: list[BaseException] = []
    with ksmcore.Engine(guard=guard) as engine:

        def scan() -> None:
            try:
                while not stop.is_set():
                    engine.dedup()
            except BaseException as error:
                failures.append(error)

        scanner = threading.Thread(target=scan)
        scanner.start()
        rounds_made: list[int] = []
        threads = Writers(writers, pages)
        try:
            with threads.running():
                for n in rounds(2.0, lambda: len(rounds_made) > 3):
                    with engine.register(memory):
                        time.sleep(0.01)
                    rounds_made.append(n)
        finally:
            stop.set()
            scanner.join()
        record_property("words", f"{threads.n_writes:,}; rounds: {len(rounds_made)}")
        threads.check()
        assert failures == []
        assert len(rounds_made) > 3


def test_no_word_is_lost_while_the_process_forks(writers, guard, record_property):
    """Children check that what they inherited holds still, then merge and write on their own."""
    with ksmcore.Engine(guard=guard) as engine:
        pages = engine.zeros((N_PAGES, WORDS), np.uint64)
        still = engine.empty((300, WORDS), np.uint64)
        still[:] = 9
        still[:, 0] = np.arange(300) % 5
        expected = still.copy()

        def child() -> bool:
            inherited = pages.copy()
            own = engine.empty((64, WORDS), np.uint64)
            own[:] = 5
            engine.scan()
            engine.dedup()
            time.sleep(0.02)
            right = np.array_equal(pages, inherited) and np.array_equal(still, expected)
            pages[:] += np.uint64(1)
            still[:] += np.uint64(1)
            engine._core.check()
            return (
                right
                and (own == 5).all()
                and np.array_equal(pages, inherited + np.uint64(1))
                and np.array_equal(still, expected + np.uint64(1))
            )

        statuses: list[int] = []
        stop = threading.Event()

        def fork() -> None:
            while not stop.is_set():
                pid = os.fork()
                if pid == 0:
                    status = 1
                    try:
                        status = 0 if child() else 2
                    finally:
                        os._exit(status)
                statuses.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))

        forker = threading.Thread(target=fork)
        threads = Writers(writers, pages)
        with threads.running():
            forker.start()
            try:
                for _ in rounds(2.0, lambda: len(statuses) > 3):
                    engine.dedup()
                    assert np.array_equal(still, expected)
            finally:
                stop.set()
                forker.join()
        record_property("words", f"{threads.n_writes:,}; children: {len(statuses)}")
        threads.check()
        assert len(statuses) > 3
        assert set(statuses) == {0}
        engine._core.check()


@pytest.mark.parametrize("order", ["digest", "content"])
@pytest.mark.parametrize("delay", [0, 2000])
def test_trees_stay_in_order_whatever_the_pages_do(writers, order, delay):
    with ksmcore.Engine(order=order) as engine:
        pages = engine.empty((64, WORDS), np.uint64)
        pages[:] = np.arange(WORDS)
        flipper = threading.Thread(
            target=writers.writers_flip,
            args=(
                address(pages),
                ctypes.c_long(64),
                ctypes.c_long(WORDS),
                ctypes.c_uint64(7),
                ctypes.c_uint64(9),
                ctypes.c_long(delay),
            ),
        )
        with running(writers, [flipper]):
            for _ in rounds(1.0):
                engine.dedup()
                engine._core.check()
        assert np.array_equal(pages[:, 1:], np.tile(np.arange(1, WORDS), (64, 1)))
