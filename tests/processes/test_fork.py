"""os.fork: parent and child see right bytes for ever, whatever either does afterwards."""

import fcntl
import gc
import os

import numpy as np
import pytest

import ksmcore
from helpers.forks import (
    N_PAGES,
    THREADS_RUN,
    Child,
    Memory,
    close_all_fds,
    fork,
    in_child,
    live,
    live_anew,
)
from helpers.memory import PAGE, random_pages

pytestmark = pytest.mark.filterwarnings(THREADS_RUN)


class Files:
    """Other files at the lowest free descriptors; nobody may change them."""

    def __init__(self) -> None:
        self.fds = [os.memfd_create(f"{i}", os.MFD_ALLOW_SEALING) for i in range(12)]
        for fd in self.fds:
            os.pwrite(fd, random_pages(fd, 4), 0)

    def check(self) -> None:
        for fd in self.fds:
            assert os.pread(fd, 8 * PAGE, 0) == random_pages(fd, 4).tobytes()
            assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) == 0


# ---- what one does, the other does not see --------------------------------------------------


def remake(memory: Memory) -> None:
    for again in range(3):
        memory.remake(20 + again)
        memory.engine.dedup()
        memory.check()


def unregister(memory: Memory) -> None:
    for array in memory.arrays:
        memory.engine.unregister(array)
    memory.check()
    memory.write(30)
    memory.check()


def close(memory: Memory) -> None:
    memory.engine.close()
    memory.check()
    memory.write(40)
    memory.check()


def others_take_the_place(memory: Memory) -> None:
    """Slots are given back and used again for other bytes: punched or rewritten, if not frozen."""
    memory.write(50)
    memory.engine.scan()
    before = os.fstat(memory.engine._core.store_fd).st_size
    others = [Memory.merged(memory.engine, 60 + i) for i in range(8)]
    for other in others:
        other.write(70)
        memory.engine.dedup()
        other.check()
    memory.check()
    assert os.fstat(memory.engine._core.store_fd).st_size == before  # one extent is enough


def live_on(memory: Memory) -> None:
    live(memory, 80)


def fork_more(memory: Memory) -> None:
    for seed in range(3):
        assert in_child(lambda seed=seed: live_anew(memory, 90 + seed)) == 0
        memory.write(95 + seed)
        memory.engine.dedup()
        memory.check()


PARENT_ACTS = [remake, unregister, close, others_take_the_place, live_on, fork_more]


@pytest.mark.parametrize("act", PARENT_ACTS, ids=lambda act: act.__name__)
def test_the_child_keeps_its_bytes_whatever_the_parent_does(engine, memory, act):
    def work(pause) -> None:
        memory.check()
        pause()
        memory.check()
        live_anew(memory, 1000)
        pause()
        memory.check()
        live_anew(memory, 2000)

    with Child(work) as child:
        child.paused()
        act(memory)
        child.step()
        memory.check()
        if not engine.closed:
            live_on(memory)
        child.end()
    memory.check()


def test_what_a_child_maps_is_frozen_in_the_parent(engine, memory):
    def work(pause) -> None:
        pause()
        memory.check()

    with Child(work) as child:
        child.paused()
        memory.write(2)
        engine.scan()  # the sharing is found broken; the shared pages are released
        assert engine.stats().pages_shared == 0
        assert engine.stats().store_pages_frozen >= N_PAGES
        assert os.fstat(engine._core.store_fd).st_blocks * 512 >= N_PAGES * PAGE
        memory.check()
        child.end()


def child_writes(memory: Memory) -> None:
    memory.write(10)
    memory.check()
    memory.write_some(11)
    memory.check()


def child_drops(memory: Memory) -> None:
    """Its copies of the arrays go; new ones, at their addresses, belong to the child's engine."""
    remake(memory)
    for array in memory.arrays:
        memory.engine.unregister(array)
    memory.check()


def child_closes_all_fds(memory: Memory) -> None:
    close_all_fds()
    live_anew(memory, 1000)
    # Now its own engine has descriptors; these go too, and the numbers are used again.
    own = Memory.merged(memory.engine, 12)
    close_all_fds()
    files = Files()
    for seed in range(3):
        own.write(13 + seed)
        memory.engine.scan()
        memory.engine.dedup()
        own.check()
        memory.check()
    memory.engine.close()
    own.check()
    memory.check()
    # Nor are they closed when an engine ends that has none of its own any more.
    with ksmcore.Engine() as another:
        last = Memory.merged(another, 16)
        close_all_fds()
        files = Files()
    last.check()
    del last, another
    gc.collect()
    files.check()


def child_closes_engine(memory: Memory) -> None:
    memory.engine.close()
    assert memory.engine.closed
    memory.check()
    memory.write(14)
    memory.check()
    with ksmcore.Engine() as another:
        live(Memory(another, 15), 16)


def child_exits_at_once(memory: Memory) -> None:
    memory.engine.dedup(*Memory(memory.engine, 17).arrays)
    os._exit(0)


def child_uses_its_own(memory: Memory) -> None:
    live_anew(memory, 1000)


CHILD_ACTS = [
    child_writes,
    child_drops,
    child_closes_all_fds,
    child_closes_engine,
    child_exits_at_once,
    child_uses_its_own,
]


