"""Failures that pass: no descriptor, no memory, no /proc for a moment. The scanner goes on."""

import contextlib
import errno
import logging
import resource

import numpy as np
import pytest

import ksmcore
from helpers.forks import THREADS_RUN, in_child
from helpers.kernels_view import store_bytes
from helpers.memory import PAGE, extent, random_pages
from helpers.waiting import wait_until
from ksmcore._engine import scanner
from ksmcore._testing import faults

pytestmark = pytest.mark.filterwarnings(THREADS_RUN)

FOREVER = 10**9
N_PAGES = 64


@contextlib.contextmanager
def no_descriptors():
    """The process gets no new one, not even the number of one that is closed meanwhile."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def guard(each_guard, monkeypatch):
    monkeypatch.setattr(scanner, "PUT_OFF_SECONDS", 0.05)
    return each_guard


def merged(engine, seed=1):
    source = random_pages(seed, N_PAGES)
    arrays = [engine.array(source) for _ in range(2)]
    assert engine.dedup(*arrays).bytes_saved == N_PAGES * PAGE
    return arrays


# ---- the scanner ---------------------------------------------------------------------------------

# What fails, and how, so that no pass can be made.
FAILURES = [
    ("open", errno.EMFILE),
    ("open", errno.ENFILE),
    ("open", errno.ENOENT),
    ("open", errno.EACCES),
    ("open", errno.ENOMEM),
    ("pread", errno.EIO),
    ("sigaction", errno.ENOMEM),
]


@pytest.mark.parametrize(("call", "code"), FAILURES)
def test_the_scanner_waits_and_goes_on(engine, caplog, call, code):
    arrays = merged(engine)
    with engine.start(sleep_millisecs=1):
        wait_until(lambda: engine.stats().full_scans > 2)
        with caplog.at_level(logging.WARNING, "ksmcore"):
            faults.inject(call, code, count=FOREVER)
            before = engine.stats().passes_put_off
            wait_until(lambda: engine.stats().passes_put_off >= before + 2)
        assert engine.scanning
        assert engine.stats().scanner_error is None
        # Said once, not each time.
        assert len([one for one in caplog.records if "the scanner waits" in one.message]) == 1
        faults.clear()
        done = engine.stats().full_scans
        source = random_pages(9, N_PAGES)
        young = [engine.array(source) for _ in range(2)]
        wait_until(lambda: engine.stats().pages_sharing == 2 * N_PAGES)
        assert engine.stats().full_scans > done
        assert np.array_equal(*young)
    assert np.array_equal(*arrays)


def test_it_stops_and_closes_while_it_waits(guard):
    with ksmcore.Engine(guard=guard) as engine:
        arrays = merged(engine)
        engine.start(sleep_millisecs=1)
        faults.inject("open", errno.EMFILE, count=FOREVER)
        wait_until(lambda: engine.stats().passes_put_off > 0)
        engine.stop()
        engine.start()
    faults.clear()
    assert np.array_equal(*arrays)
    assert not store_bytes(*extent(arrays[0]))


def test_a_callback_that_fails_likewise_still_ends_it(engine):
    def fail(report):
        raise OSError(errno.EMFILE, "the program's own")

    arrays = merged(engine)
    engine.on_pass = fail
    engine.start(sleep_millisecs=1)
    wait_until(lambda: not engine.scanning)
    assert engine.stats().passes_put_off == 0
    with pytest.raises(OSError, match="the program's own"):
        engine.stop()
    assert np.array_equal(*arrays)


def test_arrays_go_and_numbers_stay_right_without_descriptors(guard):
    def work() -> None:
        engine = ksmcore.Engine(guard=guard)
        arrays = merged(engine)
        kept = merged(engine, 2)
        gone = [extent(array) for array in arrays]
        engine.start(sleep_millisecs=1)
        with no_descriptors():
            wait_until(lambda: engine.stats().passes_put_off > 0)
            arrays.clear()
            assert engine.stats().regions == 2
            assert engine.stats().pages_sharing == N_PAGES
            arrays += [engine.array(random_pages(3, N_PAGES)) for _ in range(2)]
        wait_until(lambda: engine.stats().pages_sharing == 2 * N_PAGES)
        wait_until(lambda: engine.stats().store_pages == 2 * N_PAGES)
        assert engine.scanning
        assert np.array_equal(*arrays)
        assert np.array_equal(*kept)
        engine._core.check()
        engine.close()
        assert not any(store_bytes(*one) for one in gone)

    assert in_child(work) == 0


# ---- what is called ------------------------------------------------------------------------------


def test_passes_are_refused_in_words_and_change_nothing(guard):
    with ksmcore.Engine(guard=guard) as engine:
        arrays = merged(engine)
        before = engine.stats()
        with no_descriptors():
            for call in (engine.scan, engine.dedup, lambda: engine.dedup(arrays[0])):
                with pytest.raises(OSError, match="nothing can be merged now") as caught:
                    call()
                assert caught.value.errno == errno.EMFILE
            assert engine.stats().pages_sharing == before.pages_sharing
        engine.scan()
        assert np.array_equal(*arrays)


def test_copies_are_made_all_the_same(guard):
    with ksmcore.Engine(guard=guard) as engine:
        arrays = merged(engine)
        arrays[1][PAGE] ^= 1
        expected = [array.copy() for array in arrays]
        for call in ("open", "pread", "mincore", "userfaultfd", "pagemap_scan"):
            for code in (errno.EMFILE, errno.ENOENT, errno.ENOMEM, errno.EIO):
                faults.inject(call, code, count=FOREVER)
                copies = [engine.copy(array) for array in arrays]
                faults.clear()
                for copy, right in zip(copies, expected, strict=True):
                    assert np.array_equal(copy, right)
                    copy += 1
        for array, right in zip(arrays, expected, strict=True):
            assert np.array_equal(array, right)
        engine._core.check()


def test_what_cannot_be_looked_at_is_not_registered(engine):
    buffer = bytearray(4 * PAGE)
    with no_descriptors(), pytest.raises(OSError, match="smaps") as caught:
        engine.register(buffer)
    assert caught.value.errno == errno.EMFILE
    assert engine.regions == ()
    with engine.register(buffer):
        assert len(engine.regions) == 1


def test_an_engine_that_is_made_in_such_a_moment_is_as_good_as_another():
    with no_descriptors():
        engine = ksmcore.Engine()
        arrays = [engine.array(random_pages(1, N_PAGES)) for _ in range(2)]
    usual = ksmcore.Engine()
    usual.scan()
    with engine, usual:
        assert engine.dedup().bytes_saved == N_PAGES * PAGE
        for name in ("guard", "dirty", "presence"):
            assert getattr(engine.stats(), name) == getattr(usual.stats(), name)
        assert np.array_equal(*arrays)


def test_a_guard_that_there_is_no_descriptor_for_is_not_given_up(rng):
    if ksmcore.features()["userfaultfd-user"] is not None:
        pytest.skip("there is only one guard here")
    with ksmcore.Engine() as engine:
        best = engine.stats().guard
        arrays = merged(engine)
        for code in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            faults.inject("userfaultfd", code, count=FOREVER)
            with pytest.raises((OSError, MemoryError), match="guard"):
                engine.scan()
            faults.clear()
            engine.scan()
            assert engine.stats().guard == best
        # One that is refused is.
        faults.inject("userfaultfd", errno.EIO, count=FOREVER)
        engine.scan()
        faults.clear()
        assert engine.stats().guard == "mprotect"
        assert np.array_equal(*arrays)
