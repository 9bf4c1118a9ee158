"""Ten thousand regions come and go from eight threads while the scanner runs: nothing is lost,
nothing is left, nobody waits for ever."""

import gc
import threading
import time

import numpy as np
import pytest

import ksmcore
from helpers.kernels_view import descriptors, pss_bytes
from helpers.memory import PAGE, private_memory
from helpers.stress import LONG
from helpers.waiting import wait_until
from ksmcore._kernel import smaps

N_THREADS = 8
# A quick form is always run.
N_REGIONS = 10_000 if LONG else 1_600
N_PAGES = 4
AT_ONCE = 50
PATIENCE_SECONDS = 300


def taken():
    """Of the process: bytes, mappings, descriptors."""
    gc.collect()
    return pss_bytes(), smaps.count_maps(), len(descriptors())


def come_and_go(engine, seed, n_regions, failed):
    """Register, in part through areas, equal buffers; write, check, leave."""
    try:
        rng = np.random.default_rng(seed)
        for first in range(0, n_regions, AT_ONCE):
            area = engine.area()
            kept = []
            for n in range(AT_ONCE):
                memory = private_memory(N_PAGES)
                view = np.frombuffer(memory, np.uint8).reshape(N_PAGES, -1)
                view[:] = np.uint8(n % 7 + 1)
                kept.append((view, (area if n % 2 else engine).register(memory), n % 7 + 1))
            for view, _, value in kept:
                page = int(rng.integers(N_PAGES))
                view[page] = first & 0xFF
                assert (view[page] == first & 0xFF).all()
                others = np.delete(view, page, 0)
                assert (others == value).all()
            area.close()
            for n, (_, region, _) in enumerate(kept):
                assert region.closed == bool(n % 2)
                region.close()
    except BaseException as error:
        failed.append(error)


def in_threads(engine, n_regions, failed):
    """So many regions in each thread, while the scanner runs."""
    threads = [
        threading.Thread(target=come_and_go, args=(engine, seed, n_regions, failed), daemon=True)
        for seed in range(N_THREADS)
    ]
    with engine.start():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_SECONDS)
            assert not thread.is_alive(), "somebody waits for ever"


def make_what_is_kept(engine):
    """The store, the tracker, a guard, stacks of threads: made once, not to be counted below."""
    array = engine.zeros((600, PAGE), np.uint8)
    array[:, 0] = np.arange(600) % 251
    array[300:, 1] = 1 + np.arange(300) // 251
    engine.dedup()
    with engine.start():
        wait_until(lambda: engine.stats().full_scans >= 6)
    in_threads(engine, AT_ONCE, [])


def test_ten_thousand_regions(record_property):
    with ksmcore.Engine(sleep_millisecs=0) as engine:
        failed: list[BaseException] = []
        make_what_is_kept(engine)
        before = taken()
        began = time.monotonic()
        in_threads(engine, N_REGIONS // N_THREADS, failed)
        record_property("seconds", round(time.monotonic() - began, 2))
        record_property("passes", engine.stats().full_scans)
        record_property("pages merged meanwhile", engine.stats().pages_merged)
        if failed:
            raise failed[0]
        stats = engine.stats()
        assert (stats.regions, stats.pages_shared, stats.pages_tracked) == (0, 0, 0)
        assert engine.regions == ()
        assert stats.store_pages == 0
        engine._core.check()
        after = taken()
        assert after[2] == before[2]
        assert after[1] <= before[1] + 8
        assert after[0] <= before[0] + (8 << 20)


@pytest.mark.parametrize("how", ["area", "close"])
def test_the_last_thing_that_happens_is_a_removal(how):
    """The scanner stands on the region that goes."""
    with ksmcore.Engine(sleep_millisecs=0, pages_to_scan=1) as engine, engine.start():
        for _ in range(100):
            area = engine.area()
            memory = private_memory((1 << 20) // PAGE)
            view = np.frombuffer(memory, np.uint8)
            view[:] = 1
            region = area.register(memory)
            time.sleep(0.0005)
            area.close() if how == "area" else region.close()
            assert region.closed
            assert (view == 1).all()
    engine._core.check()
