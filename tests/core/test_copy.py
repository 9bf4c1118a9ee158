"""Copies that share their pages with the source: by the kernel's account, and byte by byte."""

import ctypes
import errno
import gc
import math
import mmap
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ksmcore
from helpers.kernels_view import pss_bytes, pss_of
from helpers.libc import MAP_FIXED, libc
from helpers.memory import PAGE, random_pages
from helpers.processes import run_python
from ksmcore._kernel import smaps
from ksmcore._testing import faults

MIB = 1 << 20
THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.fixture
def engine():
    with ksmcore.Engine() as made:
        yield made
        made._core.check()


def noise(n_bytes, seed=0):
    return np.frombuffer(np.random.default_rng(seed).bytes(n_bytes), np.uint8)


def test_the_second_copy_takes_no_memory_and_copies_nothing(engine):
    source = engine.array(noise(16 * MIB))
    first = engine.copy(source)
    before, of_arrays = pss_bytes(), pss_of(source, first)
    merged = engine.stats().pages_merged
    second = engine.copy(source)
    assert pss_bytes() - before < 4 * MIB  # of 16; what is remembered of its pages
    assert engine.stats().pages_merged - merged == 16 * MIB // PAGE
    assert np.array_equal(first, source)
    assert np.array_equal(second, source)
    # Of the process's the C library may keep what NumPy has used to compare.
    assert pss_of(source, first, second) - of_arrays < MIB
    engine._core.check()


def test_the_first_copy_shares_as_well(engine):
    source = engine.array(noise(16 * MIB))
    before = pss_bytes()
    copy = engine.copy(source)
    assert pss_bytes() - before < 8 * MIB  # the copy has 16; the rest is what is remembered
    assert engine.stats().pages_sharing == 16 * MIB // PAGE
    assert np.array_equal(copy, source)


def test_writes_to_either_side_stay_there(engine):
    source = engine.array(noise(MIB))
    copies = [engine.copy(source) for _ in range(3)]
    expected = [np.array(array) for array in (source, *copies)]
    for i, array in enumerate((source, *copies)):
        array[i * PAGE * 2 + 5] ^= 0xFF
        expected[i][i * PAGE * 2 + 5] ^= 0xFF
    for array, wanted in zip((source, *copies), expected, strict=True):
        assert np.array_equal(array, wanted)


def test_a_copy_shows_what_was_written_since_the_source_was_merged(engine):
    source = engine.array(noise(MIB))
    first = engine.copy(source)
    source[:: PAGE * 3] += 1
    now = np.array(source)
    again = engine.copy(source)
    assert np.array_equal(again, now)
    assert not np.array_equal(first, now)
    source[:] = 0
    assert np.array_equal(again, now)
    assert not engine.copy(source).any()


def test_copies_outlive_their_source_and_each_other(engine):
    source = engine.array(noise(MIB))
    copies = [engine.copy(source)]
    copies += [engine.copy(copies[-1]) for _ in range(4)]
    del source, copies[1], copies[2]
    gc.collect()
    engine._core.check()
    assert all(np.array_equal(copy, noise(MIB)) for copy in copies)
    del copies
    gc.collect()
    assert engine.stats().pages_shared == 0
    assert engine.stats().regions == 0


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x,
        lambda x: x[1:],
        lambda x: x[::-1],
        lambda x: x[:, ::-1],
        lambda x: x.T,
        lambda x: x.transpose(1, 2, 0),
        lambda x: x[:, :, 1:],
        lambda x: x[None, :, 3:],
        lambda x: x[::-1, ::-1, ::-1],
        lambda x: x.view(np.uint8),
        lambda x: x.view(">i8"),
        lambda x: x.view("M8[s]"),
        lambda x: x.view([("a", "<i4"), ("b", "<f4")]),
    ],
)
def test_shape_dtype_and_strides_are_kept(engine, view):
    source = view(engine.array(np.arange(3 * 200 * 500.0).reshape(3, 200, 500)))
    for _ in range(2):
        copy = engine.copy(source)
        assert copy.dtype == source.dtype
        assert copy.shape == source.shape
        assert copy.strides == source.strides
        assert copy.tobytes() == source.tobytes()
        assert copy.flags.writeable
        assert not np.shares_memory(copy, source)


