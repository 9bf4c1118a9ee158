"""The lost-write detector for system calls that write into memory that the scanner merges.

What a call wrote must be there when it returned, and stay; and no call fails or is cut short: the full
userfaultfd guard makes it wait, under the others it is held by itself. Without that, a call that meets
a window may fail with EFAULT; how often is in the summary after the tests.
"""

import collections
import ctypes
import mmap
import os
import socket
import threading

import numpy as np
import pytest

import ksmcore
from helpers.detector import (
    PAGE,
    WORDS,
    Callers,
    at_least,
    hard_scanning,
    has_merged,
    private_pages,
    rounds,
    working,
)

from helpers.libc import process_vm_writev
from helpers.stress import LONG

N_PAGES = Callers.N_SLOTS * Callers.SLOT_PAGES
# Calls that each guard has to see in the long form.
N_CALLS = 1_000_000
# The guard that makes system calls wait, too.
FULL = "userfaultfd"
KINDS = [
    *["pread", "stream", "datagram", "seqpacket"],
    *["parts", "message", "pipe", "fread", "direct"],
]
# What is fed to these comes in pieces, however it is taken.
PIECEMEAL = ["stream", "pipe"]
# These do not write where the guard can see it; see the test of them.
UNSEEN = ["process_vm_writev", "process_vm_writev (cold)", "/proc/self/mem"]


def scan_while_calling(engine: ksmcore.Engine, callers: Callers, seconds: float, enough: int):
    def is_enough() -> bool:
        return callers.total("right") >= enough and has_merged(engine, N_PAGES)

    with hard_scanning(callers.library, engine, *callers.threads):
        for n in rounds(seconds, is_enough):
            (engine.scan if n % 2 else engine.dedup)()


@pytest.fixture
def slots():
    """Memory for calls_run, with mergeable contents."""
    memory, pages = private_pages(N_PAGES)
    pages[:, : WORDS - 64] = np.arange(N_PAGES)[:, None] % Callers.SLOT_PAGES + 5
    return memory, pages


@pytest.fixture(params=[True, pytest.param(False, marks=pytest.mark.stress)], ids=["held", "not"])
def is_held(request, guard):
    """Whether calls in flight are held by themselves."""
    if request.param and ksmcore.features()["calls"] is not None:
        pytest.skip(ksmcore.features()["calls"])
    if not request.param and guard == FULL:
        pytest.skip("only makes a difference to direct input under this guard")
    return request.param


@pytest.mark.parametrize("call", KINDS)
def test_what_a_system_call_wrote_is_there(writers, guard, slots, call, is_held, record_property):
    memory, pages = slots
    # Direct input is lost where it meets a merge, under any guard.
    if call == "direct" and not is_held:
        pytest.skip("see docs/guarantees.md")
    enough = at_least(N_CALLS // len(KINDS), 1000)
    with ksmcore.Engine(guard=guard, hold_calls=is_held) as engine:
        engine.register(memory)
        callers = Callers(writers, call, pages)
        scan_while_calling(engine, callers, 1.0, enough)
        record_property(call, str(callers))
        if call == "direct" and "Operation not supported" in callers.errors:
            pytest.skip("no file can be read past the page cache in /var/tmp")
        assert callers.errors == []
        # A failed call took nothing from a stream.
        assert callers.total("astray") == 0
        assert callers.total("lost") == callers.total("changed") == 0
        assert callers.total("right") >= enough
        if guard == FULL or is_held:
            assert callers.total("failed") == 0
            assert call in PIECEMEAL or callers.total("short") == 0
        elif LONG and call not in PIECEMEAL and call != "direct":
            # So the test can fail.
            assert callers.total("failed") + callers.total("short") > 0
        assert has_merged(engine, N_PAGES)
        engine._core.check()


@pytest.mark.parametrize("call", UNSEEN)
def test_calls_that_reach_pages_past_the_guard(writers, guard, slots, call, record_property):
    """Two ways round the guard, which the summary counts.

    /proc/self/mem writes to pages that are protected. userfaultfd stops it; as it cannot wait, it
    fails then, with EIO. process_vm_writev looks up the pages, lets go of the memory map, and then
    copies: where a page was merged in between, to nowhere, whatever the guard. Often when the copy
    has to fault in its source ("cold"), else nearly never; but never could not be promised.
    """
    memory, pages = slots
    with ksmcore.Engine(guard=guard) as engine:
        engine.register(memory)
        callers = Callers(writers, call, pages)
        scan_while_calling(engine, callers, 0.8, 1001)
        record_property(call, str(callers))
        if "Function not implemented" in callers.errors:
            pytest.skip(f"the kernel has no {call}")
        assert callers.errors == []
        assert callers.total("right") > 1000
        if guard != "mprotect" and call == "/proc/self/mem":
            assert callers.total("lost") == callers.total("changed") == 0
        if guard == FULL and call != "/proc/self/mem":
            assert callers.total("failed") == 0
        engine._core.check()


class Calls:
    """System calls as Python makes them: each writes `data` into `memory`, by its own way."""

    def __init__(self, size: int) -> None:
        self.file = os.memfd_create("ksmcore-test")
        os.ftruncate(self.file, size)
        self.source = mmap.mmap(self.file, size)
        self.proc_mem = os.open("/proc/self/mem", os.O_RDWR)
        self.near, self.far = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)

    def recv_into(self, memory: mmap.mmap, data: bytes) -> int:
        self.far.send(data)
        return self.near.recv_into(memory)

    def preadv(self, memory: mmap.mmap, data: bytes) -> int:
        os.pwrite(self.file, data, 0)
        return os.preadv(self.file, [memory], 0)

    def process_vm_writev(self, memory: mmap.mmap, data: bytes) -> int:
        self.source[:] = data
        self.source.madvise(mmap.MADV_DONTNEED)
        here, there = (
            ctypes.addressof(ctypes.c_char.from_buffer(pages)) for pages in (self.source, memory)
        )
        return process_vm_writev(here, there, len(data))

    def write_proc_mem(self, memory: mmap.mmap, data: bytes) -> int:
        return os.pwrite(self.proc_mem, data, ctypes.addressof(ctypes.c_char.from_buffer(memory)))

    def close(self) -> None:
        self.near.close()
        self.far.close()
        self.source.close()
        os.close(self.file)
        os.close(self.proc_mem)