@pytest.mark.parametrize("act", CHILD_ACTS, ids=lambda act: act.__name__[6:])
def test_the_parent_keeps_its_bytes_whatever_the_child_does(engine, memory, act):
    """Three children, the parent changing in between; its numbers change by its own doing only."""
    for seed in range(3):
        before = engine.stats()
        assert in_child(lambda: act(memory)) == 0
        assert engine.stats() == before
        memory.check()
        engine._core.check()
        live(memory, 100 + 100 * seed)
        engine.dedup()


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_parent_that_closes_all_descriptors(engine, when):
    """A child plays the parent. Closed before it forks, or after: then its engine must not write
    to, punch or seal what has the numbers now, and the grandchild keeps its bytes."""

    def parent() -> None:
        own = Memory.merged(engine, 2)

        def grandchild(pause) -> None:
            pause()
            own.check()
            live_anew(own, 3000)

        if when == "before":
            close_all_fds()
        with Child(grandchild) as child:
            child.paused()
            if when == "after":
                close_all_fds(but=child.fds)
            files = Files()
            for seed in range(3):
                own.write(10 + seed)
                engine.scan()
                engine.dedup()
                own.check()
            child.end()
            engine.dedup()
            own.check()
            files.check()
        engine.close()
        own.check()

    assert in_child(parent) == 0


@pytest.mark.parametrize("parent_closes", [False, True])
def test_parent_and_child_in_turn(engine, memory, parent_closes):
    """Each writes and merges, and sees its own bytes after each step of the other."""

    def work(pause) -> None:
        for seed in range(4):
            memory.check()
            live_anew(memory, 1000 * (seed + 1))
            pause()
        memory.check()

    with Child(work) as child:
        for seed in range(3):
            child.paused()
            memory.check()
            live(memory, 100 * seed)
            child.go()
        child.paused()
        if parent_closes:
            engine.close()
        child.end()
    memory.check()


# ---- generations ----------------------------------------------------------------------------


def test_five_generations(engine, memory):
    """Each child forks the next one and ends; the last is right when all its ancestors are gone,
    and so is what each of them had merged, which only the later ones still map."""

    def work(pause) -> None:
        ancestral = [memory]
        for generation in range(4):
            assert engine.stats().regions == 0
            ancestral.append(Memory.merged(engine, 2000 + generation))
            if fork() != 0:
                for one in ancestral:
                    one.write(3000 + generation)
                engine.scan()
                os._exit(0)
            for one in ancestral:
                one.check()
            pause()
            for one in ancestral:
                one.check()
            ancestral[0].write_some(4000 + generation)
        live_anew(memory, 5000)

    with Child(work) as child:
        for generation in range(4):
            child.paused()
            live(memory, 100 * generation)
            child.go()
        assert child.exit_code() == 0
        child.ended()
    memory.check()


@pytest.mark.parametrize("closes", [False, True], ids=["", "without descriptors"])
def test_a_grandchild_outlives_the_child(engine, memory, closes):
    """It maps what the parent had shared, and what the child had."""

    def work(pause) -> None:
        own = Memory.merged(engine, 5)
        if closes:
            close_all_fds()
        if fork() != 0:
            # What the child does last must not reach its own child either.
            own.write(6)
            engine.scan()
            engine.close()
            os._exit(0)
        pause()
        memory.check()
        own.check()
        live_anew(own, 2000)
        memory.check()
        pause()
        live_anew(memory, 3000)
        own.check()

    with Child(work) as child:
        assert child.exit_code() == 0
        child.paused()
        live(memory, 100)
        child.step()
        engine.close()
        memory.check()
        child.go()
        child.ended()
    memory.check()


def test_siblings(engine, memory):
    """Five children, forked from five contents, keep each its own; they end in another order."""

    def work(pause) -> None:
        pause()
        memory.check()
        live_anew(memory, 1000)

    children = []
    try:
        for seed in range(5):
            children.append(Child(work))
            children[-1].paused()
            memory.write(200 + seed)
            engine.dedup()
            memory.check()
        for which in (3, 0, 4, 1, 2):
            children[which].end()
            live(memory, 300 + 100 * which)
    finally:
        for child in children:
            child.__exit__()
    memory.check()


@pytest.mark.parametrize("seed", range(3))
def test_a_family_at_random(engine, seed):
    """Parent and children, in a random order, do random things; everybody compares all bytes."""
    memory = Memory.merged(engine, seed, 16)
    rng = np.random.default_rng(seed)
    children: list[Child] = []
    n_children = 0

    def step(rng: np.random.Generator, mine: Memory, others: list[Memory]) -> None:
        what, salt = rng.integers(8), int(rng.integers(10**6))
        if what == 0:
            mine.write(salt)
        elif what in (1, 2):
            mine.write_some(salt)
        elif what == 3:
            mine.remake(salt)
        elif what == 4 and others:
            others[-1].write_some(salt)
        elif what == 5:
            engine.scan()
        else:
            engine.dedup()
        for one in (mine, *others):
            one.check()

    def work(pause) -> None:
        its_rng = np.random.default_rng([seed, n_children])
        own = Memory(engine, 500 + n_children, 16)
        while True:
            pause()
            step(its_rng, own, [memory])

    try:
        for _ in range(120):
            turn = rng.integers(7)
            if turn == 0 and len(children) < 5:
                n_children += 1
                children.append(Child(work))
                children[-1].paused()
            elif turn == 1 and children:
                # It is killed in the middle of its life.
                children.pop(rng.integers(len(children))).__exit__()
            elif turn in (2, 3) and children:
                children[rng.integers(len(children))].step()
            else:
                step(rng, memory, [])
    finally:
        for child in children:
            child.__exit__()
    assert n_children > 5
    memory.check()
    engine._core.check()
