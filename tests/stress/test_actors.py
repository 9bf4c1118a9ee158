"""The lost-write detector with all that a program may do at the same time: buffers change places,
advice and userfaultfds come late, signal handlers run on every thread, handlers and finalisers
fork, descriptors run out, filters answer system calls by an errno.

Each is a second or less in `make test`; KSMCORE_STRESS=1 (`make stress`) makes them long.
"""

import collections
import contextlib
import errno
import gc
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

import ksmcore
from helpers import seccomp
from helpers.detector import WORDS, Writers, has_merged, private_pages, rounds
from helpers.forks import THREADS_RUN
from helpers.handlers import N_WORDS, Handlers
from helpers.libc import libc
from helpers.loose import Loose, call, rotate, under_a_gap
from helpers.memory import PAGE
from helpers.processes import run_python
from helpers.stress import LONG
from helpers.watching import Watcher

N_PAGES = 64
SECONDS = 0.5
# Of the exchanges of mappings, those that show that they came in the midst of a window.
MOST_WRONG = 0.04

pytestmark = pytest.mark.filterwarnings(THREADS_RUN)


@contextlib.contextmanager
def scanning(engine: ksmcore.Engine) -> Iterator[threading.Lock]:
    """A thread that scans and merges at once, in turn, and fails the test if it fails. It has the
    lock during each pass."""
    stop, failed, in_pass = threading.Event(), [], threading.Lock()

    def scan() -> None:
        try:
            while not stop.is_set():
                for merge in (engine.dedup, engine.scan):
                    with in_pass:
                        merge()
                    time.sleep(0.0001)  # so that whoever waits for the lock has it
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=scan)
    thread.start()
    try:
        yield in_pass
    finally:
        stop.set()
        thread.join()
    if failed:
        raise failed[0]


def contents(rng: np.random.Generator, n_kinds: int = 7) -> np.ndarray:
    """Pages of few kinds, none of them zeros."""
    kinds = rng.integers(1, 256, (n_kinds, PAGE), dtype=np.uint8)
    return kinds[np.arange(N_PAGES) % n_kinds]


@pytest.mark.parametrize("most_wrong", [0, MOST_WRONG], ids=["between passes", "beside passes"])
def test_buffers_change_places(guard, rng, record_property, most_wrong):
    """Swaps and rotations by mremap(2), whole and in part. Nothing makes one wait that comes in the
    midst of a window: docs/guarantees.md tells how often that shows. Between passes none does."""
    with ksmcore.Engine(guard=guard) as engine:
        # Nothing of others comes to lie in the holes.
        low = under_a_gap(4 * N_PAGES)
        buffers = [Loose(contents(rng), low + k * N_PAGES * PAGE) for k in range(4)]
        models = [buffer.pages.copy() for buffer in buffers]
        regions = [engine.register(buffer.pages) for buffer in buffers]
        counts = collections.Counter[str]()

        def seen(models: list[np.ndarray]) -> list[np.ndarray]:
            """What is there: these, but in one of so many cases."""
            if all(map(np.array_equal, [buffer.pages for buffer in buffers], models)):
                return models
            counts["wrong"] += 1
            assert most_wrong > 0
            assert counts["wrong"] <= 1 + counts["moves"] * most_wrong
            return [buffer.pages.copy() for buffer in buffers]

        with scanning(engine) as in_pass:
            outside = contextlib.nullcontext() if most_wrong else in_pass
            for n in rounds(SECONDS, lambda: counts["moves"] > 20 and has_merged(engine, N_PAGES)):
                first, last = sorted(rng.integers(0, N_PAGES + 1, 2))
                part = slice(0, N_PAGES) if n % 3 == 0 or first == last else slice(first, last)
                which = rng.permutation(4)[: 2 + n % 3]
                # While they are on their way there is a hole: nobody looks.
                with outside:
                    rotate(*(buffers[i] for i in which), pages=part)
                moved = [models[i][part].copy() for i in which]
                for i, content in zip(np.roll(which, -1), moved, strict=True):
                    models[i][part] = content
                counts["moves"] += 1
                models = seen(models)
                written = int(rng.integers(4))
                page, kind = (int(k) for k in rng.integers(0, [N_PAGES, 7]))
                buffers[written].pages[page] = models[written][page] = kind
        record_property(
            "moves",
            f"{counts['moves']:,}; in a window: {counts['wrong']}; "
            f"merged: {engine.stats().pages_merged:,}",
        )
        models = seen(models)
        engine._core.check()
        for region, buffer, model in zip(regions, buffers, models, strict=True):
            region.close()
            assert np.array_equal(buffer.pages, model)
            buffer.unmap()


LATE = {
    "WIPEONFORK": (18, 19, "wf"),
    "DONTDUMP": (16, 17, "dd"),
    "DONTFORK": (10, 11, "dc"),
}