class Holder(threading.Thread):
    """Writes messages into regions of its own by one call, each under a hold, and checks all.

    The last word of the first page gets the number of the message, the rest one of few contents.
    """

    N_REGIONS, N_REGION_PAGES = 2, 16

    def __init__(self, engine: ksmcore.Engine, how: str, seed: int) -> None:
        super().__init__()
        self.how = how
        self.random = np.random.default_rng(seed)
        self.places = [private_pages(self.N_REGION_PAGES) for _ in range(self.N_REGIONS)]
        self.regions = [engine.register(memory) for memory, _ in self.places]
        self.calls = Calls(self.N_REGION_PAGES * PAGE)
        self.stopped = False
        self.n_calls = 0
        self.failures: collections.Counter[str] = collections.Counter()

    def run(self) -> None:
        write = getattr(self.calls, self.how)
        models = [pages.copy() for _, pages in self.places]
        while not self.stopped:
            which, value = (int(n) for n in self.random.integers([self.N_REGIONS, 4]))
            memory, pages = self.places[which]
            model = models[which]
            self.failures["changed later"] += not np.array_equal(pages, model)
            model[:] = value
            model[0, -1] = self.n_calls + 4
            data = model.tobytes()
            n_bytes = 0
            try:
                with self.regions[which].hold():
                    n_bytes = write(memory, data)
            except OSError as error:
                self.failures[str(error)] += 1
            else:
                self.failures["written in part"] += n_bytes != len(data)
                self.failures["lost"] += not np.array_equal(pages, model)
            self.n_calls += 1
            # By an ordinary store: the first page becomes equal to others, too.
            pages[0, -1] = value
            model[:] = pages


def test_calls_under_a_hold_never_fail(writers, guard, record_property):
    def is_enough() -> bool:
        return min(t.n_calls for t in threads) > 100 and has_merged(engine, 1000)

    with ksmcore.Engine(guard=guard) as engine:
        ways = ["recv_into", "preadv", "process_vm_writev", "write_proc_mem"]
        threads = [Holder(engine, how, seed) for seed, how in enumerate(ways)]
        with hard_scanning(writers, engine):
            with working(threads):
                for n in rounds(1.5, is_enough):
                    (engine.scan if n % 2 else engine.dedup)()
            for thread in threads:
                thread.calls.close()
        record_property("calls under a hold", str({t.how: t.n_calls for t in threads}))
        assert {t.how: +t.failures for t in threads} == {how: {} for how in ways}
        assert min(t.n_calls for t in threads) > 100
        assert has_merged(engine, 1000)
        engine._core.check()
