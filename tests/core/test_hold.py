"""Holds: while one is taken, nothing in its region is protected or remapped."""

import os
import threading
import time

import numpy as np
import pytest

import ksmcore
from helpers.kernels_view import store_mappings
from helpers.memory import PAGE, extent, private_memory, random_pages
from ksmcore._engine.passes import BATCH_PAGES


@pytest.fixture
def guard(each_guard):
    return each_guard


@pytest.fixture
def twins(engine, rng):
    source = random_pages(rng, 32)
    return source, engine.array(source), engine.array(source)


def test_nothing_in_a_held_region_is_merged(engine, twins):
    source, a, b = twins
    with engine.hold(a):
        report = engine.dedup(a, b)
        assert report.pages_merged == 0
        assert report.skipped["held"] == 32
        assert store_mappings(*extent(a)) == []
    assert engine.dedup(a, b).pages_merged == 64
    assert np.array_equal(a, source)


def test_a_partner_in_a_held_region_is_left_alone(engine, rng):
    """A hold is taken when the pages of its region already stand in the unstable tree."""
    source = random_pages(rng, BATCH_PAGES)
    arrays = [engine.array(source), engine.array(source)]
    first, _ = sorted(arrays, key=extent)
    held = engine.hold(first)

    def hold_the_first(done: int, total: int) -> None:
        if done == BATCH_PAGES:
            held.__enter__()

    report = engine.dedup(progress=hold_the_first)
    assert report.pages_merged == 0
    assert report.skipped["held"] == BATCH_PAGES
    held.__exit__(None, None, None)
    engine._core.check()
    assert engine.dedup().pages_merged == 2 * BATCH_PAGES


def test_holds_nest_and_are_shared_between_threads(engine, twins):
    _, a, b = twins
    inside, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with engine.hold(a):
            inside.set()
            leave.wait()

    thread = threading.Thread(target=hold)
    with engine.hold(a):
        with engine.hold(a):
            thread.start()
            inside.wait()
        assert engine.dedup(a, b).pages_merged == 0
    assert engine.dedup(a, b).pages_merged == 0
    leave.set()
    thread.join()
    assert engine.dedup(a, b).pages_merged == 64


def test_a_part_of_a_buffer_holds_its_region(engine, twins):
    _, a, b = twins
    with engine.hold(a[100:200]):
        assert engine.dedup(a, b).pages_merged == 0


def test_an_exception_lets_go(engine, twins):
    _, a, b = twins
    with pytest.raises(ZeroDivisionError), engine.hold(a):
        raise ZeroDivisionError
    assert engine.dedup(a, b).pages_merged == 64


def test_a_held_region_cannot_be_unregistered(engine):
    with private_memory(8) as buffer:
        region = engine.register(buffer)
        with region.hold():
            with pytest.raises(RuntimeError, match="held"):
                region.close()
            with pytest.raises(RuntimeError, match="held"):
                engine.unregister(buffer)
            assert not region.closed
        region.close()
        assert region.closed


def test_memory_that_is_not_registered_cannot_be_held(engine):
    with pytest.raises(ValueError, match="registered"), engine.hold(bytearray(8 * PAGE)):
        pass
    with pytest.raises(TypeError), engine.hold("text"):
        pass


def test_module_function():
    array = ksmcore.full(8 * PAGE, 3, np.uint8)
    with ksmcore.hold(array):
        assert ksmcore.dedup(array).pages_merged == 0
    ksmcore.unregister(array)


def test_a_dropped_array_needs_no_goodbye(engine, twins):
    _, a, b = twins
    held = engine.hold(a)
    held.__enter__()
    del a
    assert engine.stats().regions == 2  # the hold keeps its memory
    held.__exit__(None, None, None)
    del held
    assert b.size == 32 * PAGE


def test_system_calls_into_held_memory_never_fail(engine, rng):
    """The scanner never pauses; a thread reads changing data into held memory and checks it."""
    n_pages = 16
    a, b = engine.empty(n_pages * PAGE, np.uint8), engine.empty(n_pages * PAGE, np.uint8)
    fd = os.memfd_create("source")
    stop = threading.Event()
    failures: list[BaseException] = []
    n_calls = [0]

    def read() -> None:
        value = 0
        try:
            while not stop.is_set():
                value = value % 250 + 1
                os.pwrite(fd, bytes([value]) * a.size, 0)
                for target in (a, b):
                    with engine.hold(target):
                        assert os.preadv(fd, [target], 0) == target.size
                    assert (target == value).all()
                    n_calls[0] += 1
        except BaseException as error:
            failures.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    merged, n_passes, deadline = 0, 0, time.monotonic() + 60
    while (n_passes < 300 or n_calls[0] <= 10 or merged == 0) and time.monotonic() < deadline:
        merged += engine.dedup().pages_merged
        n_passes += 1
    stop.set()
    reader.join()
    os.close(fd)
    assert failures == []
    assert n_calls[0] > 10
    assert merged > 0
