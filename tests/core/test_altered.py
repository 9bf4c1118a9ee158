"""What a program may do to registered memory behind the engine's back.

No crash, nothing of others touched, a clear error where one is due. Everything here goes through
the C library, past the objects that own the memory.
"""

import contextlib
import ctypes
import mmap
import os
import threading

import numpy as np
import pytest

from helpers.loose import Loose, call, map_at, move
from helpers.memory import PAGE
from helpers.processes import run_python
from ksmcore._kernel import smaps

N = 64


@pytest.fixture
def guard(each_guard):
    return each_guard


@pytest.fixture
def source(rng):
    return rng.integers(1, 256, (N, PAGE), dtype=np.uint8)


@pytest.fixture
def merged(engine, source):
    """Loose memory that shares all its pages with an ordinary array."""
    loose = Loose(source)
    region = engine.register(loose.pages)
    partner = engine.array(source)
    assert engine.dedup().pages_merged == 2 * N
    return loose, region, partner


def check_partner(engine, partner, source):
    """The rest of the engine works, and its bytes are right."""
    assert np.array_equal(partner, source)
    twin = engine.array(source)
    engine.dedup()
    assert np.array_equal(twin, source)
    partner[:] += 1
    assert np.array_equal(partner, source + 1)
    assert np.array_equal(twin, source)
    engine._core.check()


@pytest.mark.parametrize("part", [slice(0, N), slice(10, 20), slice(0, 1), slice(N - 1, N)])
def test_munmap(engine, merged, source, part):
    loose, region, partner = merged
    call("munmap", loose.at(part.start), (part.stop - part.start) * PAGE)
    report = engine.scan()
    assert report.skipped["altered"] == N
    engine.dedup(partner)
    check_partner(engine, partner, source)
    region.close()
    left = [page for page in range(N) if not part.start <= page < part.stop]
    assert np.array_equal(loose.pages[left], source[left])
    gone = smaps.vmas_in(loose.at(part.start), loose.at(part.stop))
    assert gone == []
    engine._core.check()


def test_munmap_before_anything_merged(engine, source):
    loose = Loose(source)
    region = engine.register(loose.pages)
    engine.scan()
    loose.unmap()
    engine.scan()
    engine.dedup()
    engine.estimate()
    region.close()
    assert smaps.vmas_in(loose.addr, loose.at(N)) == []


def test_another_file_in_its_place(engine, merged, source, tmp_path):
    loose, region, partner = merged
    path = tmp_path / "other"
    path.write_bytes(source.tobytes())  # equal bytes: tempting
    fd = os.open(path, os.O_RDWR)
    map_at(loose.addr, N, flags=mmap.MAP_SHARED, fd=fd)
    for _ in range(3):
        engine.scan()
    engine.dedup()
    check_partner(engine, partner, source)
    region.close()
    (vma,) = smaps.vmas_in(loose.addr, loose.at(N))
    assert vma.path == str(path)
    loose.pages[3] = 7  # still the shared mapping of the file
    assert path.read_bytes()[3 * PAGE : 4 * PAGE] == b"\x07" * PAGE
    loose.unmap()
    os.close(fd)


def test_fresh_memory_in_its_place(engine, merged, source):
    """Private, anonymous, writable: as good as before, but nothing that was known of it holds."""
    loose, region, partner = merged
    map_at(loose.addr, N)
    assert not loose.pages.any()
    loose.pages[5] = 9
    engine.scan()
    engine._core.check()
    assert (loose.pages[5] == 9).all()
    loose.pages[:] = source
    engine.dedup()
    assert np.array_equal(loose.pages, source)
    check_partner(engine, partner, source)
    region.close()
    assert np.array_equal(loose.pages, source)
    loose.unmap()


@pytest.mark.parametrize("first", ["scan", "close"])
def test_mremap_elsewhere(engine, merged, source, first):
    """What is moved away keeps its bytes, whatever the engine does afterwards."""
    loose, region, partner = merged
    target = map_at(0, N)
    move(loose.addr, target, N)
    moved = loose.view(target)
    assert np.array_equal(moved, source)
    if first == "close":
        region.close()
    for step in range(4):
        # The partner gives its pages up, and new contents come that want slots.
        partner[:] = source + step + 1
        twin = engine.array(partner)
        engine.dedup()
        engine.scan()
        assert np.array_equal(moved, source)
        assert np.array_equal(twin, partner)
        engine._core.check()
        del twin
    if first == "scan":
        region.close()
    moved[:] += 1
    assert np.array_equal(moved, source + 1)
    engine._core.check()
    call("munmap", target, N * PAGE)


def test_mremap_of_a_part(engine, merged, source):
    loose, region, partner = merged
    target = map_at(0, 10)
    move(loose.at(20), target, 10)
    partner[:] = 0
    region.close()
    engine.dedup()
    moved = np.frombuffer((ctypes.c_uint8 * (10 * PAGE)).from_address(target), np.uint8)
    assert np.array_equal(moved.reshape(10, PAGE), source[20:30])
    assert np.array_equal(loose.pages[:20], source[:20])
    assert np.array_equal(loose.pages[30:], source[30:])
    assert smaps.vmas_in(loose.at(20), loose.at(30)) == []
    call("munmap", target, 10 * PAGE)


