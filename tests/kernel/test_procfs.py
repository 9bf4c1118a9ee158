"""Headroom, read from invented files; and what unregister does when there is none."""

import numpy as np
import pytest

import ksmcore
from ksmcore._kernel import procfs

PAGE = ksmcore.Engine.page_bytes
MIB = 1 << 20


@pytest.fixture
def machine(tmp_path):
    """Writes files below a directory, and asks for the headroom that they tell of."""

    def ask(files: dict[str, str]) -> int:
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
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


def test_here_it_is_something():
    assert 0 < procfs.available_bytes() < 1 << 62


def test_unregister_is_refused_when_there_is_not_enough(engine, rng, monkeypatch):
    source = rng.integers(0, 256, 64 * PAGE, dtype=np.uint8)
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
