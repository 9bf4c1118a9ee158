"""Fork: parent and child see right bytes for ever, and the child's engine starts empty."""

import os
import threading

import numpy as np
import pytest

import ksmcore

PAGE = ksmcore.Engine.page_bytes

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


def in_child(work) -> int:
    """Run `work` in a forked child; its exit status is 0 when it returned True."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            status = 0 if work() else 1
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_the_child_keeps_its_bytes_when_the_parent_gives_its_own_up(engine, rng):
    source = rng.integers(0, 256, 64 * PAGE, dtype=np.uint8)
    a, b = engine.array(source), engine.array(source)
    engine.dedup(a, b)
    ready, go = os.pipe(), os.pipe()

    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.write(ready[1], b"x")
            os.read(go[0], 1)
            status = 0 if np.array_equal(a, source) and np.array_equal(b, source) else 1
        finally:
            os._exit(status)
    os.read(ready[0], 1)
    # The parent's last sharers go, others take their place: nothing of that may reach the child.
    a[:] = rng.integers(0, 256, a.size, dtype=np.uint8)
    b[:] = a
    for _ in range(3):
        engine.scan()
    assert engine.stats().pages_sharing == 64
    assert engine.stats().store_pages_frozen >= 64
    engine.unregister(a)
    engine.unregister(b)
    engine._core.check()
    os.write(go[1], b"x")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    for fd in (*ready, *go):
        os.close(fd)


def test_writes_of_the_child_do_not_reach_the_parent(engine, rng):
    source = rng.integers(0, 256, 64 * PAGE, dtype=np.uint8)
    a, b = engine.array(source), engine.array(source)
    engine.dedup(a, b)

    def work() -> bool:
        a[:] = 0
        return not a.any() and np.array_equal(b, source)

    assert in_child(work) == 0
    assert np.array_equal(a, source)
    assert np.array_equal(b, source)


def test_the_childs_engine_starts_empty_and_works(engine, rng):
    source = rng.integers(0, 256, 64 * PAGE, dtype=np.uint8)
    a, b = engine.array(source), engine.array(source)
    region = engine.register(bytearray(16 * PAGE))
    engine.dedup()

    def work() -> bool:
        empty = engine.stats().regions == 0 and engine.regions == () and region.closed
        c, d = engine.array(source), engine.array(source)
        saved = engine.dedup(c, d).bytes_saved
        engine._core.check()
        right = (
            np.array_equal(a, source) and np.array_equal(c, source) and np.array_equal(d, source)
        )
        engine.close()
        return empty and saved == 64 * PAGE and right and np.array_equal(b, source)

    assert in_child(work) == 0
    assert engine.stats().regions == 3
    engine._core.check()
    region.close()


def test_forks_while_another_thread_scans(engine, rng):
    """Neither side deadlocks, whatever lock or window the scanning thread is in."""
    source = rng.integers(0, 256, 256 * PAGE, dtype=np.uint8)
    a, b = engine.array(source), engine.array(source)
    stop = threading.Event()
    failures: list[BaseException] = []

    def scan() -> None:
        change = 0
        try:
            while not stop.is_set():
                change += 1
                a[::PAGE] = b[::PAGE] = change % 251
                engine.dedup(a, b)
        except BaseException as error:
            failures.append(error)

    scanner = threading.Thread(target=scan)
    scanner.start()

    def work() -> bool:
        # The scanner may have been between its two writes; all else is as it was.
        same = np.array_equal(a.reshape(-1, PAGE)[:, 1:], source.reshape(-1, PAGE)[:, 1:])
        a[:] = 7
        engine.dedup()
        return same and (a == 7).all()

    results = [in_child(work) for _ in range(60)]
    stop.set()
    scanner.join()
    assert failures == []
    assert results == [0] * 60
