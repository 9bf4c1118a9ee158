"""Merging, proved by the kernel's view of the memory and by re-reading every byte."""

import errno
import mmap
import os
import socket
import threading

import numpy as np
import pytest

import ksmcore
from helpers.kernels_view import present_pages, pss_bytes, pss_of
from ksmcore._engine.stats import STORE_PATH
from ksmcore._kernel import smaps
from ksmcore._testing import faults

PAGE = ksmcore.Engine.page_bytes


@pytest.fixture
def guard(each_guard):
    return each_guard


def store_maps(array: np.ndarray) -> list[smaps.Vma]:
    start = array.__array_interface__["data"][0]
    return [
        vma
        for vma in smaps.vmas_in(start, start + array.nbytes)
        if vma.path.startswith(STORE_PATH) and vma.writable
    ]


def random_bytes(rng: np.random.Generator, n_pages: int) -> np.ndarray:
    return rng.integers(0, 256, n_pages * PAGE, dtype=np.uint8)


def twins(engine: ksmcore.Engine, source: np.ndarray, n: int = 2) -> list[np.ndarray]:
    return [engine.array(source) for _ in range(n)]


@pytest.mark.parametrize("order", ["digest", "content"])
def test_pss_falls_by_what_bytes_saved_says(rng, order):
    source = random_bytes(rng, (48 << 20) // PAGE)
    with ksmcore.Engine(order=order) as engine:
        a, b, c = twins(engine, source, 3)
        before, of_process = pss_of(a, b, c), pss_bytes()
        report = engine.dedup(a, b, c)
        fallen = before - pss_of(a, b, c)
        assert report.bytes_saved == 2 * source.nbytes
        assert abs(fallen - report.bytes_saved) <= 0.01 * report.bytes_saved
        assert of_process - pss_bytes() >= 0.9 * report.bytes_saved  # the records have begun
        assert ksmcore.memory_info().saved == report.bytes_saved
        for copy in (a, b, c):
            assert np.array_equal(copy, source)
        # Reading everything maps the shared pages again, and costs nothing.
        assert abs(before - pss_of(a, b, c) - report.bytes_saved) <= 0.01 * report.bytes_saved
        engine._core.check()


def test_the_store_holds_one_page_for_each_content(engine, rng):
    a, b = twins(engine, random_bytes(rng, 512))
    engine.dedup(a, b)
    blocks = os.fstat(engine._core.store_fd).st_blocks * 512
    assert blocks == 512 * PAGE
    assert os.get_inheritable(engine._core.store_fd) is False


def test_neighbours_fuse_into_one_mapping(engine, rng):
    a, b = twins(engine, random_bytes(rng, 4096))
    engine.dedup(a, b)
    assert len(store_maps(a)) == 1
    assert len(store_maps(b)) == 1


def test_a_repeated_page_needs_far_fewer_mappings_than_pages(engine, rng):
    n_pages = (64 << 20) // PAGE
    a = engine.empty(n_pages * PAGE, np.uint8)
    a.reshape(n_pages, PAGE)[:] = random_bytes(rng, 1)
    expected = a[:PAGE].copy()
    before = smaps.count_maps()
    pss = pss_of(a)
    report = engine.dedup(a)
    assert smaps.count_maps() - before < n_pages // 8
    assert report.bytes_saved > 0.98 * a.nbytes
    assert abs(pss - pss_of(a) - report.bytes_saved) <= 0.01 * report.bytes_saved
    assert (a.reshape(n_pages, PAGE) == expected).all()


def test_writes_never_show_through(engine, rng):
    source = random_bytes(rng, 64)
    a, b = twins(engine, source)
    engine.dedup(a, b)
    a[::PAGE] += 1
    assert np.array_equal(b, source)
    b[5] ^= 0xFF
    assert a[5] == source[5]
    expected = source.copy()
    expected[::PAGE] += 1
    assert np.array_equal(a, expected)


def write_by_numpy(target: memoryview, data: bytes) -> None:
    np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(data, np.uint8))


def write_by_memoryview(target: memoryview, data: bytes) -> None:
    target[:] = data


def write_by_read(target: memoryview, data: bytes) -> None:
    read_end, write_end = os.pipe()
    writer = threading.Thread(target=lambda: (os.write(write_end, data), os.close(write_end)))
    writer.start()
    done = 0
    while done < len(data):
        done += os.readv(read_end, [target[done:]])
    writer.join()
    os.close(read_end)


