"""Processes made by the standard library: multiprocessing, subprocess, posix_spawn, forkpty; and
processes that are left by their parent, or leave in the usual way."""

import multiprocessing
import os
import subprocess
import sys

import numpy as np
import pytest

from helpers.forks import (
    THREADS_RUN,
    Memory,
    exit_code,
    finish,
    in_child,
    life_of_a_worker,
    live,
    live_anew,
    scanning,
    watch,
)
from helpers.memory import PAGE, random_pages
from helpers.processes import run_python

pytestmark = pytest.mark.filterwarnings(THREADS_RUN)
SECONDS = 90  # after which something hangs


# ---- multiprocessing ------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_pool(engine, memory, method):
    """Arrays go to the workers and come back by value; the workers merge on their own."""
    context = multiprocessing.get_context(method)
    tasks = [(seed, array) for seed in range(3) for array in memory.arrays]
    with scanning(memory), context.Pool(2, watch) as pool:
        results = pool.starmap_async(life_of_a_worker, tasks, 1).get(SECONDS)
        pool.close()
        pool.join()
    for (_, array), result in zip(tasks, results, strict=True):
        assert np.array_equal(result, array[::-1])


_inherited: list[Memory] = []


def use_inherited(seed: int) -> np.ndarray:
    """In a worker that was forked: what it inherited is right, and can be written."""
    (memory,) = _inherited
    live_anew(memory, 1000 + 10 * seed)
    return memory.arrays[0][:PAGE].copy()


def test_workers_that_inherit(engine, memory):
    """New workers are forked all the time, by a thread of the pool, as each does one task only."""
    _inherited[:] = [memory]
    try:
        context = multiprocessing.get_context("fork")
        with scanning(memory), context.Pool(2, watch, (), 1) as pool:
            results = pool.map_async(use_inherited, range(8), 1).get(SECONDS)
            pool.close()
            pool.join()
        for seed, page in enumerate(results):
            # live_anew leaves the inherited arrays like this.
            twin = Memory(engine, 1)
            twin.write(1000 + 10 * seed)
            twin.write_some(1001 + 10 * seed)
            assert np.array_equal(page, twin.arrays[0][:PAGE])
    finally:
        _inherited.clear()


@pytest.mark.parametrize("end", ["returns", "exits", "is terminated"])
def test_process(engine, memory, end):
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()

    def work() -> None:
        watch()
        live_anew(memory, 1000)
        there.send("right")
        if end == "exits":
            sys.exit(7)
        if end == "is terminated":
            there.recv()

    process = context.Process(target=work)
    process.start()
    live(memory, 100)
    assert here.poll(SECONDS)
    assert here.recv() == "right"
    if end == "is terminated":
        process.terminate()
    process.join(SECONDS)
    assert process.exitcode == {"returns": 0, "exits": 7, "is terminated": -15}[end]
    process.close()
    here.close()
    there.close()
    live(memory, 200)


def test_shared_memory_of_processes_is_none_of_ours(engine, memory):
    """What parent and child share on purpose, they go on sharing."""
    context = multiprocessing.get_context("fork")
    shared = context.RawArray("B", 4 * PAGE)

    def work() -> None:
        live_anew(memory, 1000)
        shared[:] = bytes([5]) * (4 * PAGE)

    assert in_child(work) == 0
    assert bytes(shared) == bytes([5]) * (4 * PAGE)
    memory.check()


# ---- programs -------------------------------------------------------------------------------


@pytest.mark.parametrize("close_fds", [True, False])
@pytest.mark.parametrize("preexec", [False, True])
def test_subprocess(engine, memory, close_fds, preexec):
    """`cat` gets the bytes of a merged array and gives them back. With preexec_fn, Python code runs
    in the child before, on what it inherited."""

    def use() -> None:
        watch()
        memory.check()
        own = Memory(engine, 2, 8)
        assert engine.dedup().bytes_saved == 8 * PAGE
        memory.write(3)
        own.check()
        memory.check()

    with scanning(memory):
        for n in range(10):
            done = subprocess.run(
                ["cat"],
                input=memoryview(memory.arrays[n % 2]),
                stdout=subprocess.PIPE,
                close_fds=close_fds,
                preexec_fn=use if preexec else None,
                timeout=SECONDS,
                check=True,
            )
            assert done.stdout == memory.expected[n % 2].tobytes()
    live(memory, 100)


def test_programs_get_no_descriptor_of_ours(engine, memory):
    """Also when a child is there already, and with close_fds off."""
    ready, go = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        watch()
        os.close(go[1])
        finish(lambda: (os.write(ready[1], b"x"), os.read(go[0], 1), memory.check()))
    os.read(ready[0], 1)
    live(memory, 100)
    listing = ["ls", "-l", "/proc/self/fd"]
    for preexec_fn in (None, memory.check):
        shown = subprocess.run(
            listing, stdout=subprocess.PIPE, close_fds=False, preexec_fn=preexec_fn, text=True
        ).stdout
        assert "/proc/" in shown
        assert "ksmcore" not in shown
        assert "pagemap" not in shown
    os.close(go[1])
    assert exit_code(pid) == 0
    for fd in (*ready, go[0]):
        os.close(fd)


