"""Failing system calls: the merge is undone, memory stays right, the reason is counted."""

import errno
import gc
import os

import numpy as np
import pytest

import ksmcore
from helpers.kernels_view import descriptors
from helpers.memory import PAGE, address, octets, private_memory, random_pages
from ksmcore._testing import faults, hooks

SPAN_PAGES = 512
# What shuts a window; and the mmap calls made by entering a guard (for its scratch).
SHUTS = {"mprotect": "mprotect", "userfaultfd-user": "uffd_protect", "userfaultfd": "uffd_register"}
MMAPS_TO_ENTER = {"mprotect": 0, "userfaultfd-user": 0, "userfaultfd": 1}


def open_fds() -> int:
    gc.collect()
    return len(descriptors())


def test_enomem_from_mmap_leaves_the_pages_as_they_were(engine, guard, rng):
    source = random_pages(rng, 64)
    a, b = engine.array(source), engine.array(source)
    engine.dedup(engine.array(random_pages(rng, 1)))  # the engine's own arrays exist now
    faults.inject("mmap", errno.ENOMEM, after=MMAPS_TO_ENTER[guard], count=1000)
    report = engine.dedup(a, b)
    assert faults.clear() < 1000
    assert report.bytes_saved == 0
    assert report.skipped["store"] + report.skipped["refused"] > 0
    assert np.array_equal(a, source)
    assert np.array_equal(b, source)
    engine._core.check()
    assert engine.dedup(a, b).bytes_saved == 64 * PAGE


def in_one_span(private_buffer, n_arrays: int, n_pages: int) -> list[np.ndarray]:
    """Arrays side by side in one aligned block of the pages that a pass looks at together."""
    memory = octets(private_buffer(2 * SPAN_PAGES))
    start = -address(memory) % (SPAN_PAGES * PAGE)
    return np.split(memory[start : start + n_arrays * n_pages * PAGE], n_arrays)


def test_one_failing_remap_undoes_both_halves(engine, guard, rng, private_buffer):
    source = random_pages(rng, 8)
    warm_a, warm_b = engine.array(source), engine.array(source)
    engine.dedup(warm_a, warm_b)  # the store is there, so mmap is called for the remap only
    # In one span, or each span would have a remap of its own.
    a, b = in_one_span(private_buffer, 2, 8)
    new = random_pages(rng, 8)
    a[:] = b[:] = new
    engine.register(a)
    engine.register(b)
    faults.inject("mmap", errno.ENOMEM, after=MMAPS_TO_ENTER[guard])
    report = engine.dedup(a, b)
    assert faults.clear() == 0
    assert report.skipped["refused"] == 8
    assert report.skipped["partner"] == 8
    assert report.bytes_saved == 0
    stats = engine.stats()
    assert (stats.pages_shared, stats.pages_sharing) == (8, 8)
    assert np.array_equal(a, new)
    assert np.array_equal(b, new)
    a[0] ^= 1
    assert b[0] == new[0]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.ENOMEM, errno.EIO])
def test_a_store_that_cannot_be_written_is_counted(engine, rng, code):
    source = random_pages(rng, 64)
    a, b = engine.array(source), engine.array(source)
    faults.inject("pwrite", code, count=100)  # a batch may be cut in two
    report = engine.dedup(a, b)
    assert faults.clear() < 100
    assert report.skipped["store"] == 128
    assert report.bytes_saved == 0
    assert np.array_equal(a, source)
    assert np.array_equal(b, source)
    engine._core.check()
    assert engine.dedup(a, b).bytes_saved == 64 * PAGE


def test_a_store_that_cannot_be_made_is_counted(engine, rng):
    source = random_pages(rng, 4)
    a, b = engine.array(source), engine.array(source)
    faults.inject("memfd_create", errno.EMFILE, count=100)
    report = engine.dedup(a, b)
    assert report.skipped["store"] == 4
    assert report.bytes_saved == 0
    assert np.array_equal(a, b)
    faults.clear()
    assert engine.dedup(a, b).bytes_saved == 4 * PAGE


def test_a_hole_that_cannot_be_punched_costs_no_correctness(engine, rng):
    source = random_pages(rng, 32)
    a, b = engine.array(source), engine.array(source)
    engine.dedup(a, b)
    faults.inject("fallocate", errno.EOPNOTSUPP, count=100)
    a[::PAGE] ^= 1
    b[::PAGE] ^= 2
    engine.scan()
    assert faults.clear() < 100
    assert engine.stats().store_pages == 0
    new = random_pages(rng, 32)
    a[:] = b[:] = new
    engine.dedup(a, b)
    assert np.array_equal(a, new)
    assert np.array_equal(b, new)


