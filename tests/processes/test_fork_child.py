"""What a forked child inherits: an empty, usable engine, closed regions, no locks or holds."""

import gc
import os
import threading
import warnings

import numpy as np
import pytest

import ksmcore
from helpers.forks import (
    N_PAGES,
    THREADS_RUN,
    Memory,
    exit_code,
    finish,
    fork,
    in_child,
    live,
    live_anew,
)
from helpers.memory import PAGE, private_memory, random_pages
from ksmcore._engine.passes import BATCH_PAGES
from ksmcore._kernel import forks
from ksmcore._testing import hooks

pytestmark = pytest.mark.filterwarnings(THREADS_RUN)


def test_the_childs_engine_starts_empty_and_works(engine, memory):
    region = engine.register(bytearray(16 * PAGE))
    engine.dedup()
    before = engine.stats()

    def work() -> None:
        fresh = ksmcore.Engine()
        assert engine.stats() == fresh.stats()
        assert engine.stats().as_dict() == fresh.stats().as_dict()
        assert engine.regions == ()
        assert engine.estimate().pages == 0
        assert region.closed
        assert not hooks.handler_installed()
        own = Memory(engine, 2, 64)
        assert engine.dedup().bytes_saved == 64 * PAGE
        assert engine.stats().pages_shared == engine.stats().pages_sharing == 64
        own.check()
        memory.check()
        engine.close()
        own.check()
        memory.check()

    assert in_child(work) == 0
    assert engine.stats() == before
    assert engine.regions == (region,)
    assert not region.closed
    engine._core.check()
    region.close()


@pytest.mark.parametrize("order", ["digest", "content"])
def test_settings_are_inherited(order):
    with ksmcore.Engine(order=order, max_shared_pages=5, use_zero_pages=False) as engine:
        memory = Memory(engine, 1)
        engine.dedup()
        assert engine.stats().store_pages == 5

        def work() -> None:
            own = Memory(engine, 2)
            zeros = engine.array(np.zeros(4 * PAGE, np.uint8))
            report = engine.dedup()
            assert engine.settings.order == order
            assert engine.stats().store_pages == 5
            assert report.skipped["max_shared_pages"] > 0
            assert report.pages_zeroed == 0
            assert not zeros.any()
            own.check()
            memory.check()

        assert in_child(work) == 0
        memory.check()


def test_an_inherited_region_is_closed(engine, memory):
    """Nothing comes of closing it again, by close, by unregister, or by the end of `with`."""
    buffer = private_memory(8)
    buffer[:] = b"\x05" * len(buffer)
    with engine.register(buffer) as region:
        engine.dedup()

        def work() -> None:
            with region:
                assert region.closed
                assert "closed" in repr(region)
                with pytest.raises(ValueError, match="closed"):
                    region.hold()
            region.close()
            engine.unregister(region)
            with pytest.raises(ValueError, match="not registered"):
                engine.unregister(memory.arrays[0])
            # It maps the parent's store, which the child's engine cannot undo; a copy does not.
            with pytest.raises(ValueError, match=r"ksmcore\.copy"):
                engine.register(buffer)
            copies = [engine.copy(np.frombuffer(buffer, np.uint8)) for _ in range(2)]
            assert engine.dedup(*copies).pages_merged == 16
            assert all((copy == 5).all() for copy in copies)
            assert buffer[:] == b"\x05" * len(buffer)

        assert in_child(work) == 0
        assert not region.closed
        assert engine.regions == (region,)
        assert buffer[:] == b"\x05" * len(buffer)
    assert region.closed
    buffer.close()