def write_by_pread(target: memoryview, data: bytes) -> None:
    fd = os.memfd_create("source")
    os.write(fd, data)
    assert os.preadv(fd, [target], 0) == len(data)
    os.close(fd)


def write_by_recv(target: memoryview, data: bytes) -> None:
    left, right = socket.socketpair()
    writer = threading.Thread(target=left.sendall, args=(data,))
    writer.start()
    done = 0
    while done < len(data):
        done += right.recv_into(target[done:])
    writer.join()
    left.close()
    right.close()


@pytest.mark.parametrize(
    "write", [write_by_numpy, write_by_memoryview, write_by_read, write_by_pread, write_by_recv]
)
def test_every_way_of_writing_works_on_merged_pages(engine, rng, write):
    source = random_bytes(rng, 64)
    a, b = twins(engine, source)
    engine.dedup(a, b)
    new = random_bytes(rng, 32).tobytes()
    start = 16 * PAGE + 100  # begins and ends within a page
    write(memoryview(a)[start : start + len(new)], new)
    expected = source.copy()
    expected[start : start + len(new)] = np.frombuffer(new, np.uint8)
    assert np.array_equal(a, expected)
    assert np.array_equal(b, source)


def test_unregister_gives_plain_memory_with_the_same_bytes(engine, rng):
    source = random_bytes(rng, 300)
    a, b = twins(engine, source)
    engine.dedup(a, b)
    a[3 * PAGE] ^= 1
    expected = a.copy()
    engine.unregister(a)
    assert store_maps(a) == []
    assert np.array_equal(a, expected)
    assert np.array_equal(b, source)
    assert len(store_maps(b)) > 0


