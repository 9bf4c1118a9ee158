"""The rules of a pass (KSM's), by counters whose truth guard/test_merge.py proves."""

import errno
import mmap
import os
import signal
import threading

import numpy as np
import pytest

import ksmcore
from helpers.memory import PAGE, private_memory, random_pages
from helpers.processes import run_python
from ksmcore import _pages
from ksmcore._core import core
from ksmcore._engine import parts
from ksmcore._testing import faults, pagemap


def tracked(engine: ksmcore.Engine) -> tuple[int, int, int, int]:
    stats = engine.stats()
    return stats.pages_shared, stats.pages_sharing, stats.pages_unshared, stats.pages_volatile


def test_nothing_new_is_merged_before_the_second_pass(engine, rng):
    source = random_pages(rng, 32)
    a, b = engine.array(source), engine.array(source)
    assert engine.scan().pages_merged == 0
    assert tracked(engine) == (0, 0, 0, 64)
    assert engine.scan().pages_merged == 64
    assert tracked(engine) == (32, 32, 0, 0)
    assert np.array_equal(a, b)


def test_a_newcomer_joins_a_shared_page_in_its_first_pass(engine, rng):
    source = random_pages(rng, 32)
    a, b = engine.array(source), engine.array(source)
    engine.dedup(a, b)
    c = engine.array(source)
    assert engine.scan().pages_merged == 32
    assert tracked(engine) == (32, 64, 0, 0)
    assert np.array_equal(c, source)


def test_dedup_does_not_wait(engine, rng):
    source = random_pages(rng, 32)
    a, b = engine.array(source), engine.array(source)
    report = engine.dedup(a, b)
    assert report.pages_merged == 64
    assert report.bytes_saved == 32 * PAGE
    assert engine.stats().full_scans == 0


def test_volatile_pages_wait_until_they_hold_still(engine, rng):
    source = random_pages(rng, 16)
    a, b = engine.array(source), engine.array(source)
    for change in range(1, 4):
        a[::PAGE] = b[::PAGE] = change
        engine.scan()
        assert tracked(engine) == (0, 0, 0, 32)
    engine.scan()
    assert tracked(engine) == (16, 16, 0, 0)


def test_unique_pages_are_unshared(engine, rng):
    a = engine.array(random_pages(rng, 100))
    engine.scan()
    engine.scan()
    assert tracked(engine) == (0, 0, 100, 0)
    assert a.size == 100 * PAGE


def test_a_broken_share_is_noticed_and_waits(engine, rng):
    source = random_pages(rng, 8)
    a, b = engine.array(source), engine.array(source)
    engine.dedup(a, b)
    a[0] ^= 0xFF
    report = engine.scan()
    assert report.cow_breaks == 1
    assert report.bytes_saved == -PAGE
    assert tracked(engine) == (8, 7, 0, 1)
    engine.scan()
    assert tracked(engine) == (8, 7, 1, 0)


def test_untouched_pages_are_never_faulted_in(engine, rng):
    a = engine.empty(1000 * PAGE, np.uint8)
    a[10 * PAGE : 20 * PAGE] = 5
    addr = a.__array_interface__["data"][0]
    before = pagemap.query(addr, 1000)
    engine.scan()
    engine.scan()
    assert [bool(flag & 1) for flag in before] == [10 <= i < 20 for i in range(1000)]
    after = pagemap.query(addr, 1000)
    assert not any(flag for i, flag in enumerate(after) if not 10 <= i < 20)
    stats = engine.stats()
    assert stats.pages_tracked == 10
    assert stats.pages_scanned == 20


def test_the_kernels_zero_page_is_no_memory_to_save(engine):
    a = engine.empty(64 * PAGE, np.uint8)
    assert not a.any()  # reads, so the zero page is mapped everywhere
    report = engine.dedup(a)
    assert report.pages_zeroed == 0
    assert engine.stats().pages_tracked == 0


def test_pages_that_went_away_are_forgotten(engine, rng):
    with private_memory(32) as buffer:
        buffer[:] = random_pages(rng, 32).tobytes()
        with engine.register(buffer):
            engine.scan()
            engine.scan()
            assert engine.stats().pages_unshared == 32
            buffer.madvise(mmap.MADV_DONTNEED, 0, 16 * PAGE)
            engine.scan()
            assert engine.stats().pages_tracked == 16


