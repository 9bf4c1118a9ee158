"""The lost-write detector: C threads write while the scanner merges, unmerges and forks.

A few seconds each in `make test`; KSMCORE_STRESS=1 (`make stress`) makes them long.
"""

import contextlib
import ctypes
import mmap
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import ksmcore
from ksmcore import _sys

PAGE = ksmcore.Engine.page_bytes
WORDS = PAGE // 8
SECONDS = 60.0 if os.environ.get("KSMCORE_STRESS", "0") not in ("", "0") else 4.0
N_PAGES, N_THREADS = 600, 3

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


@pytest.fixture(scope="module")
def writers(tmp_path_factory):
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    library = tmp_path_factory.mktemp("writers") / "writers.so"
    source = Path(__file__).with_name("writers.c")
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", library, source], check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.writers_run.restype = ctypes.c_long
    return loaded


def address(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.__array_interface__["data"][0])


class Writers:
    """N_THREADS threads of writers_run over one array, and what they found."""

    def __init__(self, library: ctypes.CDLL, pages: np.ndarray, pause_us: int) -> None:
        self.library = library
        self.pages = pages
        self.last = [np.zeros((len(pages), 8), np.uint64) for _ in range(N_THREADS)]
        self.wrong = [-1] * N_THREADS
        self.n_writes = np.zeros(N_THREADS, np.uint64)
        self.threads = [
            threading.Thread(target=self.run, args=(i, pause_us)) for i in range(N_THREADS)
        ]

    def run(self, i: int, pause_us: int) -> None:
        self.wrong[i] = self.library.writers_run(
            address(self.pages),
            ctypes.c_long(len(self.pages)),
            ctypes.c_long(WORDS),
            ctypes.c_long(i),
            address(self.last[i]),
            ctypes.c_uint64(i + 1),
            ctypes.c_long(pause_us),
            address(self.n_writes[i:]),
        )

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        self.library.writers_stop(0)
        for thread in self.threads:
            thread.start()
        try:
            yield
        finally:
            self.library.writers_stop(1)
            for thread in self.threads:
                thread.join()


@pytest.mark.parametrize("presence", ["pagemap", "mincore"])
@pytest.mark.parametrize("fill", ["three contents", "zero"])
@pytest.mark.parametrize("order", ["digest", "content"])
def test_no_word_is_lost(writers, order, fill, presence):
    if presence == "mincore":
        _sys.inject("open", 13)
    memory = mmap.mmap(-1, N_PAGES * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages = np.frombuffer(memory, np.uint64).reshape(N_PAGES, WORDS)
    if fill != "zero":
        pages[:, 64:] = np.arange(N_PAGES)[:, None] % 3 + 1
    fixed = pages[:, 64:].copy()
    with ksmcore.Engine(order=order) as engine:
        assert engine.stats().presence == presence
        engine.register(memory)
        bystander = engine.empty((300, WORDS), np.uint64)
        bystander[:] = 7
        bystander[:, 0] = np.arange(300) % 5
        expected = bystander.copy()
        end = time.monotonic() + SECONDS / 2
        n_passes = 0
        threads = Writers(writers, pages, pause_us=50)
        with threads.running():
            while time.monotonic() < end:
                (engine.scan if n_passes % 2 else engine.dedup)()
                n_passes += 1
                if n_passes % 16 == 0:
                    engine._core.check()
                    assert np.array_equal(bystander, expected)
                    assert np.array_equal(pages[:, 64:], fixed)
        assert threads.wrong == [0] * N_THREADS
        assert np.array_equal(pages[:, 64:], fixed)
        assert threads.n_writes.sum() > 1000
        stats = engine.stats()
        assert stats.pages_merged + stats.pages_zeroed > N_PAGES
        assert stats.cow_breaks > 0
        engine._core.check()


def test_no_word_is_lost_while_regions_come_and_go(writers):
    memory = mmap.mmap(-1, N_PAGES * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages = np.frombuffer(memory, np.uint64).reshape(N_PAGES, WORDS)
    stop = threading.Event()
    failures: list[BaseException] = []
    with ksmcore.Engine() as engine:

        def scan() -> None:
            try:
                while not stop.is_set():
                    engine.dedup()
            except BaseException as error:
                failures.append(error)

        scanner = threading.Thread(target=scan)
        scanner.start()
        end = time.monotonic() + SECONDS
        n_rounds = 0
        threads = Writers(writers, pages, pause_us=50)
        with threads.running():
            while time.monotonic() < end:
                with engine.register(memory):
                    time.sleep(0.01)
                n_rounds += 1
        stop.set()
        scanner.join()
        assert threads.wrong == [0] * N_THREADS
        assert failures == []
        assert n_rounds > 3


def test_no_word_is_lost_while_the_process_forks(writers):
    """Children check that what they inherited holds still, then merge and write on their own."""
    with ksmcore.Engine() as engine:
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
        threads = Writers(writers, pages, pause_us=50)
        with threads.running():
            forker.start()
            end = time.monotonic() + SECONDS
            while time.monotonic() < end:
                engine.dedup()
                assert np.array_equal(still, expected)
            stop.set()
            forker.join()
        assert threads.wrong == [0] * N_THREADS
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
        writers.writers_stop(0)
        flipper.start()
        try:
            end = time.monotonic() + SECONDS / 2
            while time.monotonic() < end:
                engine.dedup()
                engine._core.check()
        finally:
            writers.writers_stop(1)
            flipper.join()
        assert np.array_equal(pages[:, 1:], np.tile(np.arange(1, WORDS), (64, 1)))