def test_protection_that_is_refused_skips_the_window(engine, guard, rng):
    source = random_pages(rng, 16)
    a, b = engine.array(source), engine.array(source)
    after = 1 if guard == "userfaultfd" else 0  # the scratch is registered first
    faults.inject(SHUTS[guard], errno.ENOMEM, after=after)
    report = engine.dedup(a, b)
    assert faults.clear() == 0
    assert report.skipped["refused"] + report.skipped["partner"] > 0
    a[:] += 1  # must be writable everywhere
    assert np.array_equal(b, source)


def test_permission_is_given_back_however_often_the_kernel_refuses_at_first(engine, rng):
    source = random_pages(rng, 16)
    a, b = engine.array(source), engine.array(source)
    engine.dedup(engine.array(random_pages(rng, 1)))
    faults.inject("mmap", errno.ENOMEM, after=2, count=1)
    faults.inject("mprotect", errno.ENOMEM, after=1, count=50)
    engine.dedup(a, b)
    faults.clear()
    a[:] += 1
    b[:] += 2
    assert np.array_equal(a, source + 1)
    assert np.array_equal(b, source + 2)


def test_a_permission_that_never_comes_back_is_an_internal_error(rng):
    with ksmcore.Engine(guard="mprotect") as engine:
        # Without advice, which a new mapping has to be given before the pages are protected.
        zero = np.frombuffer(private_memory(4), np.uint8)
        zero[:] = 1
        zero[:] = 0
        engine.register(zero)
        # Where nothing can be mapped over the pages their permission is asked for: in vain.
        faults.inject("mmap", errno.ENOMEM, after=MMAPS_TO_ENTER["mprotect"], count=10**6)
        faults.inject("mprotect", errno.ENOMEM, after=1, count=10**6)
        with pytest.raises(ksmcore.InternalError, match="writable"):
            engine.dedup(zero)
        faults.clear()
        assert hooks.handler_installed()
        zero[0] = 1  # the handler asks once more on behalf of the writer
        assert zero[0] == 1
        engine.scan()
        zero[PAGE:] = 2
    assert not hooks.handler_installed()


def test_unregister_without_memory_changes_nothing(guard, rng):
    source = random_pages(rng, 600)
    with ksmcore.Engine(guard=guard) as engine:
        a, b = engine.array(source), engine.array(source)
        engine.dedup(a, b)
        calls = [("mmap", MMAPS_TO_ENTER[guard]), ("mremap", 0), ("mremap", 2)]
        # Advice for the scratch may be refused, that for the new memory may not.
        calls.append(("madvise", 1 + 3 * MMAPS_TO_ENTER[guard]))
        for call, after in calls:
            faults.inject(call, errno.ENOMEM, after=after)
            with pytest.raises(MemoryError, match="unregister"):
                engine.unregister(a)
            assert faults.clear() == 0
            assert np.array_equal(a, source)
            engine._core.check()
            assert engine.stats().regions == 2
        engine.unregister(a)
        assert engine.stats().regions == 1
        assert np.array_equal(a, source)
        assert np.array_equal(b, source)


def test_a_region_that_cannot_be_closed_stays_open(guard, rng):
    source = random_pages(rng, 600)
    buffer = bytearray(source.tobytes())
    with ksmcore.Engine(guard=guard) as engine:
        b = engine.array(source)
        with engine.register(buffer) as region:
            engine.dedup()
            merged = engine.stats().pages_sharing
            faults.inject("mmap", errno.ENOMEM, after=MMAPS_TO_ENTER[guard])
            if merged:
                with pytest.raises(MemoryError):
                    region.close()
                assert not region.closed
                with pytest.raises(BufferError):
                    buffer.append(1)
            faults.clear()
        assert region.closed
        buffer.append(1)
        assert bytes(buffer[:-1]) == source.tobytes()
        assert np.array_equal(b, source)


# What tells which pages are there, the best first.
PRESENCE = ["pagemap_scan", "pread", "mincore"]


def test_where_one_way_to_tell_presence_fails_the_next_one_serves(engine, rng):
    source = random_pages(rng, 8)
    a, b = engine.array(source), engine.array(source)
    faults.inject("pagemap_scan", errno.EIO, count=10**6)
    assert engine.dedup().bytes_saved == 8 * PAGE
    assert np.array_equal(a, source)
    assert np.array_equal(b, source)


def test_where_advice_cannot_be_looked_at_nothing_is_remapped(engine, rng):
    source = random_pages(rng, 8)
    a, b = engine.array(source), engine.array(source)
    # The census makes the first.
    faults.inject("pread", errno.EIO, after=1, count=10**6)
    report = engine.dedup()
    assert (report.bytes_saved, report.skipped["refused"]) == (0, 16)
    faults.clear()
    assert engine.dedup().bytes_saved == 8 * PAGE
    assert np.array_equal(a, source)
    assert np.array_equal(b, source)


