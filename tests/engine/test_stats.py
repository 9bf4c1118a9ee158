"""Snapshots: frozen, printable, ready for json; and their numbers add up as the kernel counts."""

import gc
import json
import mmap
import weakref
from dataclasses import FrozenInstanceError, fields, replace

import numpy as np
import pytest

import ksmcore
from helpers.kernels_view import pss_bytes
from helpers.memory import PAGE, random_pages
from ksmcore._kernel import smaps
from ksmcore._testing import pagemap

PRESENT, OF_FILE, EXCLUSIVE = 1, 2, 8


def snapshots(engine):
    a, b = engine.full(50 * PAGE, 3, np.uint8), engine.zeros(50 * PAGE, np.uint8)
    b[:] = 0
    estimate = engine.estimate(a, b)
    report = engine.dedup(a, b)
    region = ksmcore.RegionStats(pages=100, pages_merged=50, pages_saved=24.5)
    return [report, engine.stats(), estimate, ksmcore.memory_info(), region]


class TestKinds:
    """What the kinds of snapshot have in common."""

    @pytest.fixture(params=["PassReport", "Stats", "Estimate", "MemoryInfo", "RegionStats"])
    def snapshot(self, request, engine):
        found = {type(snapshot).__name__: snapshot for snapshot in snapshots(engine)}
        return found[request.param]

    def test_frozen(self, snapshot):
        for field in fields(snapshot):
            with pytest.raises(FrozenInstanceError):
                setattr(snapshot, field.name, 0)

    def test_repr_is_one_line(self, snapshot):
        assert repr(snapshot).startswith(f"<ksmcore.{type(snapshot).__name__}: ")
        assert "\n" not in repr(snapshot)
        assert len(repr(snapshot)) < 160

    def test_as_dict_is_ready_for_json(self, snapshot):
        plain = snapshot.as_dict()
        assert json.loads(json.dumps(plain)) == plain
        for name, value in plain.items():
            assert value == getattr(snapshot, name)
        assert set(plain) >= {field.name for field in fields(snapshot)}

    def test_as_dict_is_a_copy(self, snapshot):
        for value in snapshot.as_dict().values():
            if isinstance(value, dict):
                value.clear()
        assert snapshot.as_dict() == snapshot.as_dict()
        if hasattr(snapshot, "skipped"):
            assert snapshot.skipped


def test_mappings_are_read_only(engine):
    for snapshot in snapshots(engine)[:2]:
        with pytest.raises(TypeError):
            snapshot.skipped["changed"] = 1
        assert snapshot.pages_skipped == sum(snapshot.skipped.values())
    with pytest.raises(TypeError):
        snapshot.seconds["guard"] = 1.0
    # What is made of them can be changed.
    assert type(snapshot.skipped.copy()) is type(snapshot.skipped | {"new": 1}) is dict


def test_derived_numbers_are_in_the_dict(engine):
    report, stats, estimate, *_ = snapshots(engine)
    assert {"bytes_saved", "general_profit", "pages_tracked", "pages_skipped"} <= set(
        stats.as_dict()
    )
    assert "pages_skipped" in report.as_dict()
    assert {"pages_duplicate", "bytes_saved"} <= set(estimate.as_dict())


def test_a_snapshot_stays_as_it_is(engine):
    before = engine.stats()
    plain = before.as_dict()
    array = engine.full(50 * PAGE, 3, np.uint8)
    engine.dedup(array)
    assert before.as_dict() == plain
    assert engine.stats() != before


def test_fresh_engine(engine):
    stats = engine.stats()
    numbers = {name: v for name, v in stats.as_dict().items() if isinstance(v, int)}
    del numbers["page_bytes"], numbers["guard_waits"]
    nonzero = {name for name, value in numbers.items() if value}
    assert nonzero <= {"metadata_bytes", "general_profit"}
    assert 0 < stats.metadata_bytes < 1 << 16
    assert stats.page_bytes == PAGE
    assert stats.presence in ("pagemap", "mincore")


# ---- the arithmetic of the counters ------------------------------------------------------------


def touch(array):
    """Read every page: merged pages get their page table entries, and nothing else changes."""
    return int(array.reshape(-1, PAGE)[:, 0].astype(np.uint64).sum())