@pytest.mark.parametrize("prot", [0, 1], ids=["none", "read"])
@pytest.mark.parametrize("part", [slice(0, N), slice(7, 8)])
def test_mprotect(engine, merged, source, prot, part):
    loose, region, partner = merged
    addr, len_bytes = loose.at(part.start), (part.stop - part.start) * PAGE
    call("mprotect", addr, len_bytes, prot)
    assert engine.scan().skipped["altered"] == N
    engine.dedup()
    engine.estimate()
    with pytest.raises(RuntimeError, match="mprotect"):
        region.close()
    assert not region.closed
    for vma in smaps.vmas_in(addr, addr + len_bytes):
        assert vma.readable == bool(prot)
        assert not vma.writable
    check_partner(engine, partner, source)
    call("mprotect", addr, len_bytes, 3)
    assert engine.scan().skipped["altered"] == 0
    assert np.array_equal(loose.pages, source)
    region.close()
    assert np.array_equal(loose.pages, source)
    loose.unmap()


def test_mprotect_before_anything_merged(engine, source):
    loose = Loose(source)
    twin = engine.array(source)
    region = engine.register(loose.pages)
    call("mprotect", loose.addr, N * PAGE, 0)
    for _ in range(3):
        assert engine.scan().pages_merged == 0
    call("mprotect", loose.addr, N * PAGE, 1)
    for _ in range(3):
        assert engine.scan().pages_merged == 0
    region.close()  # nothing to be restored
    (vma,) = smaps.vmas_in(loose.addr, loose.at(N))
    assert not vma.writable
    assert np.array_equal(twin, source)
    loose.unmap()


def test_dontneed(engine, merged, source):
    """Plain pages become zeros; merged ones show what they share, not what was written since."""
    loose, region, partner = merged
    loose.pages[3] = 1
    call("madvise", loose.addr, N * PAGE, mmap.MADV_DONTNEED)
    assert np.array_equal(loose.pages, source)
    for _ in range(3):
        engine.scan()
    assert np.array_equal(loose.pages, source)
    check_partner(engine, partner, source)
    region.close()
    assert np.array_equal(loose.pages, source)
    call("madvise", loose.addr, N * PAGE, mmap.MADV_DONTNEED)
    assert not loose.pages.any()
    loose.unmap()


def test_mlock(engine, merged, source):
    loose, region, partner = merged
    loose.pages[:4] += 1
    call("mlock", loose.addr, N * PAGE)
    try:
        for _ in range(3):
            assert engine.scan().skipped["altered"] == N
        assert engine.dedup().pages_merged == 0
        for vma in smaps.Snapshot().vmas_in(loose.addr, loose.at(N)):
            assert "lo" in vma.flags
    finally:
        call("munlock", loose.addr, N * PAGE)
    loose.pages[:4] -= 1
    engine.dedup()
    assert engine.stats().pages_sharing == N
    check_partner(engine, partner, source)
    region.close()
    loose.unmap()


def test_pages_that_go_away_while_they_are_read(engine, source, rng):
    """munmap, mprotect and fresh memory at any moment of a pass, again and again."""
    partner = engine.array(source)
    stop = threading.Event()
    failures = []

    def scan() -> None:
        passes = (engine.scan, engine.dedup, engine.estimate)
        count = 0
        try:
            while not stop.is_set():
                passes[count % 3]()
                count += 1
        except BaseException as error:
            failures.append(error)

    scanner = threading.Thread(target=scan)
    scanner.start()
    try:
        for step in range(300):
            loose = Loose(source)
            region = engine.register(loose.pages)
            for _ in range(int(rng.integers(1, 4))):
                call("mprotect", loose.addr, N * PAGE, 0)
                call("mprotect", loose.addr, N * PAGE, 3)
            with contextlib.suppress(OSError):
                if step % 3 == 0:
                    loose.unmap()
                    region.close()
                elif step % 3 == 1:
                    map_at(loose.addr, N)
                    region.close()
                    loose.unmap()
                else:
                    region.close()
                    assert np.array_equal(loose.pages, source)
                    loose.unmap()
    finally:
        stop.set()
        scanner.join()
    assert failures == []
    check_partner(engine, partner, source)


def test_true_faults_of_other_threads_still_end_the_process(guard):
    code = f"""
        import ctypes, threading, numpy as np, ksmcore
        engine = ksmcore.Engine(guard={guard!r})
        a = engine.array(np.arange(8 << 20, dtype=np.uint8))
        def scan():
            while True:
                engine.scan()
        threading.Thread(target=scan, daemon=True).start()
        ctypes.string_at(8)
    """
    assert run_python(code, flags=()).returncode == -11