def test_rows_keep_their_gaps(engine):
    frames = engine.rows(50, (84, 84), np.uint8)
    frames[:] = np.arange(50)[:, None, None]
    copy = engine.copy(frames)
    assert copy.strides == frames.strides
    assert np.array_equal(copy, frames)
    copy[7] = 99
    assert (frames[7] == 7).all()


@pytest.mark.parametrize(
    "view", [lambda x: x[:, ::5], lambda x: np.broadcast_to(x[0], (7, 300)), lambda x: x[:3, :3]]
)
def test_views_with_large_gaps_or_overlaps_are_copied_plainly(engine, view):
    source = view(engine.array(np.arange(600 * 300).reshape(600, 300)))
    copy = engine.copy(source)
    assert np.array_equal(copy, source)
    copy[0, 0] = -1
    assert source[0, 0] == 0
    assert copy[1, 0] != -1


def test_an_array_of_numpys_own_is_copied_and_its_copies_share(engine):
    source = noise(4 * MIB)
    one = engine.copy(source)
    two = engine.copy(one)
    assert np.array_equal(one, source)
    assert np.array_equal(two, source)
    assert engine.stats().pages_sharing == 4 * MIB // PAGE
    assert one.ctypes.data % PAGE == 0


def test_zeros_and_untouched_pages_stay_untouched(engine):
    source = engine.zeros(64 * MIB, np.uint8)
    source[5 * PAGE] = 1
    before = pss_bytes()
    copy = engine.copy(source)
    assert pss_bytes() - before < 8 * MIB
    assert copy.sum() == 1
    assert copy[5 * PAGE] == 1


def test_a_copy_can_be_unregistered_and_registered_parts_copied(engine):
    source = engine.array(noise(MIB))
    copy = engine.copy(source[100:])
    assert np.array_equal(copy, noise(MIB)[100:])
    engine.unregister(copy)
    assert np.array_equal(copy, noise(MIB)[100:])
    assert engine.stats().regions == 1
    plain = bytearray(noise(MIB).tobytes())
    with engine.register(plain):
        copy = engine.copy(np.frombuffer(plain, np.uint8))
        assert copy.tobytes() == bytes(plain)
        assert engine.stats().pages_sharing >= MIB // PAGE - 1


def test_max_page_sharing_holds_for_copies(engine):
    engine.configure(max_page_sharing=3)
    source = engine.array(noise(MIB))
    copies = [engine.copy(source) for _ in range(6)]
    assert all(np.array_equal(copy, source) for copy in copies)
    assert engine.stats().pages_shared == MIB // PAGE
    engine.dedup()  # the four that found it full meet each other
    assert engine.stats().pages_shared == 2 * MIB // PAGE
    assert all(np.array_equal(copy, source) for copy in copies)


def test_a_repeated_page_keeps_to_max_page_sharing(engine):
    engine.configure(max_page_sharing=80)
    source = engine.empty((256, PAGE), np.uint8)
    source[:] = noise(PAGE)
    engine.dedup()
    assert engine.stats().pages_shared < 8  # with room for some more each
    copies = [engine.copy(source) for _ in range(2)]
    stats = engine.stats()
    n_mapped = stats.pages_shared + stats.pages_sharing
    assert 3 * 256 - 2 <= n_mapped <= stats.pages_shared * 80  # one or two may have met no other
    assert all(np.array_equal(copy, source) for copy in copies)


