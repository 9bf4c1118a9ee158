"""The userfaultfd guards: chosen by what is there, no signal handler, pinned pages left alone."""

import ctypes
import errno
import mmap
import os
import signal
import struct
import threading

import numpy as np
import pytest

import ksmcore
from helpers.forks import THREADS_RUN, in_child
from helpers.kernels_view import descriptors
from helpers.libc import libc, why_failed
from helpers.memory import PAGE, extent, private_memory, random_pages
from helpers.waiting import wait_until
from ksmcore._kernel import smaps
from ksmcore._testing import faults, hooks

UFFD = [g for g in ("userfaultfd", "userfaultfd-user") if ksmcore.features()[g] is None]

pytestmark = [
    pytest.mark.skipif(not UFFD, reason="no userfaultfd to be had here"),
    pytest.mark.filterwarnings(THREADS_RUN),
]


@pytest.fixture(params=UFFD)
def guard(request):
    return request.param


@pytest.fixture
def full():
    if ksmcore.features()["pinned"] is not None:
        pytest.skip(ksmcore.features()["pinned"])
    with ksmcore.Engine(guard="userfaultfd") as engine:
        yield engine
        engine._core.check()


_of_others = 0


@pytest.fixture(scope="module", autouse=True)
def _others():
    """The default engine, if other tests have left memory with it, has a descriptor of its own."""
    global _of_others
    _of_others = len(descriptors("userfaultfd"))


def n_opened() -> int:
    """Descriptors that tests of this module have opened. (A child has none of the others.)"""
    return max(len(descriptors("userfaultfd")) - _of_others, 0)


# ---- which guard ----------------------------------------------------


def test_auto_is_the_strongest_that_is_there():
    faults.inject("userfaultfd", errno.EPERM)
    with ksmcore.Engine() as engine:
        assert engine.stats().guard == "userfaultfd-user"
    faults.inject("userfaultfd", errno.EPERM, count=2)
    with ksmcore.Engine() as engine:
        assert engine.stats().guard == "mprotect"
    faults.clear()


@pytest.mark.parametrize("asked", ["userfaultfd", "userfaultfd-user"])
def test_by_name_what_is_not_there_names_what_is(asked):
    faults.inject("userfaultfd", errno.ENOSYS, count=100)
    with pytest.raises(ValueError, match=r"not implemented.*Linux 6.4.*there is 'mprotect'$"):
        ksmcore.Engine(guard=asked)
    assert "not implemented" in ksmcore.features()[asked].lower()
    assert ksmcore.features()["pinned"] is not None


def test_a_program_that_gives_up_its_privileges_goes_on_with_a_weaker_guard(rng):
    source = random_pages(rng, 64)
    with ksmcore.Engine() as engine, ksmcore.Engine(guard=UFFD[0]) as strict:
        a, b = engine.array(source), engine.array(source)
        faults.inject("userfaultfd", errno.EPERM, count=len(UFFD))
        assert engine.dedup().pages_merged == 128
        assert faults.clear() == 0
        assert engine.stats().guard == "mprotect"
        faults.inject("userfaultfd", errno.EPERM)
        with pytest.raises(PermissionError, match="userfaultfd"):
            strict.scan()
        a += 1
        assert np.array_equal(b, source)


def test_nothing_stays_behind(engine, rng):
    source = random_pages(rng, 64)
    a, b = engine.array(source), engine.array(source)
    during = []

    def look(done, total):
        during.append((n_opened(), hooks.handler_installed()))

    before = smaps.count_maps()
    engine.scan(progress=look)
    assert set(during) == {(1, True)}  # the handler rescues the scanner's own reads
    assert n_opened() == 0
    assert not hooks.handler_installed()
    # One more or fewer where an allocator's own mappings fused meanwhile, or it made one.
    assert smaps.count_maps() <= before + 1
    engine.dedup()
    for vma in smaps.vmas_in(*extent(a)):
        assert not {"um", "uw"} & set(vma.flags)
    assert np.array_equal(a, b)


# ---- windows ----------------------------------------------------