def test_a_hold_of_the_parent_is_none_in_the_child(engine, memory):
    with engine.register(bytearray(random_pages(7, 8))) as region, region.hold():
        held = engine.hold(memory.arrays[0])
        held.__enter__()

        def work() -> None:
            assert region.closed
            own = Memory.merged(engine, 2)
            with engine.hold(own.arrays[0]):
                own.write(3)
                assert engine.dedup().pages_merged == 0
            assert engine.dedup().bytes_saved == N_PAGES * PAGE
            # The parent's hold is left here too, after the child's engine began anew.
            held.__exit__(None, None, None)
            own.check()
            memory.check()

        assert in_child(work) == 0
        memory.write(4)
        assert engine.dedup().skipped["held"] >= N_PAGES
        held.__exit__(None, None, None)
        memory.check()
    assert engine.dedup().pages_merged == 2 * N_PAGES
    memory.check()


def test_a_hold_is_left_in_the_child_first(engine, memory):
    """Leaving the parent's hold is the first that the child's engine hears of."""
    held = engine.hold(memory.arrays[0])
    held.__enter__()

    def work() -> None:
        held.__exit__(None, None, None)
        live_anew(memory, 1000)

    assert in_child(work) == 0
    held.__exit__(None, None, None)
    live(memory, 100)


@pytest.mark.parametrize("end", ["returns", "raises", "forgets"])
def test_a_fork_in_the_middle_of_a_pass(engine, memory, end):
    """A progress callback forks: the child too comes back into the pass, which is its parent's."""
    large = Memory(engine, 2, BATCH_PAGES)
    original = os.getpid()
    pids = []

    def progress(done: int, total: int) -> None:
        if not pids and 0 < done < total:
            assert hooks.handler_installed()
            pids.append(fork())
            assert hooks.handler_installed() == (os.getpid() == original)
            if pids[0] == 0 and end == "raises":
                raise KeyboardInterrupt
            if pids[0] == 0 and end == "forgets":
                finish(child)

    def child() -> None:
        large.check()
        live_anew(memory, 1000)
        assert not hooks.handler_installed()

    try:
        engine.dedup(progress=progress)
    except BaseException:
        if os.getpid() == original or end != "raises":
            raise
    finally:
        if os.getpid() != original:
            finish(child)
    assert exit_code(pids[0]) == 0
    assert engine.stats().pages_sharing == N_PAGES + BATCH_PAGES
    large.check()
    live(memory, 100)


def test_memory_info_and_estimates_in_a_child(engine, memory):
    def work() -> None:
        own = Memory.merged(engine, 2)
        assert ksmcore.memory_info().rss > 0
        assert engine.estimate(np.copy(own.arrays[0])).pages > 0
        assert engine.stats().store_pages_frozen == 0
        assert forks.generation() == generation + 1

    generation = forks.generation()
    before = ksmcore.memory_info().saved
    assert in_child(work) == 0
    assert ksmcore.memory_info().saved == before


def test_threads_of_a_child_share_its_engine(engine, memory):
    def work() -> None:
        failures: list[BaseException] = []

        def use(seed: int) -> None:
            try:
                own = Memory(engine, seed)
                for again in range(5):
                    own.write(seed + again)
                    engine.dedup(*own.arrays)
                    own.check()
                    memory.check()
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=use, args=(1000 * i,)) for i in range(1, 5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        engine._core.check()

    assert in_child(work) == 0
    memory.check()


def test_an_engine_that_only_the_child_drops(engine, memory):
    """Its Engine object is collected in the child, with all that was registered; no warning."""

    def work() -> None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            doomed.clear()
            gc.collect()
        assert [str(one.message) for one in caught] == []
        assert buffer == random_pages(3, 8).tobytes()
        memory.check()

    doomed = [ksmcore.Engine()]
    buffer = bytearray(random_pages(3, 8))
    doomed.append(doomed[0].register(buffer))
    doomed.append(doomed[0].full(8 * PAGE, 3, np.uint8))
    doomed[0].dedup()
    assert in_child(work) == 0
    assert (doomed[2] == 3).all()
    assert not doomed[1].closed
    doomed[0].close()
    assert buffer == random_pages(3, 8).tobytes()