def kernels_counts(arrays):
    """(pages that map a store, other pages with memory of their own), as the kernel tells."""
    n_merged = n_own = 0
    for array in arrays:
        touch(array)
        for flags in pagemap.query(array.ctypes.data, array.nbytes // PAGE):
            n_merged += bool(flags & OF_FILE)
            n_own += flags & (PRESENT | OF_FILE | EXCLUSIVE) == PRESENT | EXCLUSIVE
    return n_merged, n_own


def check_arithmetic(engine, arrays):
    stats = engine.stats()
    assert stats.bytes_saved == (stats.pages_sharing + stats.ksm_zero_pages) * PAGE
    assert stats.general_profit == stats.bytes_saved - stats.metadata_bytes
    assert stats.pages_tracked == (
        stats.pages_shared + stats.pages_sharing + stats.pages_unshared + stats.pages_volatile
    )
    assert stats.pages_shared <= stats.store_pages
    if ksmcore.features()["pagemap"] is None:
        n_merged, n_own = kernels_counts(arrays)
        assert stats.pages_shared + stats.pages_sharing == n_merged
        assert stats.pages_unshared + stats.pages_volatile == n_own
        assert stats.pages_tracked == n_merged + n_own
    return stats


def mixture(engine, rng, n_pages=300):
    """Unique pages, pages of few contents, zero pages and untouched pages, twice over."""
    pool = rng.integers(0, 256, (20, PAGE), dtype=np.uint8)
    source = pool[rng.integers(0, 20, n_pages)]
    source[::5] = rng.integers(0, 256, (len(source[::5]), PAGE), dtype=np.uint8)
    source[::7] = 0
    arrays = [engine.zeros((n_pages + 50, PAGE), np.uint8) for _ in range(2)]
    for array in arrays:
        array[:n_pages] = source
    return arrays


class TestArithmetic:
    def test_after_dedup(self, engine, rng):
        arrays = mixture(engine, rng)
        report = engine.dedup()
        stats = check_arithmetic(engine, arrays)
        assert stats.bytes_saved == report.bytes_saved
        assert stats.pages_sharing > 0
        assert stats.ksm_zero_pages == 2 * len(range(0, 300, 7))

    @pytest.mark.parametrize("n_passes", [1, 2, 3])
    def test_after_scans(self, engine, rng, n_passes):
        arrays = mixture(engine, rng)
        for _ in range(n_passes):
            engine.scan()
        stats = check_arithmetic(engine, arrays)
        assert stats.full_scans == n_passes
        assert (stats.pages_sharing > 0) == (n_passes > 1)

    def test_scans_and_dedup_agree(self, engine, rng):
        arrays = mixture(engine, rng)
        engine.dedup()
        with ksmcore.Engine() as other:
            others = [other.array(array) for array in arrays]
            for array in others:
                array[300:] = 1  # copying has touched them
            for array in arrays:
                array[300:] = 1
            for _ in range(4):
                engine.scan()
                other.scan()
            a, b = check_arithmetic(engine, arrays), check_arithmetic(other, others)
            # How many copies a repeated page has depends on where the arrays lie.
            assert a.pages_shared + a.pages_sharing == b.pages_shared + b.pages_sharing
            for name in ("pages_unshared", "pages_volatile"):
                assert getattr(a, name) == getattr(b, name)

    def test_nothing_registered(self, engine):
        engine.scan()
        engine.dedup()
        assert check_arithmetic(engine, []).pages_tracked == 0

    def test_all_unique(self, engine, rng):
        array = engine.array(random_pages(rng, 200))
        engine.scan()
        assert check_arithmetic(engine, [array]).pages_volatile == 200
        engine.scan()
        assert check_arithmetic(engine, [array]).pages_unshared == 200

    def test_all_equal(self, engine):
        array = engine.full(1000 * PAGE, 9, np.uint8)
        engine.dedup()
        stats = check_arithmetic(engine, [array])
        assert stats.pages_shared + stats.pages_sharing == 1000
        # A stretch of one page is mapped over a small block of copies.
        assert 1 <= stats.pages_shared <= 16

    def test_all_zero(self, engine):
        array = engine.full(200 * PAGE, 0, np.uint8)
        engine.dedup()
        stats = check_arithmetic(engine, [array])
        assert stats.ksm_zero_pages == 200
        assert stats.pages_tracked == 0

    def test_untouched_pages_are_not_tracked(self, engine):
        array = engine.empty(200 * PAGE, np.uint8)
        engine.scan()
        assert engine.stats().pages_tracked == 0
        assert engine.stats().pages_scanned == 0
        assert not any(pagemap.query(array.ctypes.data, 200))

    @pytest.mark.parametrize("passes", ["dedup", "scan"])
    def test_after_writes(self, engine, rng, passes):
        arrays = mixture(engine, rng)
        for step in range(6):
            getattr(engine, passes)()
            check_arithmetic(engine, arrays)
            where = rng.integers(0, 300, 40)
            arrays[step % 2][where, step] += 1
        for _ in range(3):
            getattr(engine, passes)()
        assert check_arithmetic(engine, arrays).cow_breaks > 0

    def test_after_writes_into_zero_pages(self, engine):
        array = engine.full((100, PAGE), 0, np.uint8)
        engine.dedup()
        array[10:20] = 4
        array[30:40, 7] = 0
        engine.scan()
        stats = check_arithmetic(engine, [array])
        assert stats.ksm_zero_pages + stats.pages_tracked == 100
        engine.scan()
        engine.scan()
        stats = check_arithmetic(engine, [array])
        assert stats.ksm_zero_pages == 90
        assert stats.pages_shared + stats.pages_sharing == 10

    def test_after_an_array_is_gone(self, engine, rng):
        arrays = mixture(engine, rng)
        engine.dedup()
        del arrays[1]
        gc.collect()
        engine.scan()
        stats = check_arithmetic(engine, arrays)
        assert stats.pages_sharing > 0

    def test_after_unregistering(self, engine, rng):
        arrays = mixture(engine, rng)
        engine.dedup()
        engine.unregister(arrays.pop())
        check_arithmetic(engine, arrays)
        engine.scan()
        check_arithmetic(engine, arrays)

    def test_after_the_program_gave_pages_up(self, engine, private_buffer):
        buffer = private_buffer(64)
        pages = np.frombuffer(buffer, np.uint8).reshape(64, PAGE)
        pages[:] = np.arange(1, 65, dtype=np.uint8)[:, None]
        engine.register(buffer)
        engine.scan()
        engine.scan()
        assert engine.stats().pages_unshared == 64
        buffer.madvise(mmap.MADV_DONTNEED, 0, 32 * PAGE)
        engine.scan()
        assert check_arithmetic(engine, [pages]).pages_tracked == 32

    def test_the_last_sharers_leave_while_another_page_comes(self, engine, rng):
        """All in one span: the shared page must not be given back under the page that arrives."""
        array = engine.array(rng.integers(0, 256, (10, PAGE), dtype=np.uint8))
        array[6] = array[5]
        assert engine.dedup().pages_merged == 2
        expected = array.copy()
        expected[1] = array[5]
        expected[5:7] = rng.integers(0, 256, (2, PAGE), dtype=np.uint8)
        array[:] = expected
        for _ in range(3):
            engine.dedup()
            assert np.array_equal(array, expected)
            check_arithmetic(engine, [array])

    @pytest.mark.usefixtures("collected")
    def test_with_a_limit(self, engine, rng):
        engine.configure(max_shared_pages=10, map_budget=50)
        arrays = mixture(engine, rng)
        engine.dedup()
        stats = check_arithmetic(engine, arrays)
        assert stats.store_pages <= 10

    def test_report_is_the_difference(self, engine, rng):
        arrays = mixture(engine, rng)
        for _ in range(4):
            before = engine.stats()
            report = engine.scan()
            after = engine.stats()
            assert report.bytes_saved == after.bytes_saved - before.bytes_saved
            for name in ("pages_scanned", "pages_merged", "pages_zeroed", "cow_breaks"):
                assert getattr(report, name) == getattr(after, name) - getattr(before, name)
            assert report.skipped == {
                reason: n - before.skipped[reason] for reason, n in after.skipped.items()
            }
            assert report.seconds >= 0
            arrays[0][:50, 3] += 1

    def test_negative_savings(self, engine, rng):
        arrays = mixture(engine, rng)
        engine.dedup()
        arrays[0][:300] = rng.integers(0, 256, (300, PAGE), dtype=np.uint8)
        assert engine.scan().bytes_saved < 0


class TestMetadata:
    LEN_BYTES = 64 << 20

    def check(self, engine, array):
        assert array.nbytes == self.LEN_BYTES
        engine.dedup()
        stats = engine.stats()
        assert stats.pages_tracked == self.LEN_BYTES // PAGE
        assert stats.metadata_bytes <= 46 * stats.pages_tracked
        return stats

    def unique(self, rng, len_bytes):
        pages = np.zeros((len_bytes // PAGE, PAGE // 8), np.uint64)
        pages[:, -1] = np.arange(1, len(pages) + 1)
        pages[:, 0] = rng.integers(1, 2**60, len(pages))
        return pages

    def test_all_unique(self, engine, rng):
        stats = self.check(engine, engine.array(self.unique(rng, self.LEN_BYTES)))
        assert stats.pages_shared == 0

    def test_all_pairs(self, engine, rng):
        half = self.unique(rng, self.LEN_BYTES // 2)
        stats = self.check(engine, engine.array(np.concatenate([half, half])))
        assert stats.pages_shared == stats.pages_sharing == len(half)

    def test_many_copies(self, engine, rng):
        few = self.unique(rng, self.LEN_BYTES // 256)
        stats = self.check(engine, engine.array(np.tile(few, (256, 1))))
        assert stats.pages_shared == len(few)

    def test_one_content(self, engine):
        self.check(engine, engine.full(self.LEN_BYTES, 7, np.uint8))


class TestMemoryInfo:
    """The kernel's own figures."""

    @pytest.fixture
    def saved(self):
        """Bytes saved since the test began."""
        gc.collect()
        before = ksmcore.memory_info().saved
        return lambda: ksmcore.memory_info().saved - before

    def test_nothing_merged(self, engine, saved):
        array = engine.full(100 * PAGE, 7, np.uint8)
        assert saved() == 0
        assert ksmcore.memory_info().rss >= array.nbytes
        assert ksmcore.memory_info().pss > 0

    def test_merged(self, engine, rng, saved):
        source = random_pages(rng, 500)
        arrays = [engine.array(source) for _ in range(4)]
        report = engine.dedup()
        assert saved() == report.bytes_saved == 1500 * PAGE
        for array in arrays:
            touch(array)
        assert saved() == report.bytes_saved

    def test_a_mixture(self, engine, rng, saved):
        arrays = mixture(engine, rng)
        engine.dedup()
        stats = engine.stats()
        assert stats.store_pages == stats.pages_shared
        assert saved() == stats.pages_sharing * PAGE
        del arrays

    def test_zero_pages_do_not_show(self, engine, saved):
        array = engine.full(4000 * PAGE, 0, np.uint8)
        before = pss_bytes()
        assert engine.dedup().pages_zeroed == 4000
        assert saved() == 0
        # Less what the figures themselves take.
        assert before - pss_bytes() >= 3000 * PAGE
        assert not array.any()

    def test_written_again(self, engine, rng, saved):
        source = random_pages(rng, 100)
        arrays = [engine.array(source) for _ in range(2)]
        engine.dedup()
        assert saved() == 100 * PAGE
        arrays[0][: 30 * PAGE : PAGE] += 1
        assert saved() == 70 * PAGE
        engine.scan()
        assert engine.stats().bytes_saved == saved()

    def test_two_engines(self, engine, saved):
        with ksmcore.Engine() as other:
            # Too few for a second copy, should a span of memory end in their midst.
            arrays = [made.full(30 * PAGE, 7, np.uint8) for made in (engine, other)]
            engine.dedup()
            other.dedup()
            assert saved() == engine.stats().bytes_saved + other.stats().bytes_saved == 58 * PAGE
        assert saved() == 29 * PAGE
        del arrays

    def test_an_engine_that_goes_meanwhile(self, monkeypatch):
        """Collected, or closed by another thread, after its descriptor was asked for."""
        collected, closed = ksmcore.Engine(), ksmcore.Engine()
        for made in (collected, closed):
            made.dedup(made.full(4 * PAGE, 7, np.uint8))
            assert made._core.store_fd >= 0
        collected.on_pass = collected.stats  # a circle: only the collector finds it
        gone = weakref.ref(collected)
        del collected, made
        rollup = smaps.smaps_rollup

        def rollup_late():
            gc.collect()
            closed.close()
            return rollup()

        monkeypatch.setattr(smaps, "smaps_rollup", rollup_late)
        assert ksmcore.memory_info().pss > 0
        assert closed.closed
        gc.collect()
        assert gone() is None

    def test_after_unregistering(self, engine, private_buffer, saved):
        buffer = private_buffer(100)
        buffer[:] = b"x" * len(buffer)
        region = engine.register(buffer)
        engine.dedup()
        assert saved() == engine.stats().bytes_saved > 0
        region.close()
        assert saved() == 0


def test_stats_of_the_default_engine():
    assert isinstance(ksmcore.stats(), ksmcore.Stats)
    assert replace(ksmcore.stats(), regions=5).regions == 5