def test_a_writer_with_sigsegv_blocked_only_waits(engine):
    a = engine.empty((64, PAGE // 8), np.uint64)
    b = engine.empty((64, PAGE // 8), np.uint64)
    a[:] = b[:] = 0
    stop = threading.Event()
    wrong = []

    def write() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGSEGV])
        value = 0
        while not stop.is_set():
            value += 1
            a[:] = value % 3 + 1
            if not (a == value % 3 + 1).all():
                wrong.append(value)

    b[:] = 2
    writer = threading.Thread(target=write)
    writer.start()
    merged = sum(engine.dedup().pages_merged for _ in range(200))
    stop.set()
    writer.join()
    assert wrong == []
    assert merged > 0
    assert (b == 2).all()


def test_a_region_of_many_mappings(engine, rng):
    """Pages are moved with one call per mapping at most: here each has one or two pages."""
    source = rng.integers(0, 256, (300, PAGE), dtype=np.uint8)
    memory = private_memory(300)
    pages = np.frombuffer(memory, np.uint8).reshape(300, PAGE)
    pages[:] = source
    for page in range(0, 300, 2):
        memory.madvise(mmap.MADV_SEQUENTIAL, page * PAGE, PAGE)
    assert len(smaps.vmas_in(*extent(pages))) > 100
    twin = engine.array(source)
    report = engine.dedup(memory, twin)
    assert report.pages_merged >= 300
    assert report.skipped["refused"] == 0
    assert np.array_equal(pages, source)
    pages[:] += 1
    assert np.array_equal(twin, source)
    assert np.array_equal(pages, source + 1)
    engine.unregister(memory)


def test_huge_pages(engine):
    memory = private_memory((16 << 20) // PAGE)
    memory.madvise(mmap.MADV_HUGEPAGE)
    pages = np.frombuffer(memory, np.uint8).reshape(-1, PAGE)
    pages[:] = np.arange(len(pages), dtype=np.uint16).view(np.uint8).reshape(-1, 2)[:, :1] + 1
    pages[:, -1] = np.arange(len(pages)) // 256 + 1
    twin = engine.array(pages)
    report = engine.dedup(memory, twin)
    assert report.pages_merged == 2 * len(pages)
    assert report.pages_skipped == 0
    assert np.array_equal(pages, twin)
    pages[:] += 1
    assert np.array_equal(pages, twin + 1)
    engine.unregister(memory)


def test_unequal_pages_come_back_as_they_were(full, rng):
    """Equal when looked at and changed before the window: nothing may be lost on the way back."""
    source = rng.integers(0, 256, (256, PAGE), dtype=np.uint8)
    a, b = full.array(source), full.array(source)
    # Remapping fails for some: what was moved away is put back.
    faults.inject("mmap", errno.ENOMEM, after=2, count=3)
    full.dedup(a, b)
    faults.clear()
    assert np.array_equal(a, source)
    assert np.array_equal(b, source)
    a += 1
    assert np.array_equal(a, source + 1)
    assert np.array_equal(b, source)


def test_pages_that_were_moved_whatever_the_kernel_says(full, rng):
    """Linux 6.18 may move pages and report an error: where a page is, is looked at."""
    source = rng.integers(1, 256, (300, PAGE), dtype=np.uint8)
    for after in range(5):
        a, b = full.array(source), full.array(source)
        faults.inject("uffd_move_then_fail", errno.EEXIST, after=after, count=2)
        full.dedup(a, b)
        assert faults.clear() < 2
        assert np.array_equal(a, source)
        assert np.array_equal(b, source)
        a += 1
        assert np.array_equal(a, source + 1)
        assert np.array_equal(b, source)
        full.unregister(a)


@pytest.mark.parametrize("first", [0, 1, 2])
def test_a_registration_that_fails_halfway_leaves_nothing_registered(engine, rng, first):
    source = rng.integers(1, 256, (256, PAGE), dtype=np.uint8)
    a, b = engine.array(source), engine.array(source)
    during = []

    def look(done, total):
        for array in (a, b):
            for vma in smaps.vmas_in(*extent(array)):
                during.append({"um", "uw"} & set(vma.flags))

    faults.inject("uffd_register_then_fail", errno.ENOMEM, after=1 + first, count=1)
    engine.dedup(a, b, progress=look)
    faults.clear()
    assert set.union(*during) == set()
    a += 1
    assert np.array_equal(b, source)


@pytest.mark.parametrize("code", [errno.EBUSY, errno.ENOMEM, errno.EINVAL])
def test_pages_that_cannot_be_moved_back_are_copied_back(full, rng, code):
    source = rng.integers(1, 256, (16, PAGE), dtype=np.uint8)
    a, b = full.array(source), full.array(source)
    full.dedup(full.array(source[:1]), full.array(source[:1]))  # the store is there
    # Out by one call; the mapping fails; then moving back fails for a while.
    faults.inject("mmap", errno.ENOMEM, after=1, count=1)
    faults.inject("uffd_move", code, after=1, count=200)
    full.dedup(a, b)
    left = faults.clear()
    assert left < 200
    assert np.array_equal(a, source)
    assert np.array_equal(b, source)
    a += 1
    b += 2
    assert np.array_equal(a, source + 1)
    assert np.array_equal(b, source + 2)


def test_a_window_that_stays_shut_is_an_internal_error_and_heals(guard, rng):
    zero = np.zeros(4 * PAGE, np.uint8)
    with ksmcore.Engine(guard=guard) as engine:
        # Where there are huge pages, what is known of advice takes memory: before mmap fails.
        engine.dedup(engine.full(4 * PAGE, 7, np.uint8))
        array = engine.empty(4 * PAGE, np.uint8)
        array[:] = 1
        array[:] = 0
        if guard == "userfaultfd-user":
            # Zeros are mapped over the window; were all of it, there would be nothing to let go of.
            faults.inject("mmap", errno.ENOMEM, count=10**6)
        faults.inject("uffd_unregister", errno.ENOMEM, count=10**6)
        with pytest.raises(ksmcore.InternalError, match="writable"):
            engine.dedup(array)
        faults.clear()
        # The next window heals the other first.
        engine.dedup(engine.full(4 * PAGE, 3, np.uint8))
        assert np.array_equal(array, zero)
        array[:] = 5
        assert (array == 5).all()
    assert n_opened() == 0


def test_a_program_that_closes_all_descriptors(guard, rng):
    """In the middle of a pass: nothing more is merged in it, and the next one is as always."""
    source = rng.integers(0, 256, (9000, PAGE), dtype=np.uint8)
    with ksmcore.Engine(guard=guard) as engine:
        a, b = engine.array(source), engine.array(source)

        def close(done, total):
            for fd in descriptors("userfaultfd"):
                os.close(fd)

        report = engine.dedup(progress=close)
        assert report.skipped["refused"] > 0
        assert np.array_equal(a, source)
        assert np.array_equal(b, source)
        assert engine.dedup().pages_merged > 0
        assert np.array_equal(a, source)
        assert np.array_equal(b, source)


# ---- fork and pins ----------------------------------------------------


@pytest.mark.parametrize("alive", [True, False])
def test_pages_shared_with_a_child_merge_too(full, rng, alive):
    source = rng.integers(0, 256, (300, PAGE), dtype=np.uint8)
    a, b = full.array(source), full.array(source)
    ready, go = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        os.read(go[0], 1)
        right = np.array_equal(a, source) and np.array_equal(b, source)
        os._exit(0 if right else 1)
    if not alive:
        os.write(go[1], b"x")
        assert os.waitpid(pid, 0)[1] == 0
    report = full.dedup(a, b)
    assert report.pages_merged == 600
    a += 1
    if alive:
        os.write(go[1], b"x")
        assert os.waitpid(pid, 0)[1] == 0
    assert np.array_equal(a, source + 1)
    assert np.array_equal(b, source)
    for fd in (*ready, *go):
        os.close(fd)


def test_a_fork_in_the_middle_of_a_pass(engine, rng):
    """The child must not touch the parent's memory through the descriptor that it inherited."""
    source = rng.integers(0, 256, (9000, PAGE), dtype=np.uint8)
    a, b = engine.array(source), engine.array(source)
    statuses = []

    def live():
        own = engine.array(source[:200])
        other = engine.array(source[:200])
        assert engine.dedup(own, other).pages_merged == 400
        own += 1
        assert np.array_equal(own, source[:200] + 1)
        assert np.array_equal(a, source)
        assert n_opened() == 0

    def fork(done, total):
        statuses.append(in_child(live))

    assert engine.dedup(progress=fork).pages_merged == 18000
    assert len(statuses) > 2
    assert set(statuses) == {0}
    assert np.array_equal(a, source)
    assert np.array_equal(b, source)


IO_URING_SETUP, IO_URING_REGISTER, REGISTER_BUFFERS = 425, 427, 0


def pin(addr: int, len_bytes: int) -> int:
    """Pin memory as a registered buffer of an io_uring; closing the descriptor lets it go."""
    ring = libc.syscall(IO_URING_SETUP, 4, ctypes.create_string_buffer(120))
    if ring < 0:
        pytest.skip(why_failed("io_uring_setup"))
    vector = struct.pack("PN", addr, len_bytes)
    rc = libc.syscall(IO_URING_REGISTER, ring, REGISTER_BUFFERS, ctypes.c_char_p(vector), 1)
    if rc < 0:
        os.close(ring)
        pytest.skip(why_failed("io_uring_register"))
    return ring


def test_pinned_pages_are_left_alone(full, rng):
    source = rng.integers(0, 256, (300, PAGE), dtype=np.uint8)
    a, b = full.array(source), full.array(source)
    addr = a.ctypes.data
    ring = pin(addr + 100 * PAGE, 20 * PAGE)
    frames = smaps.vmas_in(addr, addr + a.nbytes)
    report = full.dedup(a, b)
    assert report.skipped["pinned"] == 20
    assert report.pages_merged >= 2 * 280
    assert len(frames) > 0
    # Still the page that the device knows: what it would write there must show. The other end of a
    # pinned page is not to be had without a device, so its mapping is looked at instead.
    (vma,) = smaps.vmas_in(addr + 100 * PAGE, addr + 120 * PAGE)
    assert vma.path == ""
    assert np.array_equal(a, source)
    assert np.array_equal(b, source)
    os.close(ring)
    full._core.check()

    def all_are_merged():
        full.dedup(a, b)
        return full.stats().pages_sharing == 300

    wait_until(all_are_merged)  # the kernel lets go a moment later
