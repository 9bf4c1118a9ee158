"""ksmcore._kernel.files, and the list of descriptors: a forked child has none of its parent's."""

import contextlib
import ctypes
import errno
import fcntl
import os
import socket
import subprocess
import sys
import threading

import numpy as np
import pytest

import ksmcore
from helpers.forks import THREADS_RUN, Child, exit_code, finish, fork, in_child
from helpers.kernels_view import descriptors
from helpers.memory import PAGE, random_pages
from helpers.processes import run_python
from ksmcore._engine.settings import GUARDS
from ksmcore._kernel import files, smaps
from ksmcore._testing import faults

pytestmark = pytest.mark.filterwarnings(THREADS_RUN)

# Parts of the names of what ksmcore opens.
OURS = ("ksmcore", "userfaultfd", "pagemap", "/maps", "smaps", "/status", "/task")


def ours() -> list[str]:
    return sorted(name for name in descriptors().values() if any(part in name for part in OURS))


def assert_closed(fd: int) -> None:
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def at_work() -> ksmcore.Engine:
    """An engine that has all that it can have open outside of a pass: store, tracker, leases."""
    engine = ksmcore.Engine()
    engine.kept = [engine.array(random_pages(1, 16)) for _ in range(2)]
    engine.kept.append(engine.array(random_pages(2, 64)))
    engine.dedup()
    for _ in range(4):
        engine.scan()
    return engine


# ---- for Python code -----------------------------------------------------------------------------


def test_read_all(tmp_path):
    path = tmp_path / "file"
    for content in (b"", b"some", os.urandom(100_000)):
        path.write_bytes(content)
        assert files.read_all(path) == files.read_all(str(path)) == content


@pytest.mark.parametrize("read", [files.read_all, files.open_read])
def test_a_file_that_is_not_there(tmp_path, read):
    before = len(descriptors())
    with pytest.raises(FileNotFoundError) as caught:
        read(tmp_path / "none")
    assert caught.value.errno == errno.ENOENT
    assert caught.value.filename == str(tmp_path / "none")
    with pytest.raises(IsADirectoryError):
        files.read_all(tmp_path)
    assert len(descriptors()) == before


def test_what_is_open_is_neither_inherited_by_programs_nor_by_children():
    fd = files.open_read("/proc/self/maps")
    try:
        assert not os.get_inheritable(fd)
        assert in_child(lambda: assert_closed(fd)) == 0
        assert os.read(fd, 10)
    finally:
        files.close(fd)
    with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
        os.fstat(fd)


def test_a_number_that_became_anothers_is_left_alone(tmp_path):
    """By close, and by the child."""
    fd = files.open_read("/proc/self/maps")
    os.close(fd)
    with open(tmp_path / "mine", "wb+") as mine:
        other = mine.fileno()
        if other != fd:
            os.dup2(other, fd)
        assert in_child(lambda: os.fstat(fd)) == 0
        files.close(fd)
        assert os.fstat(fd).st_ino == os.fstat(other).st_ino
        if other != fd:
            os.close(fd)


