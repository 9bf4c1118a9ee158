"""Memory that arrays gave back: what is not needed again goes to the kernel, the rest is kept."""

import gc
import resource
import time

import numpy as np
import pytest
from kernels_view import pss_bytes

import ksmcore
from ksmcore import _arena, allocators

PAGE = ksmcore.Engine.page_bytes
MIB = 1 << 20


@pytest.fixture(autouse=True)
def _nothing_idle():
    gc.collect()
    settle()
    yield
    gc.collect()
    settle()
    assert _arena.check() == 0
    ksmcore.default_engine()._core.check()


def settle():
    """The second call discards what the first one began to watch."""
    _arena.give_back_idle()
    _arena.give_back_idle()


def dirty_bytes():
    return _arena.numbers()["dirty_bytes"]


def made(n, n_bytes, rng):
    with ksmcore.allocator():
        arrays = [np.empty(n_bytes, np.uint8) for _ in range(n)]
    for array in arrays:
        array[:] = rng.integers(0, 256, n_bytes, np.uint8)
    return arrays


def test_what_was_free_all_the_while_goes_back(rng):
    arrays = made(100, 200_000, rng)
    with_arrays = pss_bytes()
    kept = arrays.pop(50)
    value = kept.copy()
    arrays.clear()
    _arena.give_back_idle()  # it was free for no time at all
    assert dirty_bytes() > 18 * MIB
    assert pss_bytes() > with_arrays - 3 * MIB
    _arena.give_back_idle()
    assert dirty_bytes() == 0
    assert pss_bytes() < with_arrays - 16 * MIB
    assert (kept == value).all()


@pytest.mark.parametrize("n_bytes", [100_000, MIB, 8 * MIB])
def test_what_is_needed_again_stays_at_hand(n_bytes, rng):
    made(24 * MIB // n_bytes, n_bytes, rng)
    n_needed = 8 * MIB // n_bytes
    for _ in range(3):
        arrays = made(n_needed, n_bytes, rng)
        arrays.clear()
        _arena.give_back_idle()
        if n_bytes < 4 * MIB:  # of memory for larger ones, huge pages go as a whole
            assert dirty_bytes() >= n_needed * n_bytes
    assert dirty_bytes() < 2 * n_needed * n_bytes
    assert _arena.check() == 0
    if n_bytes < 4 * MIB:
        with ksmcore.allocator():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            for _ in range(n_needed):
                arrays.append(np.empty(n_bytes, np.uint8))
                arrays[-1][:] = 1
            faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        assert faults < 8 * MIB // PAGE // 4
        del arrays[:]


def test_merged_memory_that_was_given_back_is_no_saving_any_more(rng, monkeypatch):
    monkeypatch.setattr(allocators, "IDLE_SECONDS", 0.0)
    before = ksmcore.stats().bytes_saved
    one = made(1, MIB, rng)[0]
    with ksmcore.allocator():
        arrays = [one.copy() for _ in range(16)]
    ksmcore.dedup()
    assert ksmcore.stats().bytes_saved > before + 15 * MIB
    arrays.clear()
    reports = [ksmcore.scan() for _ in range(2)]
    assert ksmcore.stats().bytes_saved < before + PAGE * 32
    assert sum(report.bytes_saved for report in reports) < -15 * MIB
    with ksmcore.allocator():
        assert not np.zeros(16 * MIB, np.uint8).any()


def test_passes_in_quick_succession_leave_it_alone(rng, monkeypatch):
    monkeypatch.setattr(allocators, "IDLE_SECONDS", 3600.0)
    monkeypatch.setattr(allocators, "_tidied_at", time.monotonic())
    made(20, MIB, rng).clear()
    for _ in range(4):
        ksmcore.scan()
    assert dirty_bytes() > 19 * MIB


def test_the_background_scanner_gives_it_back(rng, monkeypatch):
    monkeypatch.setattr(allocators, "IDLE_SECONDS", 0.01)
    made(20, MIB, rng).clear()
    assert dirty_bytes() > 19 * MIB
    with ksmcore.start(sleep_millisecs=1, pages_to_scan=10_000):
        end = time.monotonic() + 30
        while dirty_bytes() > 0 and time.monotonic() < end:
            time.sleep(0.01)
    assert dirty_bytes() == 0


def test_other_engines_have_nothing_to_do_with_it(rng, monkeypatch):
    monkeypatch.setattr(allocators, "IDLE_SECONDS", 0.0)
    made(20, MIB, rng).clear()
    with ksmcore.Engine() as engine:
        for _ in range(3):
            engine.scan()
    assert dirty_bytes() > 19 * MIB