def test_the_rules_hold_with_zero_pages_off(rng):
    with ksmcore.Engine(use_zero_pages=False) as engine:
        a = engine.empty(64 * PAGE, np.uint8)
        a[:] = 1
        a[:] = 0
        engine.dedup(a)
        stats = engine.stats()
        assert stats.ksm_zero_pages == 0
        assert stats.pages_shared + stats.pages_sharing == 64
        assert stats.pages_sharing >= 60


def test_a_region_can_go_in_the_middle_of_a_pass(engine, rng):
    source = random_pages(rng, 8192)
    a, b = engine.array(source), engine.array(source)
    extra = private_memory(8192)
    extra[:] = source.tobytes()
    region = engine.register(extra)
    calls = []

    def remove(done: int, total: int) -> None:
        calls.append(done)
        if len(calls) == 4:
            region.close()

    engine.dedup(progress=remove)
    engine._core.check(are_filed=True)
    assert len(calls) > 4
    assert region.closed
    assert extra[:] == source.tobytes()
    assert np.array_equal(a, source)
    assert np.array_equal(b, source)
    extra.close()


def test_regions_come_and_go_while_another_thread_scans(engine, rng):
    source = random_pages(rng, 64)
    stop = threading.Event()
    failures: list[BaseException] = []

    def scan() -> None:
        try:
            while not stop.is_set():
                engine.scan()
        except BaseException as error:
            failures.append(error)

    scanner = threading.Thread(target=scan)
    scanner.start()
    kept = []
    for i in range(200):
        array = engine.array(source)
        array[0] = i % 251
        kept.append((array, i % 251))
        if len(kept) > 20:
            old, first = kept.pop(i % 10)
            assert old[0] == first
            assert np.array_equal(old[1:], source[1:])
    stop.set()
    scanner.join()
    assert failures == []
    for array, first in kept:
        assert array[0] == first
        assert np.array_equal(array[1:], source[1:])


def test_ctrl_c_ends_a_pass_between_batches(engine, rng):
    source = random_pages(rng, 16384)
    a, b = engine.array(source), engine.array(source)

    def interrupt(done: int, total: int) -> None:
        if done > 0:
            os.kill(os.getpid(), signal.SIGINT)

    # In a shell's background job the signal is ignored from the start.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            engine.scan(progress=interrupt)
    finally:
        signal.signal(signal.SIGINT, before)
    stats = engine.stats()
    assert 0 < stats.pages_scanned < 32768
    assert stats.full_scans == 0
    engine._core.check(are_filed=True)
    engine.dedup(a, b)
    assert np.array_equal(a, source)
    assert np.array_equal(b, source)


def test_without_pagemap_residency_and_bytes_serve(rng, monkeypatch):
    def without_pagemap(**given):
        return core.Core(**{**given, "with_pagemap": False})

    monkeypatch.setattr(parts, "Core", without_pagemap)
    with ksmcore.Engine() as engine:
        assert engine.stats().presence == "mincore"
        source = random_pages(rng, 64)
        a, b = engine.array(source), engine.array(source)
        untouched = engine.empty(64 * PAGE, np.uint8)
        engine.scan()
        engine.scan()
        assert tracked(engine) == (64, 64, 0, 0)
        a[0] ^= 0xFF
        report = engine.scan()
        assert report.cow_breaks == 1
        assert np.array_equal(b, source)
        addr = untouched.__array_interface__["data"][0]
        assert not any(pagemap.query(addr, 64))
        engine._core.check(are_filed=True)


def test_a_pagemap_that_could_not_be_opened_at_first_is_opened_later(rng):
    faults.inject("open", errno.EMFILE, count=10**6)
    with ksmcore.Engine() as engine:
        a = engine.array(random_pages(rng, 4))
        assert engine.stats().presence == "mincore"
        faults.clear()
        engine.scan()
        assert engine.stats().presence == "pagemap"
        assert a.size == 4 * PAGE


