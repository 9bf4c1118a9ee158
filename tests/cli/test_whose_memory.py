"""Whose memory goes along with a program, and what is told of the rest."""

import json
import os
import sys
import types

import pytest

import ksmcore as library
from helpers.cli import ksmcore, write
from helpers.memory import extent, octets, private_memory
from ksmcore._engine.inventory import look_elsewhere
from ksmcore.cli import whose_memory

ALL = library.features()["memory"]
reaches_all = pytest.mark.skipif(ALL is not None, reason=str(ALL))
MIB = 1 << 20

# Memory that a library has from the kernel, half of it equal.
BESIDES = """
    import mmap
    held = [mmap.mmap(-1, 10 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) for _ in range(2)]
    for one in held:
        for i in range(10 << 8):
            one[i << 12 : i + 1 << 12] = i.to_bytes(4, "little") * 1024
"""


@pytest.mark.parametrize("command", ["run", "estimate"])
def test_equal_memory_that_is_not_reached_is_told(tmp_path, command):
    write(tmp_path, BESIDES)
    for _ in range(100):
        done = ksmcore(command, "--json", "out.json", "program.py", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        found = json.loads((tmp_path / "out.json").read_text())
        besides = found["elsewhere"]
        if besides["is_all"]:
            break  # on a busy machine the time for it may not do
    assert found["whose_memory"] == ("all" if ALL is None else "numpy")
    assert 10 * MIB <= besides["saveable_bytes"] <= besides["bytes"]
    assert "that were not reached are equal" in done.stderr
    again = ksmcore("report", "out.json", cwd=tmp_path)
    assert "that were not reached are equal" in again.stdout


def test_what_is_reached_is_not_elsewhere():
    held = [octets(private_memory(2048)) for _ in range(2)]
    for one in held:
        one[:] = 7
    without = look_elsewhere([extent(held[0])], 100.0)
    with_both = look_elsewhere([], 100.0)
    assert without.is_all
    assert with_both.is_all
    assert 7 * MIB < without.saveable_bytes < with_both.saveable_bytes - 7 * MIB


def test_no_more_time_than_it_is_given():
    found = look_elsewhere([], 0.0)
    assert (found.bytes, found.is_all) == (0, False)


def test_whatever_goes_wrong_there_is_no_matter(monkeypatch):
    def fails(*_):
        raise MemoryError

    monkeypatch.setattr(whose_memory, "look_elsewhere", fails)
    assert whose_memory.elsewhere(library.default_engine(), 1.0) is None


def test_libraries_that_go_past_malloc_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "polars", types.ModuleType("polars"))
    arrow = types.SimpleNamespace(backend_name="jemalloc")
    monkeypatch.setitem(
        sys.modules, "pyarrow", types.SimpleNamespace(default_memory_pool=lambda: arrow)
    )
    assert whose_memory.past_malloc() == ["polars", "pyarrow (jemalloc)"]
    arrow.backend_name = "system"
    assert whose_memory.past_malloc() == ["polars"]
    monkeypatch.setitem(sys.modules, "pyarrow", types.ModuleType("half"))
    assert whose_memory.past_malloc() == ["polars"]


def test_and_told(tmp_path):
    write(tmp_path, "import sys; sys.modules['polars'] = sys")
    done = ksmcore("run", "program.py", cwd=tmp_path)
    assert "memory of polars comes past malloc, and is not reached" in done.stderr


@reaches_all
@pytest.mark.parametrize("chosen", [None, "mimalloc"])
def test_pyarrow_is_told_to_use_malloc(tmp_path, chosen):
    """Where nobody has chosen; the environment that Python shows is the program's own."""
    write(
        tmp_path,
        """
        import ctypes, os
        getenv = ctypes.CDLL(None).getenv
        getenv.restype = ctypes.c_char_p
        print(os.environ.get("ARROW_DEFAULT_MEMORY_POOL"), getenv(b"ARROW_DEFAULT_MEMORY_POOL"))
        """,
    )
    environ = {key: value for key, value in os.environ.items() if not key.startswith("ARROW")}
    if chosen is not None:
        environ["ARROW_DEFAULT_MEMORY_POOL"] = chosen
    done = ksmcore("run", "--quiet", "program.py", cwd=tmp_path, env=environ)
    assert done.stdout == f"{chosen} {(chosen or 'system').encode()}\n"
    done = ksmcore("run", "--quiet", "--memory", "numpy", "program.py", cwd=tmp_path, env=environ)
    assert done.stdout == f"{chosen} {chosen and chosen.encode()}\n"


@reaches_all
def test_without_ksmcore_malloc_stays_as_it_is(tmp_path):
    write(tmp_path, "print(bytearray(1 << 20).endswith(b'x'))")
    environ = {**os.environ, "KSMCORE_DISABLE": "1"}
    done = ksmcore("run", "--json", "out.json", "program.py", cwd=tmp_path, env=environ)
    assert done.stdout == "False\n"
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["whose_memory"] == "numpy"