def test_copies_that_come_and_go_use_up_no_mappings(engine):
    """One is a single mapping, however long it is, and what it takes of the budget comes back."""
    source = engine.array(noise(16 * MIB))
    first = engine.copy(source)
    engine.configure(map_budget=8)
    used = engine.stats().maps_used
    for _ in range(20):
        copy = engine.copy(source)
        assert engine.stats().pages_sharing == 2 * (16 * MIB // PAGE)
        assert engine.stats().maps_used <= used + 2
        del copy
        assert engine.stats().maps_used == used
    assert np.array_equal(first, source)


@pytest.fixture
def huge_targets(engine, monkeypatch):
    """The memory of copies is backed by huge pages, as it always is where the kernel says so."""
    if not THP.exists() or "[never]" in THP.read_text():
        pytest.skip("the kernel gives no huge pages")
    allocate = engine._parts.registrar.allocate

    def allocate_huge(*args):
        memory = allocate(*args)
        length = memory.n_pages * PAGE
        assert libc.madvise(memory.addr, length, mmap.MADV_HUGEPAGE) == 0
        return memory

    monkeypatch.setattr(engine._parts.registrar, "allocate", allocate_huge)


def test_a_copy_to_pages_that_are_known_already_is_right(engine, huge_targets):
    """A pass may have seen them: a huge page brings its neighbours' memory."""
    source = engine.array(noise(8 * MIB))
    first = engine.copy(source)
    memory = engine._parts.registrar.allocate(8 * MIB)
    target = np.frombuffer(memory, np.uint8)
    target[:: 2 * MIB] = 0
    engine.scan()
    engine.scan()
    engine._core.copy_memory(source.ctypes.data, memory.addr, 8 * MIB)
    engine._core.check()
    assert np.array_equal(target, noise(8 * MIB))
    again = engine.copy(target)
    assert np.array_equal(again, noise(8 * MIB))
    source[:], first[:], again[:] = 1, 2, 3
    engine.scan()
    engine.scan()
    assert np.array_equal(target, noise(8 * MIB))


def test_passes_leave_a_copy_alone_that_is_being_made(engine, huge_targets):
    """Else they would give items to pages of a huge page that the copy has not come to yet."""
    # No whole number of huge pages: such memory would begin on one, and each lie in a span.
    source = engine.array(noise(65 * MIB))
    first = engine.copy(source)
    over = threading.Event()

    def scan():
        while not over.is_set():
            engine.scan()

    thread = threading.Thread(target=scan)
    thread.start()
    try:
        for value in range(40):
            source[MIB :: 2 * MIB] = value
            copy = engine.copy(source)
            engine._core.check()
            assert np.array_equal(copy, source)
    finally:
        over.set()
        thread.join()
    engine._core.check()
    assert np.array_equal(first, noise(65 * MIB))


@pytest.mark.parametrize("flags", [mmap.MAP_PRIVATE, mmap.MAP_SHARED])
def test_what_the_program_has_mapped_over_the_source_is_copied(engine, tmp_path, flags):
    """Its pages are in no page table yet, as those of memory that nobody has touched."""
    source = engine.empty((64, PAGE), np.uint8)
    source[:] = np.arange(64)[:, None] % 8 + 1
    engine.dedup()
    (tmp_path / "data").write_bytes(b"Z" * (16 * PAGE))
    start = source.ctypes.data + 16 * PAGE
    with open(tmp_path / "data", "r+b") as file:
        # 3: readable and writable; 0x10: MAP_FIXED.
        assert libc.mmap(start, 16 * PAGE, 3, flags | MAP_FIXED, file.fileno(), 0) == start
    copy = engine.copy(source)
    assert (copy[16:32] == ord("Z")).all()
    assert np.array_equal(copy, source)


def test_a_copy_leaves_memory_alone_that_the_pass_leaves_alone(engine):
    """Locked memory is not merged in a pass, also when a copy looks at its region meanwhile."""
    source = engine.empty(8 * MIB, np.uint8)
    source[: 4 * MIB] = noise(4 * MIB)
    source[4 * MIB :] = np.tile(noise(MIB, 1), 4)
    address, length = ctypes.c_void_p(source.ctypes.data + 4 * MIB), ctypes.c_size_t(MIB)
    assert libc.mlock(address, length) == 0
    copies = []

    def copy_once(done, n_pages):
        del done, n_pages
        if len(copies) < 3:
            copies.append(engine.copy(source[: 2 * MIB]))

    try:
        for _ in range(3):
            report = engine.scan(progress=copy_once)
            assert report.skipped["altered"] >= source.nbytes // PAGE
        assert len(copies) == 3
        assert smaps.vmas_in(address.value, address.value + MIB)[0].locked > 0
    finally:
        assert libc.munlock(address, length) == 0


def test_without_room_for_mappings_the_bytes_are_copied(engine):
    source = engine.array(noise(MIB))
    engine.copy(source)
    keep = engine.copy(source)
    engine.configure(map_budget=0)
    engine.scan()
    copy = engine.copy(source)
    assert np.array_equal(copy, source)
    assert np.array_equal(keep, source)


@pytest.mark.parametrize("call", ["mmap", "pread", "madvise"])
def test_what_the_kernel_refuses_leaves_right_bytes_or_no_copy(engine, call):
    source = engine.array(noise(MIB))
    first = engine.copy(source)
    for after in range(4):
        faults.inject(call, errno.ENOMEM, after)
        try:
            copy = engine.copy(source)
            assert np.array_equal(copy, source)
        except (OSError, MemoryError):
            pass
        finally:
            faults.clear()
        engine._core.check()
    assert np.array_equal(first, source)
    assert np.array_equal(source, noise(MIB))


@pytest.mark.parametrize("wrong", [[1, 2], None, b"x" * 100_000, 3])
def test_only_arrays_are_copied(engine, wrong):
    with pytest.raises(TypeError):
        engine.copy(wrong)


def test_objects_cannot_be_copied_this_way(engine):
    with pytest.raises(TypeError, match="object"):
        engine.copy(np.full(100_000, None))


def test_a_masked_array_is_refused(engine):
    with pytest.raises(TypeError, match="masked"):
        engine.copy(np.ma.masked_equal(np.arange(100_000), 3))


def test_masked_arrays_are_told_without_their_module():
    """Its import, when a child was forked in the midst of it, would never end."""
    script = """
        import sys
        import numpy as np
        import ksmcore
        ksmcore.copy(ksmcore.array(np.ones(100_000)))
        sys.exit("numpy.ma" in sys.modules)
    """
    assert run_python(script, flags=()).returncode == 0


def test_copies_beside_a_writer_hold_one_value_for_each_page(engine):
    """A page of the copy is the source's page at some moment, and later writes to the source never
    show."""
    source = engine.array(np.zeros((64, PAGE // 8), np.int64))
    over = threading.Event()

    def write():
        value = 0
        while not over.is_set():
            value += 1
            source[value % 64, :] = value

    with engine.start(sleep_millisecs=0):
        thread = threading.Thread(target=write)
        thread.start()
        last = np.zeros(64, np.int64)
        try:
            for _ in range(300):
                copy = engine.copy(source)
                frozen = np.array(copy)
                assert (copy[:, 0] >= last).all()
                last = frozen[:, 0].copy()
                assert np.array_equal(copy, frozen)
        finally:
            over.set()
            thread.join()
    assert np.array_equal(engine.copy(source), source)


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(["copy", "write", "zero", "drop", "scan", "dedup", "unmerge"]),
            st.integers(0, 7),
            st.integers(0, 63),
            st.integers(1, 3),
        ),
        max_size=25,
    )
)
def test_any_order_of_copies_and_writes(steps):
    with ksmcore.Engine() as engine:
        start = np.repeat(np.arange(64, dtype=np.uint8) % 5, PAGE)
        kept = [(engine.array(start), start.copy())]
        for what, which, page, value in steps:
            array, expected = kept[which % len(kept)]
            where = slice(page * PAGE, (page + value) * PAGE)
            if what == "copy":
                kept.append((engine.copy(array), expected.copy()))
            elif what in ("write", "zero"):
                array[where] = expected[where] = value if what == "write" else 0
            elif what == "drop" and len(kept) > 1:
                del kept[which % len(kept)]
            elif what in ("scan", "dedup", "unmerge"):
                getattr(engine, what)()
            del array
            engine._core.check()
            for array, expected in kept:
                assert np.array_equal(array, expected)
            del array


def test_small_copies_one_after_the_other_do_not_look_at_all_mappings_each_time(engine, rng):
    """What they copy is merged by a later pass."""
    source = engine.array(random_pages(rng, 64))
    first = engine.copy(source)
    passes = engine._now().passes
    n_passes = len(engine.history)
    passes._next_small_copy = math.inf
    copies = [first]
    for i in range(50):
        copies.append(engine.copy(copies[-1]))
        copies[-1][i * PAGE] ^= 1
    assert len(engine.history) == n_passes
    passes._next_small_copy = 0.0
    n_private = engine.stats().pages_unshared + engine.stats().pages_volatile
    engine.copy(copies[-1])  # merges now what is not shared with its source
    assert len(engine.history) == n_passes + 1
    expected = np.array(source)
    for i, array in enumerate(copies[1:]):
        expected[i * PAGE] ^= 1
        assert np.array_equal(array, expected), i
    for _ in range(3):
        engine.scan()
    # Of each page that was written there is one.
    assert engine.stats().pages_shared <= 64 + 50
    assert engine.stats().pages_unshared + engine.stats().pages_volatile <= n_private + 2