def test_two_engines_share_nothing(rng):
    source = random_pages(rng, 16)
    with ksmcore.Engine() as one, ksmcore.Engine() as two:
        a, b = one.array(source), two.array(source)
        one.dedup()
        two.dedup()
        assert one.stats().pages_sharing == two.stats().pages_sharing == 0
        assert np.array_equal(a, b)


@pytest.mark.parametrize("order", ["digest", "content"])
@pytest.mark.parametrize("checksum", ["jhash", "mmh3"])
def test_a_random_mixture_merges_completely(rng, order, checksum):
    contents = random_pages(rng, 40).reshape(40, PAGE)
    which = rng.integers(0, 40, 1000)
    with ksmcore.Engine(order=order, checksum=checksum) as engine:
        a = engine.array(contents[which])
        engine.scan()
        engine._core.check(are_filed=True)
        engine.scan()
        engine._core.check(are_filed=True)
        stats = engine.stats()
        assert stats.pages_skipped == 0
        assert stats.pages_shared + stats.pages_sharing + stats.pages_unshared == 1000
        # every content is kept once, but for copies that long stretches are given on purpose
        assert stats.pages_shared + stats.pages_unshared == len(np.unique(which))
        assert np.array_equal(a, contents[which])


def pages_of_one_checksum(rng):
    """Two different pages, found by trying: of some ten thousand, two share 32 bits."""
    tried = np.tile(random_pages(rng, 1).view(np.uint32), (4096, 1))
    seen = {}
    for first in range(0, 1 << 20, len(tried)):
        tried[:, -1] = np.arange(first, first + len(tried))
        for n, checksum in enumerate(_pages.checksum_many(tried.data, PAGE), first):
            if checksum in seen:
                found = tried[:2].copy()
                found[:, -1] = seen[checksum], n
                return found.view(np.uint8)
            seen[checksum] = n
    raise AssertionError("no two pages have the same checksum")


def test_pages_of_one_checksum_are_told_apart_by_their_bytes(engine, rng):
    one, other = pages_of_one_checksum(rng)
    a = engine.array(np.stack([one, other, other, one]))
    for _ in range(2):
        engine.scan()
        engine._core.check(are_filed=True)
    assert tracked(engine) == (2, 2, 0, 0)
    assert np.array_equal(a, [one, other, other, one])


def test_the_unstable_tree_outlives_256_passes(engine, rng):
    source = random_pages(rng, 4)
    a = engine.array(source)
    for _ in range(260):
        engine.scan()
    engine._core.check(are_filed=True)
    b = engine.array(source)
    engine.scan()
    engine.scan()
    assert engine.stats().pages_sharing == 4
    assert np.array_equal(a, b)


@pytest.mark.parametrize("immediate", [True, False])
def test_a_page_may_join_a_shared_page_whose_sharers_all_left(engine, rng, immediate):
    """One page becomes equal to a shared page while, further on in the same pass, the last
    sharers of that turn out to be broken."""
    a = engine.array(random_pages(rng, 64)).reshape(64, PAGE)
    content = random_pages(rng, 1)
    a[10] = a[11] = content
    engine.dedup()
    a[0] = content
    if not immediate:
        engine.scan()
    a[10, 0] ^= 0xFF
    a[11, 5] ^= 0xFF
    expected = a.copy()
    if immediate:
        engine.dedup()
    else:
        engine.scan()
    engine._core.check(are_filed=True)
    assert np.array_equal(a, expected)
    for _ in range(3):
        engine.scan()
        assert np.array_equal(a, expected)


def test_a_buffer_given_twice_is_looked_at_once(engine, rng):
    a = engine.array(random_pages(rng, 64))
    report = engine.dedup(a, a, a[: 32 * PAGE])
    assert report.pages_scanned == 64


def test_a_pass_within_a_pass_is_refused(engine, rng):
    a = engine.array(random_pages(rng, 8))
    for call in (engine.scan, engine.dedup, engine.close):
        with pytest.raises(RuntimeError, match="in the middle of a pass"):
            engine.scan(progress=lambda done, total, call=call: call())
    assert a.size == 8 * PAGE


