"""ksmcore._kernel.syscalls: what Python sees of it, and what a failing call turns into."""

import errno
import mmap
import os
import warnings

import numpy as np
import pytest

import ksmcore
from ksmcore._kernel import forks, syscalls
from ksmcore._testing import faults

CALLS = (
    "mmap munmap mremap mprotect madvise mincore memfd_create ftruncate fallocate pwrite pread "
    "open sigaction"
).split()


def test_page_bytes():
    assert syscalls.page_bytes() == mmap.PAGESIZE == ksmcore.Engine.page_bytes


def test_generation_is_constant():
    assert forks.generation() == forks.generation()


def test_generation_grows_in_a_child():
    before = forks.generation()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of NumPy's threads, since Python 3.12
        child = os.fork()
    if child == 0:
        os._exit(forks.generation() - before)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    assert forks.generation() == before


class TestFeatures:
    def test_names(self):
        assert {"pagemap", "memfd"} <= set(syscalls.features())

    def test_values(self):
        for name, why_not in syscalls.features().items():
            assert isinstance(name, str)
            assert why_not is None or (isinstance(why_not, str) and why_not)

    def test_is_the_public_function(self):
        assert ksmcore.features().items() >= syscalls.features().items()

    def test_says_why_not(self):
        faults.inject("memfd_create", errno.EPERM)
        assert syscalls.features()["memfd"] == os.strerror(errno.EPERM)

    def test_one_missing_does_not_hide_another(self):
        faults.inject("open", errno.EACCES)
        found = syscalls.features()
        assert found["pagemap"] == os.strerror(errno.EACCES)
        assert found["memfd"] is None

    def test_leaves_no_descriptor(self):
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(10):
            syscalls.features()
        assert len(os.listdir("/proc/self/fd")) == before


class TestInject:
    @pytest.mark.parametrize("call", CALLS)
    def test_names(self, call):
        faults.inject(call, errno.EIO)
        assert faults.clear() == 1

    @pytest.mark.parametrize("call", ["none", "", "MMAP", "read"])
    def test_unknown_names_are_told_the_known(self, call):
        with pytest.raises(ValueError, match="unknown call") as caught:
            faults.inject(call, errno.EIO)
        assert all(name in str(caught.value) for name in CALLS)
        assert faults.clear() == 0

    def test_wrong_type(self):
        with pytest.raises(TypeError):
            faults.inject(b"mmap", errno.EIO)

    def test_after_and_count(self):
        faults.inject("memfd_create", errno.EMFILE, after=2, count=2)
        answers = [syscalls.features()["memfd"] for _ in range(6)]
        failed = os.strerror(errno.EMFILE)
        assert answers == [None, None, failed, failed, None, None]
        assert faults.clear() == 0

    def test_clear_counts_what_is_left(self):
        faults.inject("mmap", errno.ENOMEM, after=10**6, count=3)
        faults.inject("open", errno.EACCES, after=10**6, count=4)
        assert faults.clear() == 7
        assert faults.clear() == 0

    def test_clear_lets_calls_through(self):
        faults.inject("memfd_create", errno.EPERM, count=100)
        faults.clear()
        assert syscalls.features()["memfd"] is None

    def test_two_calls_at_once(self):
        faults.inject("memfd_create", errno.EPERM)
        faults.inject("open", errno.EACCES)
        assert set(syscalls.features().values()) == {
            os.strerror(errno.EPERM),
            os.strerror(errno.EACCES),
        }


class TestErrors:
    """One helper turns a failed call into an exception: errno, call, range, reason."""

    def test_no_memory_is_a_memory_error(self, engine):
        faults.inject("mmap", errno.ENOMEM)
        with pytest.raises(MemoryError) as caught:
            engine.empty(10 * mmap.PAGESIZE, np.uint8)
        text = str(caught.value)
        assert f"[Errno {errno.ENOMEM}]" in text
        assert "mmap" in text
        assert f"{10 * mmap.PAGESIZE} bytes" in text
        assert "vm.max_map_count" in text

    @pytest.mark.parametrize("code", [errno.EAGAIN, errno.EPERM, errno.EINVAL])
    def test_others_are_os_errors_with_errno(self, engine, code):
        faults.inject("mmap", code)
        with pytest.raises(OSError, match=r"mmap of \d+ bytes") as caught:
            engine.empty(10 * mmap.PAGESIZE, np.uint8)
        assert caught.value.errno == code
        assert os.strerror(code) in caught.value.strerror

    def test_the_class_follows_errno(self, engine):
        faults.inject("mmap", errno.EPERM)
        with pytest.raises(PermissionError):
            engine.empty(10 * mmap.PAGESIZE, np.uint8)

    def test_nothing_is_left_of_what_failed(self, engine):
        faults.inject("mmap", errno.ENOMEM)
        with pytest.raises(MemoryError):
            engine.empty(10 * mmap.PAGESIZE, np.uint8)
        assert engine.stats().regions == 0

    def test_names_the_address(self, private_buffer):
        engine = ksmcore.Engine(guard="mprotect")
        buffer = private_buffer(10)
        region = engine.register(buffer)
        buffer[:] = b"x" * len(buffer)
        engine.dedup()
        faults.inject("mmap", errno.ENOMEM)
        with pytest.raises(MemoryError, match="unregister: mmap"):
            region.close()
        faults.clear()
        faults.inject("mprotect", errno.EACCES)
        with pytest.raises(PermissionError, match=f"mprotect of [0-9]+ bytes at {region.addr:#x}"):
            region.close()
        faults.clear()
        region.close()
        assert buffer[:] == b"x" * len(buffer)

    def test_an_engine_without_memory(self):
        faults.inject("mmap", errno.ENOMEM)
        with pytest.raises(MemoryError, match="engine: mmap"):
            ksmcore.Engine()
