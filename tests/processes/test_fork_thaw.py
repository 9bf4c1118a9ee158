"""Thawing: the parent gets its frozen shared pages back once no other process can map them.

That is looked at when a pass begins. What a process maps is gone when it ends (its parent need not
have waited for it), and when it becomes another program.
"""

import ctypes
import os
import resource
import signal
import subprocess

import numpy as np
import pytest

import ksmcore
from helpers.forks import (
    N_PAGES,
    THREADS_RUN,
    Child,
    Memory,
    close_all_fds,
    exit_code,
    finish,
    fork,
    in_child,
    live,
    live_anew,
    scanning,
    watch,
)
from helpers.kernels_view import descriptors
from helpers.mappings import n_maps
from helpers.memory import PAGE, random_pages

pytestmark = pytest.mark.filterwarnings(THREADS_RUN)


def held_pages(engine: ksmcore.Engine) -> int:
    """Pages of memory that the kernel counts for the store."""
    return sum(os.fstat(fd).st_blocks for fd in engine._core.store_fds) * 512 // PAGE


def assert_thawed(engine: ksmcore.Engine, n_shared: int) -> None:
    stats = engine.stats()
    assert stats.store_pages_frozen == 0
    assert stats.pages_shared == stats.store_pages == n_shared
    assert held_pages(engine) == n_shared
    engine._core.check()


def renew(memory: Memory, seed: int) -> None:
    """Give up the present shared pages, for new ones with other bytes."""
    memory.write(seed)
    memory.engine.scan()
    memory.engine.dedup()
    assert memory.engine.stats().pages_sharing >= N_PAGES
    memory.check()


def stays(memory: Memory):
    def work(pause) -> None:
        pause()
        memory.check()
        live_anew(memory, 1000)

    return work


@pytest.mark.parametrize("begin", ["scan", "dedup", "dedup of one"])
def test_when_the_child_is_gone(engine, memory, begin):
    with Child(stays(memory)) as child:
        child.paused()
        for seed in range(3):
            renew(memory, 10 + seed)
            engine.scan()
            assert engine.stats().store_pages_frozen >= N_PAGES
            assert held_pages(engine) == 2 * N_PAGES
        child.end()
    if begin == "scan":
        engine.scan()
    elif begin == "dedup":
        engine.dedup()
    else:
        engine.dedup(memory.arrays[0])
    assert_thawed(engine, N_PAGES)
    memory.check()
    live(memory, 100)


def test_before_the_parent_has_waited(engine, memory):
    with Child(stays(memory)) as child:
        child.paused()
        renew(memory, 10)
        child.go()
        child.ended()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        engine.scan()
        assert_thawed(engine, N_PAGES)
        assert child.exit_code() == 0


def test_a_child_that_is_killed(engine, memory):
    with Child(stays(memory)) as child:
        child.paused()
        renew(memory, 10)
    engine.scan()
    assert_thawed(engine, N_PAGES)


def test_shared_pages_that_kept_their_sharers(engine, memory):
    """They stay as they are, and when they lose their sharers later they go with the next pass."""
    other = Memory.merged(engine, 2)
    with Child(stays(memory)) as child:
        child.paused()
        renew(memory, 10)
        assert held_pages(engine) == 3 * N_PAGES
        child.end()
    engine.scan()
    assert_thawed(engine, 2 * N_PAGES)
    other.check()
    other.arrays.clear()
    other.expected.clear()
    engine.scan()
    assert_thawed(engine, N_PAGES)
    memory.check()


def test_all_that_lost_its_sharers(engine, memory):
    """By unregistering, and by dropping arrays."""
    other = Memory.merged(engine, 2)
    with Child(stays(memory)) as child:
        child.paused()
        for array in memory.arrays:
            engine.unregister(array)
        other.arrays.clear()
        assert engine.stats().pages_shared == 0
        assert held_pages(engine) == 2 * N_PAGES
        child.end()
    engine.scan()
    assert_thawed(engine, 0)
    memory.check()
    # Nobody else maps the file any more: it is used again.
    (fd,) = engine._core.store_fds
    again = Memory.merged(engine, 3)
    assert_thawed(engine, N_PAGES)
    assert engine._core.store_fds == [fd]
    live(again, 100)


def test_forks_that_are_over_leave_nothing_behind(engine):
    """Data comes and goes, and a pair of pages of each generation stays, while children come and
    end: one file is enough, and what is given up comes back."""
    kept = []
    for generation in range(40):
        memory = Memory.merged(engine, generation)
        pair = [engine.array(random_pages(100 + generation, 1)) for _ in range(2)]
        engine.dedup()
        kept.append(pair)
        assert_thawed(engine, N_PAGES + len(kept))
        assert in_child(lambda: None) == 0
        memory.arrays.clear()
        engine.scan()
        assert_thawed(engine, len(kept))
        assert len(engine._core.store_fds) == 1
    for generation, pair in enumerate(kept):
        for one in pair:
            assert np.array_equal(one, random_pages(100 + generation, 1))