def test_a_presence_query_that_fails_is_an_oserror_with_its_call(engine, rng):
    a = engine.array(random_pages(rng, 4))
    for call in PRESENCE:
        faults.inject(call, errno.EIO, after=call == "pread", count=10**6)
    with pytest.raises(OSError, match="mincore") as caught:
        engine.scan()
    assert caught.value.errno == errno.EIO
    faults.clear()
    engine.scan()
    assert a.size == 4 * PAGE


@pytest.mark.parametrize("call", ["open", "pread"])
def test_a_census_that_fails_is_an_oserror_and_nothing_is_merged(engine, rng, call):
    source = random_pages(rng, 4)
    a, b = engine.array(source), engine.array(source)
    faults.inject(call, errno.EIO, count=10**6)
    if call == "open":
        for fd in descriptors("/maps"):
            os.close(fd)
    with pytest.raises(OSError, match=f"nothing can be merged now .*{call}") as caught:
        engine.dedup(a, b)
    assert caught.value.errno == errno.EIO
    faults.clear()
    assert engine.stats().pages_sharing == 0
    assert engine.dedup(a, b).bytes_saved == 4 * PAGE


def test_a_guard_that_cannot_be_had_is_an_oserror(engine, guard):
    call = "sigaction" if guard == "mprotect" else "userfaultfd"
    faults.inject(call, errno.EPERM)
    with pytest.raises(OSError, match=call):
        engine.scan()
    engine.scan()


CODES = {
    "mmap": (errno.ENOMEM, errno.EAGAIN),
    "munmap": (errno.ENOMEM,),
    "mremap": (errno.ENOMEM, errno.EAGAIN),
    "mprotect": (errno.ENOMEM,),
    "madvise": (errno.EAGAIN, errno.EINVAL, errno.ENOMEM),
    "memfd_create": (errno.EMFILE, errno.ENOMEM),
    "ftruncate": (errno.EFBIG, errno.ENOSPC),
    "fallocate": (errno.EINTR, errno.EOPNOTSUPP),
    "pwrite": (errno.ENOSPC, errno.EFAULT),
    "pread": (errno.EIO, errno.ENOMEM),
    "open": (errno.EMFILE, errno.EACCES),
    "sigaction": (errno.EINVAL,),
    "seal": (errno.EBUSY, errno.EPERM),
    "userfaultfd": (errno.EPERM, errno.EMFILE),
    "uffd_register": (errno.ENOMEM, errno.EBUSY),
    "uffd_unregister": (errno.ENOMEM, errno.EINVAL),
    "uffd_protect": (errno.ENOENT, errno.EAGAIN),
    "uffd_move": (errno.EAGAIN, errno.EBUSY, errno.EINVAL, errno.ENOENT, errno.ENOMEM),
    "uffd_copy": (errno.ENOMEM,),
    "uffd_wake": (errno.EINVAL,),
    "uffd_move_then_fail": (errno.EEXIST, errno.EAGAIN, errno.ENOENT),
    "uffd_register_then_fail": (errno.ENOMEM,),
}


@pytest.mark.parametrize("call", sorted(CODES))
def test_any_call_may_fail_at_any_time(call, guard, rng):
    """Each call, each errno, at its first to n-th use, through a whole life of an engine."""
    source = random_pages(rng, 300)
    fds = open_fds()
    for code in CODES[call]:
        for after in (0, 1, 2, 5, 11):
            faults.inject(call, code, after=after, count=2)
            engine = None
            arrays = []
            try:
                engine = ksmcore.Engine(guard=guard)
                for _ in range(3):
                    arrays.append(engine.array(source))
                arrays.append(engine.empty(40 * PAGE, np.uint8))
                arrays[3][:] = 0
                engine.scan()
                arrays[0][5 * PAGE] ^= 1
                engine.scan()
                arrays[0][5 * PAGE] ^= 1
                engine.dedup()
                engine.unregister(arrays[1])
            except (OSError, MemoryError):
                pass
            except ValueError as error:
                if "is not to be had" not in str(error):
                    raise
            faults.clear()
            for array in arrays[:3]:
                assert np.array_equal(array[6 * PAGE :], source[6 * PAGE :])
                assert np.array_equal(array[: 5 * PAGE], source[: 5 * PAGE])
                array += 1
                assert np.array_equal(array[6 * PAGE :], source[6 * PAGE :] + 1)
            if engine is not None:
                engine._core.check()
                engine.dedup()
                engine._core.check()
                engine.close()
            engine = array = None
            arrays.clear()
            assert not hooks.handler_installed()
    assert open_fds() == fds
