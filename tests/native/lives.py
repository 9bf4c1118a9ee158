"""Whole lives of everything that owns native memory, again and again: the work of `make leaks`.

Run by check.py, with the sanitized modules. LeakSanitizer looks when this ends, and tells where a
leak was allocated; but it knows of malloc alone, and only of what nothing points to any more, while
most arrays of the core come from mmap. So the size of the process is watched here too.
"""

import ctypes
import errno
import gc
import os
import sys
import threading
from collections.abc import Callable, Iterator

import numpy as np

import ksmcore
from ksmcore import _pages
from ksmcore._core import estimate
from ksmcore._testing import faults, pagemap, rmap
from ksmcore._testing.tree import Tree

PAGE = ksmcore.Engine.page_bytes
# Rounds before the size is watched (caches fill, modules are imported), and in each third after.
WARM_UP, THIRD = 2, 4
# How much a third may grow in descriptors, in bytes of address space, and in bytes from malloc, of
# which Python's own caches go on taking a little for a long time.
SLACK = (0, 0, THIRD * 4096)
# The sanitizer keeps a record of each thread there ever was, of some 170 bytes of address space.
os.environ["KSMCORE_THREADS"] = "1"
# Without munmap: memory that the kernel will not take back is there for good.
CALLS = (
    "mmap mremap mprotect madvise memfd_create ftruncate fallocate pwrite pread open sigaction "
    "seal userfaultfd uffd_register uffd_unregister uffd_protect uffd_move uffd_copy uffd_wake"
).split()

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = [ctypes.c_size_t]
allocated_bytes = libc.__sanitizer_get_current_allocated_bytes
allocated_bytes.restype = ctypes.c_size_t


def some_bytes(n_pages: int) -> np.ndarray:
    return np.random.default_rng(1).integers(1, 256, n_pages * PAGE, dtype=np.uint8)


def engine(**settings: object) -> None:
    """Arrays, plain memory and zeros; merged, written, held, taken out again."""
    source = some_bytes(300)
    plain = source.copy()
    with ksmcore.Engine(**settings) as engine:
        a, b = engine.array(source), engine.array(source)
        zeros = engine.zeros(40 * PAGE, np.uint8)
        zeros[:] = 0
        region = engine.register(plain)
        for _ in range(3):
            engine.scan()
        engine.estimate(a, source)
        a[::PAGE] ^= 1
        b[: 8 * PAGE] = a[0]  # a block of copies
        engine.dedup()
        with region.hold():
            b[0] ^= 1
        engine.scan()
        engine.stats().as_dict()
        engine._core.check()
        engine.unregister(a)
        region.close()
        if engine.stats().pages_sharing == 0:
            raise AssertionError("nothing was merged, so nothing was tried")


def dropped() -> None:
    """Nobody closes anything; the collector does it."""
    engine = ksmcore.Engine()
    a, b = engine.array(some_bytes(64)), engine.array(some_bytes(64))
    region = engine.register(bytearray(16 * PAGE))
    engine.dedup()
    cycle = [engine, a, b, region]
    cycle.append(cycle)


def refused() -> None:
    """Calls that raise."""
    with ksmcore.Engine() as engine:
        a = engine.array(some_bytes(4))
        start = a.__array_interface__["data"][0]
        for wrong in (
            lambda: engine._core.add(99, start, 1, 0),
            lambda: engine.register(b"has no whole page"),
            lambda: engine.register(np.zeros((8, PAGE), np.uint8)[:, ::2]),
            lambda: engine.empty(-1, np.uint8),
            lambda: Tree(page_bytes=-1),
            lambda: _pages.jhash_many(bytes(10), 3),
            lambda: estimate.Tally("none"),
        ):
            try:
                wrong()
            except (KeyError, TypeError, ValueError):
                continue
            raise AssertionError("not refused")


def failing(call: str) -> None:
    """A life in which one call of the system fails; a little later each time."""
    source = some_bytes(40)
    for after in (0, 1, 2, 4, 8):
        arrays, engine = [], None
        faults.inject(call, errno.ENOMEM, after=after, count=2)
        try:
            engine = ksmcore.Engine()
            arrays += [engine.array(source), engine.array(source), engine.zeros(PAGE, np.uint8)]
            engine.dedup()
            engine.estimate(source)
            arrays[0][:] ^= 1
            engine.scan()
            engine.unregister(arrays[1])
            rmap.RmapTable().add(1)
        except (OSError, MemoryError):
            pass
        finally:
            faults.clear()
        # What ended in the middle is ended now, so that only a leak is left over.
        if engine is not None:
            engine.scan()
            engine.close()