def test_advice_comes_late(writers, guard, rng, record_property):
    """It stays while pages merge around it; what is to be wiped is wiped in a child."""
    memory, pages = private_pages(N_PAGES)
    aside = Loose(contents(rng))
    expected = aside.pages.copy()
    with ksmcore.Engine(guard=guard) as engine:
        engine.register(memory)
        region = engine.register(aside.pages)
        twin = engine.array(expected)
        threads = Writers(writers, pages)
        counts = collections.Counter[str]()
        names = list(LATE)
        with threads.running(), scanning(engine) as in_pass:
            for n in rounds(SECONDS, lambda: counts["given"] > 3):
                give, take, _ = LATE[names[n % len(names)]]
                first = int(rng.integers(N_PAGES - 8))
                # A pass may miss what is given in its midst.
                with in_pass:
                    is_given = libc.madvise(aside.at(first), 8 * PAGE, give) == 0
                # What is merged already is of a file, and the kernel wipes no such thing.
                assert is_given or names[n % len(names)] == "WIPEONFORK"
                counts["given"] += is_given
                if is_given and names[n % len(names)] == "WIPEONFORK":
                    pid = os.fork()
                    if pid == 0:
                        os._exit(int(aside.pages[first : first + 8].any()))
                    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
                assert np.array_equal(aside.pages, expected)
                with in_pass:
                    call("madvise", aside.at(first), 8 * PAGE, take)
                aside.pages[first] = expected[first] = n % 5 + 1
        threads.check()
        record_property("advice", f"{counts['given']:,}; words: {threads.n_writes:,}")
        assert np.array_equal(aside.pages, expected)
        assert len(twin) == N_PAGES
        engine._core.check()
        region.close()
        assert np.array_equal(aside.pages, expected)
        aside.unmap()


def test_userfaultfds_of_others_come_late(writers, guard, rng, record_property):
    """They get no page to fill that was there before, and lose none of their own."""
    memory, pages = private_pages(N_PAGES)
    aside = Loose(contents(rng))
    aside.pages[::4] = 0
    expected = aside.pages.copy()
    with ksmcore.Engine(guard=guard) as engine:
        engine.register(memory)
        region = engine.register(aside.pages)
        threads = Writers(writers, pages)
        counts = collections.Counter[str]()
        with threads.running(), scanning(engine):
            for _ in rounds(SECONDS, lambda: counts["watched"] > 3):
                watcher = Watcher()
                try:
                    watcher.watch(aside.addr, N_PAGES * PAGE)
                except OSError as error:
                    # Of the guard, for a moment; or of what lies over the store.
                    if error.errno not in (errno.EBUSY, errno.EINVAL):
                        raise
                else:
                    counts["watched"] += 1
                    engine.dedup()
                finally:
                    watcher.close()
                assert np.array_equal(aside.pages, expected)
                page, value = (int(k) for k in rng.integers(0, [N_PAGES, 3]))
                aside.pages[page] = expected[page] = value
        threads.check()
        record_property("watched", f"{counts['watched']:,}; words: {threads.n_writes:,}")
        assert np.array_equal(aside.pages, expected)
        engine._core.check()
        region.close()
        aside.unmap()


def test_handlers_on_every_thread_write(writers, guard, record_property):
    """On writers, on those that scan, on those that register."""
    memory, pages = private_pages(N_PAGES)
    others, others_pages = private_pages(N_PAGES)
    with ksmcore.Engine(guard=guard) as engine:
        engine.register(memory)
        engine.register(others)
        threads = Writers(writers, others_pages)
        handlers = Handlers(writers, pages)

        def is_enough() -> bool:
            return has_merged(engine, N_PAGES) and handlers.n_runs() > 200

        with threads.running(), handlers.running(), scanning(engine):
            for n in rounds(SECONDS, is_enough):
                if n % 4 == 0:
                    engine.unmerge()
                engine.dedup()
        threads.check()
        record_property("handlers", f"{handlers.n_runs():,}; words: {threads.n_writes:,}")
        assert handlers.n_wrong == 0
        assert not pages[:, : WORDS - N_WORDS].any()
        engine._core.check()


class Forking:
    """Forks when the collector ends it."""

    forked: Callable[[], None]

    def __init__(self) -> None:
        self.me = self

    def __del__(self) -> None:
        Forking.forked()