def test_memory_given_up_by_its_owner_reads_zeros_after_unregister(rng, engine):
    source = random_bytes(rng, 32).tobytes()
    with mmap.mmap(-1, 64 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as buffer:
        buffer[:] = source + source
        engine.dedup(buffer)
        assert engine.stats().pages_sharing == 32
        engine.unregister(buffer)
        assert buffer[:] == source + source
        buffer.madvise(mmap.MADV_DONTNEED)
        assert buffer[:] == bytes(64 * PAGE)


def test_a_page_that_is_written_alone_is_not_shared_any_more(engine, rng):
    a, b = twins(engine, random_bytes(rng, 16))
    engine.dedup(a, b)
    a[0] ^= 1
    b[0] ^= 1
    engine.dedup(a, b)
    assert np.array_equal(a, b)
    assert engine.stats().pages_sharing == 16
    assert os.fstat(engine._core.store_fd).st_blocks * 512 == 16 * PAGE


def test_the_last_sharer_gives_the_shared_page_back(engine, rng):
    a, b = twins(engine, random_bytes(rng, 128))
    engine.dedup(a, b)
    a[::PAGE] += 1
    b[::PAGE] += 2
    engine.scan()
    stats = engine.stats()
    assert (stats.pages_shared, stats.pages_sharing, stats.store_pages) == (0, 0, 0)
    assert os.fstat(engine._core.store_fd).st_blocks == 0
    assert stats.cow_breaks == 256


def test_a_dropped_array_gives_its_sharers_up(engine, rng):
    a, b = twins(engine, random_bytes(rng, 64))
    engine.dedup(a, b)
    del a
    stats = engine.stats()
    assert (stats.pages_shared, stats.pages_sharing, stats.regions) == (64, 0, 1)
    del b
    assert engine.stats().store_pages == 0


def test_becoming_equal_again_needs_no_new_mapping(engine, rng):
    source = random_bytes(rng, 64)
    a, b = twins(engine, source)
    engine.dedup(a, b)
    before = [len(store_maps(array)) for array in (a, b)]
    a[: 32 * PAGE : PAGE] ^= 1
    engine.scan()
    a[: 32 * PAGE : PAGE] ^= 1
    engine.scan()
    engine.scan()
    stats = engine.stats()
    assert stats.pages_reshared == 32
    assert stats.pages_sharing == 64
    assert [len(store_maps(array)) for array in (a, b)] == before
    assert np.array_equal(a, source)


def test_zero_pages_are_given_back_and_count(engine):
    a = engine.empty(256 * PAGE, np.uint8)
    a[:] = 1
    a[:] = 0
    assert sum(present_pages(a.ctypes.data, 256)) == 256
    report = engine.dedup(a)
    assert report.pages_zeroed == 256
    assert engine.stats().ksm_zero_pages == 256
    assert sum(present_pages(a.ctypes.data, 256)) == 0
    assert not a.any()  # faults the kernel's zero page in, which is still no memory
    engine.scan()
    assert engine.stats().ksm_zero_pages == 256
    a[7 * PAGE] = 9
    engine.scan()
    assert engine.stats().ksm_zero_pages == 255
    assert a[7 * PAGE] == 9


def test_a_zero_page_over_the_store_becomes_plain(engine, rng):
    source = random_bytes(rng, 8)
    a, b = twins(engine, source)
    engine.dedup(a, b)
    a[2 * PAGE : 4 * PAGE] = 0
    engine.dedup(a, b)
    stats = engine.stats()
    assert stats.ksm_zero_pages == 2
    assert not a[2 * PAGE : 4 * PAGE].any()
    assert np.array_equal(b, source)
    assert np.array_equal(a[4 * PAGE :], source[4 * PAGE :])


def test_unmerged_pages_keep_their_mapping(engine, rng):
    a = engine.array(random_bytes(rng, 64))
    start, end = a.ctypes.data, a.ctypes.data + a.nbytes
    before = len(smaps.vmas_in(start, end))
    engine.scan()
    engine.scan()
    assert store_maps(a) == []
    # Where its writes are tracked it is cut off from its neighbours, and no more.
    assert len(smaps.vmas_in(start, end)) == before


def test_restored_memory_does_not_stay_in_pieces(engine, rng):
    a, b = twins(engine, random_bytes(rng, 2048))
    engine.dedup(a, b)
    engine.unregister(a)
    start = a.__array_interface__["data"][0]
    assert len(smaps.vmas_in(start, start + a.nbytes)) <= 2


def test_extra_memory_while_merging_is_bounded(engine, rng):
    # Peak of the store's blocks plus private memory never exceeds the start by more than 16 MiB:
    # the kernel's high-water mark of the resident set would count shared pages twice, so the sum is
    # sampled through the progress callback, which runs between batches.
    source = random_bytes(rng, (32 << 20) // PAGE)
    a, b = twins(engine, source)
    before = pss_bytes()
    peaks = []
    engine.dedup(a, b, progress=lambda done, total: peaks.append(pss_bytes()))
    assert len(peaks) > 3
    assert max(peaks) - before <= 16 << 20


def test_unmerge_leaves_everything_registered(engine, rng):
    source = random_bytes(rng, 300)
    a, b = twins(engine, source)
    engine.dedup(a, b)
    before = pss_of(a, b)
    engine.unmerge()
    assert store_maps(a) == store_maps(b) == []
    assert pss_of(a, b) - before > 0.9 * source.nbytes
    assert np.array_equal(a, source)
    assert np.array_equal(b, source)
    stats = engine.stats()
    assert (stats.regions, stats.pages_sharing, stats.store_pages) == (2, 0, 0)
    engine._core.check()
    assert sum(engine.scan().pages_merged for _ in range(2)) == 600
    assert np.array_equal(a, b)


def test_unmerge_while_threads_write(engine, rng):
    """Written values are never lost, whether their page is being merged or unmerged just then."""
    a, b = (engine.zeros((64, PAGE // 8), np.uint64) for _ in range(2))
    stop = threading.Event()
    wrong = []

    def write(array: np.ndarray) -> None:
        value = 0
        while not stop.is_set():
            value += 1
            array[:] = value % 4 + 1
            if not (array == value % 4 + 1).all():
                wrong.append(value)

    writers = [threading.Thread(target=write, args=(array,)) for array in (a, b)]
    for writer in writers:
        writer.start()
    for _ in range(100):
        engine.dedup()
        engine.unmerge()
    stop.set()
    for writer in writers:
        writer.join()
    assert wrong == []
    assert engine.stats().pages_merged > 0


def test_unmerge_without_memory_leaves_the_rest_merged(engine, rng):
    source = random_bytes(rng, 600)
    a, b = twins(engine, source)
    engine.dedup(a, b)
    faults.inject("mremap", errno.ENOMEM, after=2)
    with pytest.raises(MemoryError):
        engine.unmerge()
    assert faults.clear() == 0
    assert np.array_equal(a, source)
    assert np.array_equal(b, source)
    assert 0 < engine.stats().pages_sharing <= 600
    engine._core.check()
    engine.unmerge()
    assert engine.stats().pages_sharing == 0
