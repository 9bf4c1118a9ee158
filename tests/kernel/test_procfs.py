"""The kernel's small files, read here and from invented text: names and sizes, single values, and
how much more memory there is."""

import builtins
import ctypes
import os
import signal

import numpy as np
import pytest

from helpers.files import write_files
from helpers.libc import libc, why_failed
from helpers.memory import PAGE, random_pages
from helpers.processes import run_python
from ksmcore._kernel import procfs

MIB = 1 << 20


STATUS = b"Name:\tpython: a b\nVmSize:\t  132 kB\nThreads:\t1\nno colon\nVmLck:\t 8 kB\nOdd: 7 qB\n"


# ---- names and values ----------------------------------------------------------------------------


def test_names_and_values_of_lines(tmp_path):
    (tmp_path / "status").write_bytes(STATUS)
    found = procfs.words(tmp_path / "status")
    assert list(found) == ["Name", "VmSize", "Threads", "VmLck", "Odd"]
    assert (found["Name"], found["Threads"]) == ("python: a b", "1")
    assert list(procfs.sizes(STATUS.decode().split("\n"))) == [
        ("VmSize", 132 << 10),
        ("VmLck", 8 << 10),
    ]
    assert procfs.words(tmp_path / "none") == {}


@pytest.mark.parametrize("value", [None, "", "12", "kB", "-1 kB", "0x10 kB", "1 2 kB"])
def test_what_is_no_size(value):
    assert procfs.size_bytes(value) is None


@pytest.mark.parametrize(
    ("text", "expected"), [(b"42\n", 42), (b"max\n", None), (b"", None), (b"\xb2\xff\n", None)]
)
def test_a_file_of_one_number(tmp_path, text, expected):
    (tmp_path / "value").write_bytes(text)
    assert procfs.number(tmp_path / "value") == expected
    assert procfs.number(tmp_path / "none") is None


def test_max_map_count_is_the_sysctl():
    try:
        with open("/proc/sys/vm/max_map_count", encoding="ascii") as sysctl:
            expected = int(sysctl.read())
    except OSError as error:
        pytest.skip(f"the sysctl is hidden here: {error}")
    assert procfs.max_map_count() == expected


@pytest.mark.parametrize("problem", ["missing", "nonsense"])
def test_max_map_count_has_a_default(monkeypatch, problem):
    def broken(path):
        if problem == "missing":
            raise PermissionError(13, "Permission denied")
        return "many\n"

    monkeypatch.setattr(procfs, "read", broken)
    assert procfs.max_map_count() == 65_530


def test_locked_bytes_follows_mlock(three_mappings):
    before = procfs.locked_bytes()
    if before is None:
        pytest.skip("this kernel does not print VmLck")
    page = ctypes.c_void_p(three_mappings), ctypes.c_size_t(PAGE)
    if libc.mlock(*page) != 0:
        pytest.skip(why_failed("mlock"))
    during = procfs.locked_bytes()
    assert libc.munlock(*page) == 0
    assert during == before + PAGE
    assert procfs.locked_bytes() == before


def test_locked_bytes_of_a_status_without_that_line(monkeypatch):
    monkeypatch.setattr(procfs, "read", lambda path: "Name:\tpython\n")
    assert procfs.locked_bytes() is None


# ---- headroom ------------------------------------------------------------------------------------


@pytest.fixture
def machine(tmp_path):
    """Writes files below a directory, and asks for the headroom that they tell of."""

    def ask(files: dict[str, str]) -> int:
        write_files(tmp_path, files)
        return procfs.available_bytes(
            tmp_path / "meminfo", tmp_path / "membership", tmp_path / "cgroup"
        )

    return ask


def test_of_the_machine(machine):
    text = "MemTotal: 99999 kB\nMemAvailable: 102400 kB\nSwapFree: 1024 kB\nHugePages_Total: 0\n"
    assert machine({"meminfo": text}) == 101 * MIB - procfs.RESERVE_BYTES


def test_nothing_known_does_not_limit(machine):
    assert machine({}) > 1 << 60


def test_a_control_group_of_version_2(machine):
    files = {
        "meminfo": "MemAvailable: 1024000 kB\n",
        "membership": "0::/a/b\n",
        "cgroup/a/b/memory.max": "max\n",
        "cgroup/a/b/memory.current": "5\n",
        "cgroup/a/memory.max": f"{100 * MIB}\n",
        "cgroup/a/memory.current": f"{70 * MIB}\n",
        "cgroup/a/memory.stat": f"anon 1\ninactive_file {10 * MIB}\n",
    }
    assert machine(files) == 40 * MIB - procfs.RESERVE_BYTES


def test_a_control_group_of_version_1(machine):
    files = {
        "membership": "4:cpu,cpuacct:/x\n3:memory:/job\n",
        "cgroup/memory/job/memory.limit_in_bytes": f"{64 * MIB}\n",
        "cgroup/memory/job/memory.usage_in_bytes": f"{24 * MIB}\n",
    }
    assert machine(files) == 40 * MIB - procfs.RESERVE_BYTES


def test_it_is_never_negative(machine):
    assert machine({"meminfo": "MemAvailable: 4 kB\n"}) == 0


def test_without_what_an_ending_interpreter_takes_away(monkeypatch):
    monkeypatch.delattr(builtins, "open")
    assert 0 < procfs.available_bytes() < 1 << 62


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may chroot")
def test_in_a_chroot_without_a_standard_library(tmp_path):
    files = {
        "proc/meminfo": "MemAvailable: 102400 kB\n",
        "proc/self/cgroup": "0::/a\n",
        "sys/fs/cgroup/a/memory.max": f"{90 * MIB}\n",
        "sys/fs/cgroup/a/memory.current": f"{20 * MIB}\n",
        "proc/self/status": "VmLck: 8 kB\n",
        "proc/sys/vm/max_map_count": "70000\n",
    }
    write_files(tmp_path, files)
    done = run_python(f"""
        import os
        from ksmcore._kernel import procfs
        os.chroot({str(tmp_path)!r})
        os.chdir("/")
        print(procfs.available_bytes(), procfs.locked_bytes(), procfs.max_map_count())
    """)
    assert done.stderr == ""
    assert done.stdout == f"{70 * MIB - procfs.RESERVE_BYTES} 8192 70000\n"


def test_here_it_is_something():
    assert 0 < procfs.available_bytes() < 1 << 62


def test_unregister_is_refused_when_there_is_not_enough(engine, rng, monkeypatch):
    source = random_pages(rng, 64)
    a, b = engine.array(source), engine.array(source)
    buffer = bytearray(source.tobytes() + bytes(PAGE))
    region = engine.register(buffer)
    engine.dedup()
    before = engine.stats()
    monkeypatch.setattr(procfs, "available_bytes", lambda: 10 * PAGE)
    with pytest.raises(MemoryError, match="unmerge"):
        engine.unregister(a)
    after = engine.stats()
    assert (after.regions, after.pages_sharing) == (3, before.pages_sharing)
    # Pages that are not merged need nothing.
    a[::PAGE] += 1
    engine.scan()
    engine.unregister(a)
    assert np.array_equal(b, source)
    monkeypatch.undo()
    region.close()
    assert engine.stats().regions == 1


def test_where_no_threads_are_told_it_is_not_known_who_blocks_a_signal(tmp_path):
    """As without descriptors. That is no error: whoever asks goes on."""
    assert procfs.threads_blocking(signal.SIGSEGV, tmp_path / "task") is None