def test_handlers_and_finalisers_fork(writers, guard, record_property):
    with ksmcore.Engine(guard=guard, sleep_millisecs=0) as engine:
        pages = engine.zeros((N_PAGES, WORDS), np.uint64)
        still = engine.empty((N_PAGES, WORDS), np.uint64)
        still[:] = np.arange(N_PAGES)[:, None] % 5
        expected = still.copy()
        me = os.getpid()
        counts = {"handler": 0, "finaliser": 0}
        wrong: list[int] = []

        def fork(who: str) -> None:
            if os.getpid() != me:
                return
            pid = os.fork()
            if pid == 0:
                right = np.array_equal(still, expected)
                still[0] += np.uint64(1)
                os._exit(0 if right and (still[0] == expected[0] + np.uint64(1)).all() else 1)
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            counts[who] += 1
            if status != 0:
                wrong.append(status)

        Forking.forked = lambda: fork("finaliser")
        before = signal.signal(signal.SIGUSR1, lambda *_: fork("handler"))
        threads = Writers(writers, pages)
        try:
            with threads.running(), engine.start():
                for _ in rounds(SECONDS, lambda: min(counts.values()) > 3):
                    signal.raise_signal(signal.SIGUSR1)
                    Forking()
                    gc.collect(0)
                    engine.dedup()
                    assert np.array_equal(still, expected)
        finally:
            signal.signal(signal.SIGUSR1, before)
        threads.check()
        record_property("forks", f"{counts}; words: {threads.n_writes:,}")
        assert wrong == []
        engine._core.check()


def test_descriptors_run_out_and_come_back(writers, guard, record_property):
    memory, pages = private_pages(N_PAGES)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with ksmcore.Engine(guard=guard, sleep_millisecs=0) as engine:
        engine.register(memory)
        threads = Writers(writers, pages)
        counts = collections.Counter[str]()
        try:
            with threads.running(), engine.start():
                for n in rounds(
                    SECONDS, lambda: has_merged(engine, N_PAGES) and counts["refused"] > 3
                ):
                    free = os.dup(0)
                    os.close(free)
                    resource.setrlimit(resource.RLIMIT_NOFILE, (free + n % 3, limits[1]))
                    counts["times"] += 1
                    try:
                        engine.dedup()
                        engine.unmerge()
                    except (OSError, MemoryError, RuntimeError):
                        counts["refused"] += 1
                    taken = engine.array(np.ones(PAGE, np.uint8)) if n % 2 else None
                    del taken
                    resource.setrlimit(resource.RLIMIT_NOFILE, limits)
                    engine.dedup()
                assert engine.scanning
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        threads.check()
        put_off = engine.stats().passes_put_off
        record_property(
            "without",
            f"{counts['times']:,}; refused: {counts['refused']:,}; put off: {put_off:,}; "
            f"words: {threads.n_writes:,}",
        )
        engine._core.check()
        assert engine.stats().regions == 1


FILTERED = [*seccomp.PARTS, "mincore", "pread", "fallocate", "memfd_create", "userfaultfd"]
CODES = ["EPERM", "ENOSYS", "ENOMEM", "EINVAL"]


@pytest.mark.parametrize("code", CODES if LONG else CODES[:2])
def test_filters_answer_by_an_errno(guard, code, record_property):
    """One after the other, in children of a process that has merged before."""
    if not seccomp.is_possible():
        pytest.skip("no seccomp filter here")
    filtered = FILTERED if LONG else FILTERED[CODES.index(code) :: 4]
    done = run_python(
        """
        import errno, os, sys, threading
        import numpy as np, ksmcore
        from helpers import seccomp
        from helpers.memory import PAGE
        guard, code, n_rounds, *names = sys.argv[1:]
        code, n_rounds = getattr(errno, code), int(n_rounds)
        def one(name):
            rng = np.random.default_rng(7)
            source = rng.integers(1, 256, (64, PAGE), dtype=np.uint8)
            engine = ksmcore.Engine(guard=guard)
            merged = [engine.array(source) for _ in range(3)]
            engine.dedup()
            n = 0
            for filtered in (False, True):
                if filtered:
                    seccomp.refuse([name], code)
                for k in range(n_rounds):
                    for i, array in enumerate(merged):
                        array[:] = source + np.uint8(k)
                        array[k % 64, :8] = i
                    for act in (engine.scan, engine.dedup, engine.unmerge):
                        try:
                            act()
                        except (OSError, MemoryError, RuntimeError):
                            pass
                        n += 1
                        for i, array in enumerate(merged):
                            expected = source + np.uint8(k)
                            expected[k % 64, :8] = i
                            assert np.array_equal(array, expected), (name, act)
            engine._core.check()
            return n
        n_done = 0
        for name in names:
            read, write = os.pipe()
            pid = os.fork()
            if pid == 0:
                status = 1
                try:
                    os.write(write, b"%d" % one(name))
                    status = 0
                finally:
                    if status:
                        import traceback
                        traceback.print_exc()
                    os._exit(status)
            os.close(write)
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            n_done += int(os.read(read, 20) or 0)
            os.close(read)
            assert status == 0, (name, status)
        print(n_done)
        """,
        flags=(),
        arguments=[guard, code, "10" if LONG else "1", *filtered],
        timeout_seconds=600,
    )
    assert done.returncode == 0, done.stderr
    record_property(code, f"{int(done.stdout):,} passes under {len(filtered)} filters")
