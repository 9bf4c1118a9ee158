"""Functions of the C library are redirected for all objects, those loaded later as well, and put back."""

import ctypes
import os
import shutil
import threading

import pytest

import ksmcore
from helpers.forks import THREADS_RUN, in_child
from helpers.native import compiled
from helpers.processes import run_python
from helpers.stress import LONG
from helpers.waiting import wait_until
from ksmcore._hooks import calls as hooked
from ksmcore._testing import calls

HOOK = hooked.hook("read")


def by_symbol(name="read"):
    """Where dlsym finds it."""
    return ctypes.cast(getattr(ctypes.CDLL(None), name), ctypes.c_void_p).value


def entry(library):
    library.native_entry.restype = ctypes.c_size_t
    return library.native_entry()


def close(library):
    ctypes.CDLL(None).dlclose(ctypes.c_void_p(library._handle))


@pytest.fixture
def another(native_path, tmp_path):
    """Maker of libraries that are loaded now, and were not before."""

    def make():
        path = shutil.copy(native_path, tmp_path / f"another{len(os.listdir(tmp_path))}.so")
        return ctypes.CDLL(str(path))

    return make


@pytest.fixture
def below():
    """What is called where nothing is redirected. No other test's engine is still open."""
    assert hooked.counts()["users"] == 0
    return by_symbol()


def test_what_is_loaded_is_redirected_and_put_back(native, below):
    assert entry(native) == below != HOOK
    calls.begin()
    assert entry(native) == by_symbol() == HOOK
    calls.end()
    assert entry(native) == by_symbol() == below


def test_what_is_loaded_later_is_redirected_and_put_back(another, below):
    calls.begin()
    later = another()
    # Without a look.
    assert entry(later) == HOOK
    calls.look()
    assert entry(later) == HOOK
    calls.end()
    assert entry(later) == below
    close(later)


def test_counted(native, below):
    calls.begin()
    calls.begin(True)
    calls.end()
    assert entry(native) == HOOK
    calls.end(True)
    assert entry(native) == below


def test_what_is_unloaded_meanwhile_is_forgotten(another, below):
    first = another()
    calls.begin()
    second = another()
    close(first)
    calls.look()
    close(second)
    calls.end()
    calls.begin()
    calls.end()
    assert by_symbol() == below


def test_all_is_there_and_nothing_was_refused(below):
    calls.begin()
    counts = hooked.counts()
    calls.end()
    assert counts["entries"] > 10
    assert counts["objects"] > 5
    assert counts["refused"] == counts["unready"] == 0
    after = hooked.counts()
    assert (after["entries"], after["symbols"]) == (counts["entries"], counts["symbols"])


def test_tables_that_were_read_only_are_so_again(native, below):
    def writable():
        with open("/proc/self/maps") as maps:
            return {line.split()[0] for line in maps if ".so" in line and line.split()[1][1] == "w"}

    before = writable()
    calls.begin()
    assert writable() == before
    calls.end()
    assert writable() == before


def test_a_call_works_throughout(native, tmp_path):
    (tmp_path / "file").write_bytes(b"x" * 1000)
    fd = os.open(tmp_path / "file", os.O_RDONLY)
    stopped = threading.Event()
    n_right = [0, 0]
    wrong = []

    def work(which):
        buffer = ctypes.create_string_buffer(100)
        function = (native.native_read, native.native_read_by_table)[which]
        while not stopped.is_set():
            os.lseek(fd, 0, os.SEEK_SET)
            if function(fd, buffer, ctypes.c_size_t(1)) != 1:
                wrong.append(ctypes.get_errno())
            n_right[which] += 1

    threads = [threading.Thread(target=work, args=(which,)) for which in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(1000 if LONG else 50):
        calls.begin()
        calls.end()
    wait_until(lambda: min(n_right) > 100)
    stopped.set()
    for thread in threads:
        thread.join()
    os.close(fd)
    assert wrong == []


@pytest.mark.filterwarnings(THREADS_RUN)
def test_threads_that_load_and_redirect_and_fork(another, below):
    """All at a time: nobody hangs, and in the end all is as it was."""
    failed = []

    def many(work):
        def run():
            try:
                for _ in range(300 if LONG else 15):
                    work()
            except BaseException as error:
                failed.append(error)

        return threading.Thread(target=run)

    def redirect():
        calls.begin(True)
        calls.look()
        calls.end(True)

    def load():
        close(another())

    def fork():
        assert in_child(redirect) == 0

    threads = [many(work) for work in (redirect, redirect, load, load, fork)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert hooked.counts()["users"] == 0
    assert by_symbol() == below


def test_a_child_may_put_back(native, below):
    calls.begin()
    try:
        assert in_child(lambda: _child_puts_back(native, below)) == 0
        assert entry(native) == HOOK
    finally:
        calls.end()


def _child_puts_back(native, below):
    assert entry(native) == HOOK
    calls.end()
    assert entry(native) == below


SHIM = """
#include <stddef.h>
#include <sys/syscall.h>
#include <unistd.h>
int n_reads;
ssize_t read(int fd, void *to, size_t n) { n_reads++; return syscall(SYS_read, fd, to, n); }
"""

INTERPOSED = """
    import ctypes, os
    from ksmcore._testing import calls
    shim = ctypes.CDLL(os.environ["LD_PRELOAD"])
    n_reads = ctypes.c_int.in_dll(shim, "n_reads")
    calls.begin()
    before = n_reads.value
    fd = os.open("/proc/self/stat", os.O_RDONLY)
    assert len(os.read(fd, 10)) == 10
    assert n_reads.value == before + 1
    assert len(os.pread(fd, 10, 0)) == 10
    calls.end()
    assert len(os.read(fd, 10)) == 10
    assert n_reads.value == before + 2
"""


def test_another_librarys_function_of_that_name_stays(tmp_path):
    (tmp_path / "shim.c").write_text(SHIM)
    shim = compiled(tmp_path, [tmp_path / "shim.c"])
    done = run_python(INTERPOSED, flags=(), LD_PRELOAD=str(shim))
    assert done.returncode == 0, done.stderr


# ---- an engine's part ----------------------------------------------------------------------------


def weak_engine(**settings):
    return ksmcore.Engine(guard="mprotect", **settings)


def test_an_engine_has_calls_told_of_while_it_is_open(below):
    with weak_engine():
        assert by_symbol() == HOOK
    assert by_symbol() == below


def test_one_that_is_collected_puts_back_too(below):
    engine = weak_engine()
    assert by_symbol() == HOOK
    del engine
    assert by_symbol() == below


def test_one_setting_turns_it_off(below):
    with weak_engine(hold_calls=False):
        assert by_symbol() == below


def test_where_the_kernel_makes_calls_wait_nothing_is_redirected(below):
    if ksmcore.features()["userfaultfd"] is not None:
        pytest.skip("the guard userfaultfd is not to be had")
    with ksmcore.Engine(guard="userfaultfd"):
        assert by_symbol() == below


def test_nothing_is_redirected_where_ksmcore_is_turned_off(below, monkeypatch):
    monkeypatch.setenv("KSMCORE_DISABLE", "1")
    with weak_engine():
        assert by_symbol() == below
