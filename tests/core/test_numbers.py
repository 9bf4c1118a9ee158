"""The counters' arithmetic, written out: what each number is after each step of the 2009 scenario,
in which virtual machines of the same kind come one after the other; here they are buffers."""

import numpy as np
import pytest

import ksmcore
from helpers.memory import PAGE
from helpers.waiting import wait_until
from ksmcore._engine.counters import NUMBERS

# Of each buffer: the same in all, its own, zero, and written all the time.
COMMON, OWN, ZERO, BUSY = 600, 200, 100, 50
SIZE = COMMON + OWN + ZERO + BUSY
ONLY_GROW = [name for name, one in NUMBERS.items() if one.kind == "counter" and not one.by]


def fill(array, rng, common):
    array[:COMMON] = common
    array[COMMON : COMMON + OWN] = rng.integers(0, 256, (OWN, PAGE), dtype=np.uint8)
    array[COMMON + OWN : COMMON + OWN + ZERO] = 0
    write(array, 1)


def write(array, count):
    """The busy pages: each differs from all others, and from what it was."""
    busy = array[SIZE - BUSY :].view(np.uint64)
    busy[:, 0] = np.arange(BUSY, dtype=np.uint64) + np.uint64(array.ctypes.data)
    busy[:, 1] = count


def settle(engine, arrays, n_known):
    """Let the scanner make five passes, with all busy pages written in between; check what must
    hold after each. More, where the kernel was moving pages, so that they were not there. It ends
    with its last pass: in a further one pages that nobody writes any more would be quiet."""
    reports, broken = [], []
    last = [engine.stats()]

    def after_pass(report):
        before, stats = last[-1], engine.stats()
        broken.extend(name for name in ONLY_GROW if getattr(stats, name) < getattr(before, name))
        broken.extend(r for r, n in before.skipped.items() if stats.skipped[r] < n)
        broken.extend(s for s, n in before.seconds.items() if stats.seconds[s] < n)
        last.append(stats)
        reports.append(report)
        if len(reports) >= 5 and stats.pages_volatile == n_known:
            engine.stop()
            return
        for array in arrays:
            write(array, stats.full_scans)

    engine.on_pass = after_pass
    engine.start()
    wait_until(lambda: not engine.scanning)
    engine.stop()
    engine.on_pass = None
    assert len(reports) >= 5
    assert not broken


@pytest.mark.parametrize("use_zero_pages", [True, False])
@pytest.mark.parametrize("dirty", ["auto", "checksum"])
def test_four_buffers_join_one_after_the_other(rng, use_zero_pages, dirty):
    common = rng.integers(0, 256, (COMMON, PAGE), dtype=np.uint8)
    arrays = []
    with ksmcore.Engine(use_zero_pages=use_zero_pages, dirty=dirty, sleep_millisecs=1) as engine:
        for n in range(1, 5):
            array = engine.empty((SIZE, PAGE), np.uint8)
            fill(array, rng, common)
            arrays.append(array)
            settle(engine, arrays, n * BUSY)
            if n == 1:
                shared, sharing, unshared = 0, 0, COMMON + OWN
            else:
                shared, sharing, unshared = COMMON, (n - 1) * COMMON, n * OWN
            zero = n * ZERO if use_zero_pages else 0
            if not use_zero_pages:
                # One repeated page. It lies over copies, so that it needs few mappings: each is
                # a shared page, so what they are more is not saved. Two for a stretch of a hundred,
                # three where the span ends in it, and a larger block may come after a smaller.
                n_copies = engine.stats().pages_shared - shared
                assert 1 <= n_copies <= 8
                shared, sharing = shared + n_copies, sharing + n * ZERO - n_copies
            stats = engine.stats()
            assert stats.pages_shared == shared
            assert stats.pages_sharing == sharing
            assert stats.pages_unshared == unshared
            assert stats.ksm_zero_pages == zero
            assert stats.pages_volatile == n * BUSY
            assert stats.bytes_saved == (sharing + zero) * PAGE
            assert stats.general_profit == stats.bytes_saved - stats.metadata_bytes
            assert stats.pages_tracked + zero == n * SIZE
        for array in arrays:
            assert np.array_equal(array[:COMMON], common)
            assert not array[COMMON + OWN : COMMON + OWN + ZERO].any()
        engine._core.check()


@pytest.mark.parametrize("most", [2, 5, 16])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("more", [-1, 0, 1])
@pytest.mark.parametrize("value", [7, 0])
def test_a_full_shared_page_is_counted(rng, most, k, more, value):
    """Of pages with others between them, each that finds its shared page full waits for a partner:
    the last one of k * M + 1 in vain. The others each waited within the pass, once per M pages."""
    n = k * most + more
    with ksmcore.Engine(max_page_sharing=most, use_zero_pages=False) as engine:
        array = engine.empty((2 * n, PAGE // 8), np.int64)
        array[:] = rng.integers(1, 2**62, array.shape, dtype=np.int64)
        array[::2] = value
        report = engine.dedup()
        stats = engine.stats()
        n_merged = n - (n % most == 1)
        assert stats.pages_shared == -(-n_merged // most)
        assert stats.pages_sharing == n_merged - stats.pages_shared
        assert stats.pages_unshared == n + (n - n_merged)
        n_met_full = (n - 1) // most
        assert report.skipped["max_page_sharing"] == n_met_full
        assert stats.ksm_zero_pages == 0
        # Zero pages, once they may be given back, are no longer shared when they are merged anew.
        engine.configure(use_zero_pages=True)
        engine.unmerge()
        engine.dedup()
        assert engine.stats().ksm_zero_pages == (n if value == 0 else 0)
        assert (array[::2] == value).all()


def test_max_shared_pages_is_counted_and_can_be_raised(rng):
    with ksmcore.Engine(max_shared_pages=10) as engine:
        a = engine.empty((30, PAGE), np.uint8)
        a[:] = rng.integers(0, 256, a.shape, dtype=np.uint8)
        b = engine.array(a)
        report = engine.dedup()
        assert (engine.stats().pages_shared, report.skipped["max_shared_pages"]) == (10, 20)
        engine.configure(max_shared_pages=None)
        assert engine.dedup().pages_merged == 40
        assert np.array_equal(a, b)