@pytest.mark.parametrize("order", ["digest", "content"])
def test_blocks_of_copies_are_released_whole(rng, order):
    """More slots lose their last sharer in one span than are punched together, and the content of a
    block among them comes back in the same span."""
    # Stretches of 256 pages: blocks of four copies, or of three where a span ends in one. So at
    # least 1050 slots, and at most 86 mappings for each stretch.
    n = 350
    contents = rng.integers(1, 256, (n, PAGE), dtype=np.uint8)
    with ksmcore.Engine(order=order, use_zero_pages=False, map_budget=40_000) as engine:
        stretches = engine.empty((n * 256 + 1, PAGE), np.uint8)
        stretches[:-1] = contents.repeat(256, axis=0)
        engine.dedup()
        assert engine.stats().store_pages > 1024
        whole = engine.empty((1024, PAGE), np.uint8)
        first = -(whole.ctypes.data // PAGE) % 512  # where a span begins
        joined = whole[first : first + 400]
        joined[: n - 1] = contents[1:]
        joined[n - 1] = contents[0]
        joined[n:] = rng.integers(1, 256, (400 - n, PAGE), dtype=np.uint8)
        engine.dedup(whole)
        del stretches
        expected = joined.copy()
        expected[:n] = rng.integers(1, 256, (n, PAGE), dtype=np.uint8)
        expected[n : n + 20 : 2] = contents[0]
        joined[:] = expected
        engine.dedup(whole)
        engine._core.check(are_filed=True)
        assert np.array_equal(joined, expected)


def test_a_descriptor_that_was_closed_under_us_is_not_used(rng, tmp_path):
    """The program closes all descriptors, as daemons do; their numbers become its own files. What
    is new is merged all the same."""
    code = f"""
import os, sys
import numpy as np, ksmcore
rng = np.random.default_rng(1)
source = rng.integers(1, 256, 64 * {PAGE}, dtype=np.uint8)
engine = ksmcore.Engine()
a, b = engine.array(source), engine.array(source)
engine.dedup()
os.closerange(3, 64)
names = [os.path.join({str(tmp_path)!r}, str(i)) for i in range(20)]
for name in names:
    with open(name, "wb") as file:
        file.write(b"mine" * 100_000)
mine = [os.open(name, os.O_RDWR) for name in names]
c, d = engine.array(source[::-1]), engine.array(source[::-1])
a[0] ^= 0xFF
b[0] ^= 0x0F
report = engine.dedup()
engine.scan()
print(report.bytes_saved)
assert np.array_equal(a[1:], source[1:]) and np.array_equal(b[1:], source[1:])
assert np.array_equal(c, source[::-1]) and np.array_equal(d, source[::-1])
engine._core.check(are_filed=True)
engine.close()
assert np.array_equal(a[1:], source[1:])
for fd, name in zip(mine, names):
    assert os.fstat(fd).st_size == 400_000
    with open(name, "rb") as file:
        assert file.read() == b"mine" * 100_000
"""
    done = run_python(code, flags=())
    assert done.stderr == ""
    assert int(done.stdout) == (64 - 1) * PAGE  # the page that was written is not shared any more


@pytest.mark.parametrize("order", ["digest", "content"])
def test_trees_grow_and_shrink(rng, order):
    """Hundreds of contents, so that the forest has many trees; then most of them leave."""
    source = rng.integers(1, 256, (900, PAGE), dtype=np.uint8)
    with ksmcore.Engine(order=order, map_budget=0, use_zero_pages=False) as engine:
        unique = engine.array(source)
        engine.dedup()
        engine._core.check(are_filed=True)
        assert engine.stats().pages_unshared == 900
        engine.configure(map_budget="auto")
        twin = engine.array(source)
        assert engine.dedup().bytes_saved == 900 * PAGE
        engine._core.check(are_filed=True)
        unique[:750] ^= 1
        engine.dedup()
        engine._core.check(are_filed=True)
        assert np.array_equal(twin, source)
        twin[:750] ^= 1
        assert engine.dedup().pages_merged == 1500
        engine._core.check(are_filed=True)
        assert engine.stats().pages_shared == 900
        assert np.array_equal(twin, unique)