def test_what_is_new_goes_elsewhere_only_for_as_long_as_a_child_lives(engine):
    for generation in range(40):
        before = Memory.merged(engine, 2 * generation)
        (old,) = {os.fstat(fd).st_ino for fd in engine._core.store_fds}
        with Child(stays(before)) as child:
            child.paused()
            after = Memory.merged(engine, 2 * generation + 1)
            assert len({os.fstat(fd).st_ino for fd in engine._core.store_fds} - {old}) == 1
            child.end()
        before.check()
        after.check()
        before.arrays.clear()
        after.arrays.clear()
        engine.scan()
        assert_thawed(engine, 0)
        assert len(engine._core.store_fds) == 1


def test_a_child_that_becomes_another_program(engine, memory):
    """It lives on, with a memory of its own."""
    program = subprocess.Popen(
        ["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, preexec_fn=memory.check
    )
    renew(memory, 10)
    engine.scan()
    assert_thawed(engine, N_PAGES)
    assert program.communicate(b"still here")[0] == b"still here"


@pytest.mark.parametrize("closes", [False, True], ids=["", "without descriptors"])
def test_grandchildren_count(engine, memory, closes):
    def work(pause) -> None:
        if closes:
            close_all_fds()
        if fork() != 0:
            os._exit(0)
        if closes:
            close_all_fds()
        pause()
        memory.check()
        live_anew(memory, 1000)

    with Child(work) as child:
        assert child.exit_code() == 0
        child.paused()
        renew(memory, 10)
        engine.scan()
        assert engine.stats().store_pages_frozen >= N_PAGES
        assert held_pages(engine) == 2 * N_PAGES
        child.go()
        child.ended()
        child.gone()
    engine.scan()
    assert_thawed(engine, N_PAGES)
    memory.check()


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2)])
def test_siblings_count(engine, memory, order):
    """Of one content each: at the latest when all of them are gone, all is given back."""
    children = []
    try:
        for seed in range(4):
            children.append(Child(stays(memory)))
            children[-1].paused()
            renew(memory, 10 + seed)
        for left, which in zip((3, 2, 1, 0), order, strict=True):
            children[which].end()
            renew(memory, 20 + left)
            if left:
                assert engine.stats().store_pages_frozen > 0
    finally:
        for child in children:
            child.__exit__()
    engine.scan()
    assert_thawed(engine, N_PAGES)
    live(memory, 100)


def test_what_died_before_a_later_fork_waits_for_earlier_ones_only(engine, memory):
    with Child(stays(memory)) as first:
        first.paused()
        renew(memory, 10)
        assert held_pages(engine) == 2 * N_PAGES
        with Child(stays(memory)) as second:
            second.paused()
            first.end()
            engine.scan()
            # The second child never mapped what the first one did.
            assert held_pages(engine) == N_PAGES
            renew(memory, 11)
            assert held_pages(engine) == 2 * N_PAGES
            assert engine.stats().store_pages_frozen >= N_PAGES
            engine.scan()
            second.end()
    engine.scan()
    assert_thawed(engine, N_PAGES)
    memory.check()


def test_a_succession_that_never_ends(engine, memory):
    """There is a child at any time, and yet the parent gets its pages back: each waits for the
    children that it was shared with, not for all."""
    child = Child(stays(memory))
    try:
        child.paused()
        for seed in range(8):
            renew(memory, 10 + seed)
            younger = Child(stays(memory))
            younger.paused()
            child.end()
            child.__exit__()
            child = younger
            engine.scan()
            assert held_pages(engine) <= 2 * N_PAGES
        child.end()
    finally:
        child.__exit__()
    engine.scan()
    assert_thawed(engine, N_PAGES)


def test_a_child_that_stays_costs_what_it_shares(engine, memory):
    """What was merged after the fork comes and goes as ever."""
    with Child(stays(memory)) as child:
        child.paused()
        for seed in range(20):
            renew(memory, 10 + seed)
            assert held_pages(engine) == 2 * N_PAGES
        child.end()


def test_many_children_leave_nothing(engine, memory):
    """No memory, no descriptor, no mapping; shared pages are found and shared as before."""
    held = []
    for seed in range(30):
        assert in_child(memory.check) == 0
        renew(memory, 10 + seed)
        held.append((n_maps(), len(descriptors()), held_pages(engine)))
    # A few mappings more or less: Python's own memory, and pieces of the arrays.
    assert held[-1][0] <= held[5][0] + 8
    assert held[-1][1] == held[5][1]
    assert held[-1][2] == N_PAGES
    engine.scan()
    assert_thawed(engine, N_PAGES)


def test_the_limit_of_shared_pages(rng):
    with ksmcore.Engine(max_shared_pages=N_PAGES) as engine:
        memory = Memory.merged(engine, 1)
        for seed in range(3):
            with Child(stays(memory)) as child:
                child.paused()
                renew(memory, 10 + seed)
                assert engine.stats().pages_shared == N_PAGES
                child.end()
            renew(memory, 20 + seed)
            assert_thawed(engine, N_PAGES)
            extra = Memory(engine, 30 + seed, 4)
            assert engine.dedup().skipped["max_shared_pages"] > 0
            assert_thawed(engine, N_PAGES)
            extra.check()


