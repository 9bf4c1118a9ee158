"""What the tests of the command line share: running programs, with `ksmcore run` and without."""

import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from contextlib import contextmanager

import pytest

pytest.importorskip("click")
pytest.importorskip("rich")

KSMCORE = ("-m", "ksmcore")
QUIETLY = (*KSMCORE, "run", "--quiet")


@pytest.fixture(autouse=True)
def own_directories(tmp_path, monkeypatch):
    """Sockets of these tests are beside nobody else's."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)


@pytest.fixture(autouse=True)
def interruptible():
    """Programs begin as from a terminal, also where the tests run in the background of a shell,
    which has Ctrl-C ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def python(*arguments, cwd=None, **options):
    """Run Python to its end, and catch what it writes, as bytes."""
    if "input" not in options:
        options.setdefault("stdin", subprocess.DEVNULL)
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        timeout=180,
        check=False,
        **options,
    )


def ksmcore(*arguments, **options):
    """Run the command line, and catch what it writes, as text."""
    return python(*KSMCORE, *arguments, text=True, **options)


def write(tmp_path, script, name="program.py"):
    (tmp_path / name).write_text(textwrap.dedent(script))
    return tmp_path / name


@contextmanager
def running(*arguments, **options):
    """A Python process that is killed in the end, if it has not ended."""
    with subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_until(holds, seconds=60):
    """Whatever `holds` returns, once it is true."""
    deadline = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < deadline, "it does not come to hold"
        time.sleep(0.02)
    return found


def is_alive(pid):
    return os.path.exists(f"/proc/{pid}")


# Equal arrays in a global, and a wait until they are merged.
MERGED = """
    import sys, time
    import numpy as np
    import ksmcore
    base = np.random.default_rng(1).random(100_000)
    models = [base.copy() for _ in range(12)]
    deadline = time.monotonic() + 120
    while ksmcore.stats().bytes_saved < 10 * base.nbytes or ksmcore.stats().full_scans < 2:
        assert time.monotonic() < deadline, ksmcore.stats()
        time.sleep(0.02)
"""
SAVED_BYTES = 10 * 800_000