def forked() -> None:
    """The child leaks the parent's state on purpose; the parent must not."""
    with ksmcore.Engine() as engine:
        a, b = engine.array(some_bytes(64)), engine.array(some_bytes(64))
        engine.dedup()
        pid = os.fork()
        if pid == 0:
            a[:] = 1
            engine.dedup()
            os._exit(0)
        if os.waitpid(pid, 0)[1] != 0:
            raise AssertionError("the child failed")
        b[:] = 2
        engine.scan()


def threads() -> None:
    """One thread writes, one adds and drops arrays, while this one scans."""
    with ksmcore.Engine() as engine:
        a, b = engine.array(some_bytes(256)), engine.array(some_bytes(256))

        def write() -> None:
            for _ in range(5):
                a[:] = b

        def add() -> None:
            for _ in range(5):
                engine.array(some_bytes(8))

        workers = [threading.Thread(target=work) for work in (write, add)]
        for worker in workers:
            worker.start()
        for _ in range(3):
            engine.dedup()
        for worker in workers:
            worker.join()


def shells() -> None:
    """What has native memory and no engine: trees, the rmap table, a tally, checksums."""
    source = some_bytes(64)
    for order in ("digest", "content"):
        tree = Tree(order=order, page_bytes=PAGE)
        tree.add_many(source)
        tree.discard(bytes(source[:PAGE]))
        tree.pages_in_order()
        tree.check()
        tree.clear()
    table = rmap.RmapTable()
    for page_no in range(1, 5000):
        table.add(page_no)
    for page_no in range(1, 5000, 3):
        table.remove(page_no)
    table.check()
    tally = estimate.Tally("jhash")
    start = -(-source.__array_interface__["data"][0] // PAGE) * PAGE
    tally.add(start, 60)
    tally.distinct()
    pagemap.query(start, 60)
    for checksum in ("jhash", "mmh3"):
        _pages.checksum_many(source, PAGE, checksum)
    for kernel in _pages.kernels():
        _pages.jhash_many(source, PAGE, kernel)
    ksmcore.features()


def lives() -> Iterator[tuple[str, Callable[[], None]]]:
    yield "engine by digest", lambda: engine(order="digest")
    yield "engine by content", lambda: engine(order="content", use_zero_pages=False)
    yield "engine by mmh3", lambda: engine(checksum="mmh3", dirty="checksum")
    yield "engine with few slots", lambda: engine(max_shared_pages=100, map_budget=64)
    yield "dropped", dropped
    yield "refused", refused
    yield "forked", forked
    yield "threads", threads
    yield "shells", shells
    for call in CALLS:
        yield f"failing {call}", lambda call=call: failing(call)


def sizes() -> tuple[int, int, int]:
    """Descriptors, bytes of address space, bytes from malloc."""
    while gc.collect():
        pass
    with open("/proc/self/statm", encoding="ascii") as statm:
        space = int(statm.read().split()[0]) * PAGE
    return len(os.listdir("/proc/self/fd")), space, allocated_bytes()


def growth(life: Callable[[], None]) -> list[tuple[int, int]]:
    """By how much the least size of each third exceeds that of the third before, for each size.

    The least, because a size may go up and down; two steps, because it may go up once for good.
    """
    for _ in range(WARM_UP):
        life()
    rounds = []
    for _ in range(3 * THIRD):
        life()
        rounds.append(sizes())
    floors = [
        [min(column) for column in zip(*rounds[at : at + THIRD], strict=True)]
        for at in range(0, 3 * THIRD, THIRD)
    ]
    return [(b - a, c - b) for a, b, c in zip(*floors, strict=True)]


def main() -> int:
    grown = False
    for name, life in lives():
        steps = growth(life)
        bad = any(min(pair) > slack for pair, slack in zip(steps, SLACK, strict=True))
        grown = grown or bad
        what = "descriptors {}, address space {}, malloc {}".format(*(min(pair) for pair in steps))
        print(f"{'GROWS' if bad else 'ok'}  {name}: {what}", flush=True)
    # Leaks on purpose, of the size that check.py looks for. Several: of the last one, an address
    # may be left somewhere.
    for _ in range(10):
        libc.malloc(int(sys.argv[1]))
    return 1 if grown else 0


if __name__ == "__main__":
    sys.exit(main())