def test_stretches_of_one_page(engine, rng):
    """Blocks of several copies are given back whole."""
    n_stretch = 1600
    array = engine.empty((n_stretch, PAGE), np.uint8)
    array[:] = random_pages(1, 1)
    engine.dedup()
    n_copies = engine.stats().store_pages
    assert n_copies > 1

    def work(pause) -> None:
        pause()
        assert (array == random_pages(1, 1)).all()

    with Child(work) as child:
        child.paused()
        array[:] = random_pages(2, 1)
        engine.dedup()
        assert held_pages(engine) == 2 * n_copies
        assert (array == random_pages(2, 1)).all()
        child.end()
    engine.scan()
    assert_thawed(engine, n_copies)
    array[: n_stretch // 2] = 0
    engine.scan()
    engine.scan()
    assert (array[n_stretch // 2 :] == random_pages(2, 1)).all()
    engine._core.check()


def test_two_engines(engine, memory):
    with Child(stays(memory)) as child, ksmcore.Engine() as other:
        child.paused()
        # Made after the fork: no child can map it.
        young = Memory.merged(other, 2, N_PAGES)
        renew(young, 3)
        assert other.stats().store_pages_frozen == 0
        with Child(stays(young)) as second:
            second.paused()
            renew(young, 4)
            renew(memory, 10)
            assert held_pages(other) == held_pages(engine) == 2 * N_PAGES
            second.end()
        child.end()
        engine.scan()
        other.scan()
        assert_thawed(engine, N_PAGES)
        assert_thawed(other, N_PAGES)
        young.check()
    memory.check()


def test_in_a_child(engine, memory):
    """A child's engine gets back what its own children held."""

    def work() -> None:
        own = Memory.merged(engine, 2)
        with Child(stays(own)) as grandchild:
            grandchild.paused()
            renew(own, 10)
            engine.scan()
            assert engine.stats().store_pages_frozen >= N_PAGES
            grandchild.end()
        engine.scan()
        assert_thawed(engine, N_PAGES)
        own.check()
        memory.check()

    assert in_child(work) == 0
    renew(memory, 11)
    engine.scan()
    assert_thawed(engine, N_PAGES)


def test_a_plain_c_fork(engine, memory):
    ready, go = os.pipe(), os.pipe()
    pid = ctypes.CDLL(None).fork()
    if pid == 0:
        watch()
        finish(lambda: (os.write(ready[1], b"x"), os.read(go[0], 1), memory.check()))
    os.read(ready[0], 1)
    renew(memory, 10)
    engine.scan()
    assert engine.stats().store_pages_frozen >= N_PAGES
    os.write(go[1], b"g")
    assert exit_code(pid) == 0
    engine.scan()
    assert_thawed(engine, N_PAGES)
    for fd in (*ready, *go):
        os.close(fd)


def test_a_fork_that_fails(engine):
    """There is no child that could be waited for."""

    def work() -> None:
        memory = Memory.merged(engine, 1)
        if os.getuid() == 0:
            os.setuid(65534)  # the limit does not hold for root
        resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
        with pytest.raises(BlockingIOError):
            os.fork()
        renew(memory, 10)
        engine.scan()
        assert_thawed(engine, N_PAGES)

    assert in_child(work) == 0


def test_after_forks_while_another_thread_scans(engine, memory):
    children = []
    with scanning(memory):
        for _ in range(10):
            assert in_child(memory.check) == 0
            children.append(Child(stays(memory)))
            children[-1].paused()
        for child in children:
            with child:
                child.end()
    engine.dedup()
    engine.dedup()
    assert_thawed(engine, N_PAGES)
    live(memory, 100)


def test_closing_while_a_child_lives(engine, memory):
    with Child(stays(memory)) as child:
        child.paused()
        renew(memory, 10)
        engine.close()
        memory.check()
        child.end()
    memory.check()


def test_a_child_that_nobody_told_of(engine, memory):
    """What it shows when the others are gone is kept, and given back once it has ended."""
    if not hasattr(ctypes.CDLL(None), "_Fork"):
        pytest.skip("the C library has no _Fork")
    reading, telling = os.pipe()
    untold = ctypes.PyDLL(None)._Fork()
    if untold == 0:
        # The kernel counts what is read.
        os.write(telling, b"." if all(array.any() for array in memory.arrays) else b"")
        while True:
            signal.pause()
    try:
        assert os.read(reading, 1) == b"."
        with Child(stays(memory)) as child:
            child.paused()
            renew(memory, 10)
            child.end()
        for _ in range(3):
            engine.scan()
            engine._core.check()
        assert held_pages(engine) == 2 * N_PAGES
    finally:
        os.close(reading)
        os.close(telling)
        os.kill(untold, signal.SIGKILL)
        os.waitpid(untold, 0)
    engine.scan()
    assert_thawed(engine, N_PAGES)
