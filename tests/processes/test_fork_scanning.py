"""Forks in the middle of a pass of another thread: nobody waits for ever, nobody sees wrong bytes.

A child that hangs is ended by its watchdog, see helpers/forks.py.
"""

import threading

import pytest

import ksmcore
from helpers.forks import (
    THREADS_RUN,
    Child,
    Memory,
    Paused,
    another_is_in,
    exit_code,
    finish,
    fork,
    in_child,
    scanning,
)
from helpers.memory import PAGE, random_pages
from helpers.processes import run_python
from helpers.waiting import wait_until
from ksmcore._testing import hooks

pytestmark = pytest.mark.filterwarnings(THREADS_RUN)


def use_at_once(memory: Memory, seed: int) -> None:
    """Whatever lock or window the scanning thread of the parent was in."""
    engine = memory.engine
    assert not hooks.handler_installed()
    own = Memory(engine, seed, 8)
    memory.write(seed)
    assert engine.dedup().bytes_saved == 8 * PAGE
    assert not hooks.handler_installed()
    own.check()
    memory.check()


def test_the_child_scans_at_once(engine, memory):
    with scanning(memory):
        for n in range(120):
            assert in_child(lambda n=n: use_at_once(memory, 100 + n)) == 0
        assert engine.stats().pages_merged > 1000


def test_the_child_looks_and_writes_first(engine, memory):
    """Nothing of ksmcore is called before the inherited bytes are compared, and written. What is
    called first then is `close`."""

    def work() -> None:
        memory.check()
        memory.write(7)
        memory.check()
        engine.close()
        memory.check()

    with scanning(memory):
        for _ in range(60):
            assert in_child(work) == 0


def test_while_regions_come_and_go(engine, memory):
    """The thread registers, holds, estimates and unregisters between its passes: the locks of that
    may be taken when the fork comes, too."""
    buffers = [bytearray(random_pages(i, 6)) for i in range(2)]
    n_holds = []

    def between(n: int) -> None:
        with engine.register(buffers[0]) as region:
            engine.dedup(buffers[1], region)
            with region.hold():
                n_holds.append(n)
            engine.estimate(buffers[0])
            engine.unregister(buffers[1])
        array = engine.full(3 * PAGE, n % 250 + 1, "u1")
        engine.dedup(array)
        assert engine.stats().regions > 0

    def work() -> None:
        buffer = bytearray(random_pages(50, 6))
        with engine.register(buffer) as region, region.hold():
            engine.estimate(buffer)
        use_at_once(memory, 60)
        for i in range(2):
            assert buffers[i] == random_pages(i, 6).tobytes()
        engine.close()

    with scanning(memory, between):
        for _ in range(60):
            assert in_child(work) == 0
    assert len(n_holds) > 10


def test_while_engines_come_and_go(engine, memory):
    """Begin and end of a pass install and remove the handler, each under a lock of its own."""

    def between(n: int) -> None:
        with ksmcore.Engine() as another:
            own = Memory(another, n, 4)
            # What is being written to the store while the process forks is left for the next pass.
            wait_until(lambda: another.dedup(*own.arrays) and another.stats().pages_sharing == 4)
            own.check()

    def work() -> None:
        with ksmcore.Engine() as another:
            Memory.merged(another, 1, 4).check()
        use_at_once(memory, 60)

    with scanning(memory, between):
        for _ in range(40):
            assert in_child(work) == 0


def test_forks_from_several_threads(engine, memory):
    """Three threads fork at the same time, and their children live at the same time."""
    codes: list[int] = []

    def forks(which: int) -> None:
        for n in range(6):
            pids = []
            for k in range(3):
                pid = fork()
                if pid == 0:
                    finish(lambda k=k, n=n: use_at_once(memory, 1000 * which + 10 * n + k))
                pids.append(pid)
            codes.extend(exit_code(pid) for pid in pids)

    with scanning(memory):
        threads = [threading.Thread(target=forks, args=(which,)) for which in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert codes == [0] * 54


def test_generations(engine, memory):
    """A child that has a scanning thread of its own forks, too."""

    def work() -> None:
        memory.check()
        own = Memory.merged(engine, 2)
        with scanning(own):
            memory.write(3)
            for n in range(10):
                assert in_child(lambda n=n: (own.check(), use_at_once(memory, 4 + n))) == 0
            memory.check()

    with scanning(memory):
        for _ in range(4):
            assert in_child(work) == 0


def test_children_that_stay_for_a_while(engine, memory):
    """Five at a time, while the thread gives up the shared pages that they map, and takes new ones;
    each leaves as the next comes, in turn the oldest and the second but one."""

    def work(pause) -> None:
        pause()
        memory.check()
        use_at_once(memory, 60)

    children: list[Child] = []
    try:
        with scanning(memory):
            for n in range(60):
                children.append(Child(work))
                children[-1].paused()
                if len(children) == 5:
                    with children.pop(n % 2) as child:
                        child.end()
            while children:
                with children.pop() as child:
                    child.end()
    finally:
        for child in children:
            child.__exit__()


def test_while_an_area_is_being_closed(engine, memory, monkeypatch):
    """Whatever it waits for: to make large regions plain again takes long."""
    area = engine.area()
    buffer = bytearray(random_pages(50, 6))
    region = area.register(buffer)
    paused = Paused(type(region).close)
    monkeypatch.setattr(type(region), "close", lambda self: paused(self))

    def work() -> None:
        assert area.regions == ()
        area.close()
        with engine.area() as own:
            own.register(bytearray(random_pages(51, 6)))

    with another_is_in(paused, area.close):
        assert in_child(work) == 0
    assert region.closed
    assert buffer == random_pages(50, 6).tobytes()


def test_while_the_allocator_is_being_installed():
    """For the first time."""
    done = run_python(
        """
        import numpy as np
        import ksmcore
        from helpers.forks import Paused, another_is_in, in_child
        from ksmcore._arrays import installing

        def work():
            ksmcore.install_allocator()
            with ksmcore.allocator():
                assert np.ones(1 << 20, np.uint8).all()

        paused = installing._numpy_wants_huge = Paused(installing._numpy_wants_huge)
        with another_is_in(paused, ksmcore.install_allocator):
            assert in_child(work) == 0
        assert ksmcore.stats().regions == 0
        kept = np.ones(1 << 20, np.uint8)
        assert ksmcore.stats().regions == 1
        """,
        flags=("-W", "ignore::DeprecationWarning"),
    )
    assert (done.returncode, done.stderr) == (0, "")