def test_posix_spawn(engine, memory):
    """The child is made by vfork, or by clone: it never has a memory of its own."""
    source, target = os.memfd_create("source"), os.memfd_create("target")
    actions = [(os.POSIX_SPAWN_DUP2, source, 0), (os.POSIX_SPAWN_DUP2, target, 1)]
    cat = "/bin/cat"
    with scanning(memory):
        for n in range(20):
            array, expected = memory.arrays[n % 2], memory.expected[n % 2]
            assert os.pwrite(source, array, 0) == array.nbytes
            for fd in (source, target):
                os.lseek(fd, 0, os.SEEK_SET)
            pid = os.posix_spawn(cat, [cat], {}, file_actions=actions)
            assert exit_code(pid) == 0
            assert os.pread(target, array.nbytes, 0) == expected.tobytes()
    os.close(source)
    os.close(target)
    live(memory, 100)


def test_forkpty(engine, memory):
    with scanning(memory):
        for n in range(10):
            pid, terminal = os.forkpty()
            if pid == 0:
                watch()
                finish(lambda n=n: live_anew(memory, 1000 * n))
            assert exit_code(pid) == 0
            os.close(terminal)


def test_os_system_and_popen(engine, memory):
    with scanning(memory):
        for n in range(10):
            assert os.waitstatus_to_exitcode(os.system(f"exit {n}")) == n
            with os.popen(f"echo {n}") as output:
                assert output.read() == f"{n}\n"


# ---- who leaves first -----------------------------------------------------------------------


def run_script(code: str) -> tuple[int, list[str]]:
    """Exit code of a Python of its own, and the words that it, and all it leaves behind, print."""
    done = run_python(code, flags=("-W", "error", "-W", "ignore::DeprecationWarning"))
    assert done.stderr == ""
    return done.returncode, sorted(done.stdout.split())


@pytest.mark.parametrize("end", ["sys.exit(3)", "os._exit(3)", "os.kill(os.getpid(), 9)"])
def test_the_child_outlives_the_parent(end):
    """It waits until the parent is gone, and then checks, writes and merges."""
    code, words = run_script(f"""
        import os, sys
        import ksmcore
        from helpers.forks import Memory, finish, fork, live, live_anew

        engine = ksmcore.Engine()
        memory = Memory.merged(engine, 1)
        alive, ready = os.pipe(), os.pipe()

        def child():
            os.close(alive[1])
            memory.check()
            os.write(ready[1], b"x")
            assert os.read(alive[0], 1) == b""
            for seed in (1000, 2000):
                live_anew(memory, seed)
            os.write(1, b"right ")

        for _ in range(2):
            if fork() == 0:
                finish(child)
            os.read(ready[0], 1)
            live(memory, 100)
        {end}
    """)
    assert code == (-9 if "kill" in end else 3)
    assert words == ["right"] * 2


@pytest.mark.parametrize("uses", ["Memory.merged(engine, 2)", "engine", "None"])
def test_the_child_exits_as_programs_do(uses):
    """With handlers of atexit, ksmcore's among them, which closes the engines."""
    code, words = run_script(f"""
        import atexit, os, sys

        @atexit.register
        def last():  # registered first, called last: after ksmcore's own handler
            assert engine.closed
            memory.check()
            memory.write(7)
            memory.check()
            os.write(1, b"parent " if os.getpid() == parent else b"child ")

        import ksmcore
        from helpers.forks import Memory, exit_code, fork, live

        parent = os.getpid()
        engine = ksmcore.Engine()
        memory = Memory.merged(engine, 1)
        for seed in (100, 200):
            pid = fork()
            if pid == 0:
                own = {uses}
                memory.write(seed)
                sys.exit(5)
            assert exit_code(pid) == 5
            memory.check()
            live(memory, seed)
    """)
    assert code == 0
    assert words == ["child", "child", "parent"]


def test_a_daemon():
    """Forks twice, leaves its parents, closes all descriptors but its output, and works on."""
    code, words = run_script("""
        import os
        import ksmcore
        from helpers.forks import Memory, close_all_fds, exit_code, finish, fork, live_anew

        engine = ksmcore.Engine()
        memory = Memory.merged(engine, 1)
        alive = os.pipe()

        def daemon():
            close_all_fds(but=alive[:1])
            os.setsid()
            assert os.read(alive[0], 1) == b""
            for seed in (1000, 2000):
                live_anew(memory, seed)
            engine.close()
            memory.check()
            os.write(1, b"right ")

        if fork() == 0:
            os.close(alive[1])
            if fork() == 0:
                finish(daemon)
            os._exit(0)
        memory.write(2)
        engine.scan()
        engine.close()
        memory.check()
    """)
    assert code == 0
    assert words == ["right"]


def test_random_pages_differ():
    """The checks above rest on it."""
    pages = np.concatenate([random_pages(seed, 8) for seed in range(100)]).reshape(-1, PAGE)
    assert len({page.tobytes() for page in pages}) == 800