def test_numbers_of_standard_streams_are_left_to_the_program():
    """Whatever is opened while one is closed: the program puts a file there, and that must stay."""
    done = run_python(
        """
        import os
        import ksmcore
        from ksmcore._kernel import files
        os.close(0)
        fd = files.open_read("/proc/self/maps")
        assert fd > 2
        ksmcore.dedup(ksmcore.zeros(1 << 20, "u1"), ksmcore.zeros(1 << 20, "u1"))
        assert os.readlink("/proc/self/fd/0") == "/dev/null"
        os.dup2(fd, 0)
        files.close(fd)
        assert os.read(0, 5)
        """
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_what_python_code_opens_can_be_kept():
    one, other = socket.socketpair()
    with one, other:
        files.keep(one.fileno())
        fd = one.fileno()
        assert in_child(lambda: assert_closed(fd)) == 0
        assert in_child(lambda: os.fstat(other.fileno())) == 0
        files.close(one.detach())
        assert other.recv(1) == b""


def test_more_than_there_is_place_for_at_first():
    kept = [files.open_read("/dev/null") for _ in range(1000)]
    try:

        def work() -> None:
            for fd in kept:
                with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
                    os.fstat(fd)
            # And the list can be used again.
            fd = files.open_read("/dev/null")
            assert in_child(lambda: assert_closed(fd)) == 0

        assert in_child(work) == 0
    finally:
        for fd in kept:
            files.close(fd)


# ---- children ------------------------------------------------------------------------------------


def c_fork() -> int:
    return ctypes.CDLL(None).fork()


@pytest.mark.parametrize("how", [fork, c_fork], ids=["Python", "C"])
def test_a_child_has_no_descriptor_of_ours(how):
    engine = at_work()
    assert any("memfd:ksmcore-store" in name for name in ours())
    # Leases of forks that were before may go at any time.
    before = [name for name in ours() if "lease" not in name]
    pid = how()
    if pid == 0:
        finish(lambda: assert_none())
    assert exit_code(pid) == 0
    assert [name for name in ours() if "lease" not in name] == before
    engine.scan()
    assert [name for name in ours() if "lease" not in name] == before
    engine.close()


def assert_none() -> None:
    assert ours() == []


@pytest.mark.parametrize("guard", [name for name in GUARDS if ksmcore.features()[name] is None])
def test_nor_when_it_is_forked_in_the_midst_of_a_pass(guard):
    """Then the guard has some too."""
    with ksmcore.Engine(guard=guard) as engine:
        large = [engine.array(random_pages(seed, 6000)) for seed in (1, 1)]
        codes = []

        def progress(done: int, total: int) -> None:
            if 0 < done < total:
                codes.append(in_child(assert_none))

        engine.dedup(progress=progress)
        assert codes
        assert set(codes) == {0}
        assert np.array_equal(*large)


def test_generations_add_up_to_nothing():
    def work(generation: int) -> None:
        assert_none()
        engine = at_work()
        n = len(ours())
        if generation < 5:
            assert in_child(lambda: work(generation + 1)) == 0
        engine.scan()
        assert len(ours()) == n

    engine = at_work()
    assert in_child(lambda: work(0)) == 0
    engine.close()


def test_what_a_child_does_with_numbers_that_were_ours(tmp_path):
    """It has other files there by then, and its copy of the parent's engine goes; they stay."""
    engine = at_work()

    def work() -> None:
        opened = [(tmp_path / str(n)).open("wb+") for n in range(30)]
        own = engine.array(random_pages(5, 8))
        engine.dedup()
        engine.close()
        for file in opened:
            os.fstat(file.fileno())
            file.write(b"mine")
            file.close()
        assert own.size == 8 * PAGE

    assert in_child(work) == 0
    engine.close()


def test_whatever_is_just_being_opened():
    """Threads open and close without pause, in Python and without the GIL, while the process forks.
    A child that is born in between has nothing."""
    engine = at_work()
    stop = threading.Event()
    failures: list[BaseException] = []

    def keep_doing(what) -> None:
        try:
            while not stop.is_set():
                what()
        except BaseException as error:
            failures.append(error)

    def make_and_close() -> None:
        with ksmcore.Engine() as young:
            arrays = [young.array(random_pages(7, 4)) for _ in range(2)]
            young.dedup(*arrays)

    acts = [engine.scan, ksmcore.features, lambda: smaps.vmas_in(0, 1 << 64), make_and_close]
    threads = [threading.Thread(target=keep_doing, args=(act,)) for act in acts]
    for thread in threads:
        thread.start()
    try:
        codes = [in_child(assert_none) for _ in range(60)]
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert failures == []
    assert set(codes) == {0}
    engine.close()


def test_programs_that_are_run_have_none():
    engine = at_work()
    listed = subprocess.run(
        [
            sys.executable,
            "-c",
            "import os; print([os.readlink(f'/proc/self/fd/{n}') for n in "
            "os.listdir('/proc/self/fd') if os.path.islink(f'/proc/self/fd/{n}')])",
        ],
        capture_output=True,
        text=True,
        check=True,
        close_fds=False,
    ).stdout
    assert not any(part in listed for part in ("ksmcore-", "userfaultfd", "pagemap"))
    engine.close()


def test_a_lease_that_cannot_be_made_is_shared_with_the_last_one():
    """Without descriptors, a fork still can be told to be over."""
    engine = at_work()
    with Child(lambda pause: pause()) as first:
        first.paused()
        faults.inject("memfd_create", errno.EMFILE, count=10**6)
        with Child(lambda pause: pause()) as second:
            second.paused()
            faults.clear()
            engine.scan()
            assert engine.stats().store_pages_frozen > 0
            first.end()
            engine.scan()
            assert engine.stats().store_pages_frozen > 0
            second.end()
    engine.scan()
    assert engine.stats().store_pages_frozen == 0
    engine.close()


def test_leases_go_with_the_last_store():
    engine = at_work()
    with Child(lambda pause: pause()) as child:
        child.paused()
        assert descriptors("ksmcore-lease")
        engine.close()
        del engine.kept, engine
        # Other engines of other tests may have a store still; without any there is no lease.
        if not descriptors("ksmcore-store"):
            assert not descriptors("ksmcore-lease")
        child.end()


def test_the_store_cannot_be_reached_by_its_own_mappings_either():
    """What a child inherits of a store it can read; it can stretch the mapping over the rest of its
    file, but nothing that was merged after the fork ever comes there."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mremap.restype = ctypes.c_void_p
    libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int]
    engine = ksmcore.Engine()
    a, b = (engine.array(random_pages(1, 16)) for _ in range(2))
    engine.dedup()
    secret = bytes(range(1, 200))

    def work(pause) -> None:
        addr = a.ctypes.data
        pause()
        # SIGBUS beyond the end of a file would end this process.
        n_bytes = 16 << 20
        got = libc.mremap(addr, PAGE, n_bytes, 1)
        assert got not in (None, ctypes.c_void_p(-1).value)
        assert secret not in ctypes.string_at(got, n_bytes)

    with Child(work) as child:
        child.paused()
        made = [engine.zeros(64 * PAGE, np.uint8) for _ in range(2)]
        for array in made:
            array.reshape(64, PAGE)[:, :199] = np.frombuffer(secret, np.uint8)
            array.reshape(64, PAGE)[:, 300] = np.arange(64)
        assert engine.dedup().pages_merged == 128
        child.end()
    assert np.array_equal(*made)
    assert np.array_equal(a, b)
    engine.close()


def test_views_are_for_this_process_alone():
    """Neither children nor core files get them."""
    with contextlib.closing(at_work()):
        mapped = [
            vma for vma in smaps.Snapshot().vmas_in(0, 1 << 64) if "ksmcore-store" in vma.path
        ]
        views = [vma for vma in mapped if not vma.writable]
        assert views
        assert not any(vma.shared for vma in mapped)
        for vma in views:
            assert vma.flags >= {"dc", "dd"}
            assert "lo" not in vma.flags

        def work() -> None:
            inherited = smaps.Snapshot().vmas_in(0, 1 << 64)
            found = [vma for vma in inherited if "ksmcore-store" in vma.path]
            assert found
            assert all(vma.writable for vma in found)

        assert in_child(work) == 0


def test_fcntl_flags_of_all_that_is_kept():
    with contextlib.closing(at_work()):
        for fd, name in descriptors().items():
            if any(part in name for part in OURS):
                assert fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC, name
