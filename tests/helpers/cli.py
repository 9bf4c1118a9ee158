"""What the tests of the command line share: running programs, with `ksmcore run` and without."""

import os
import subprocess
import sys
import textwrap
from contextlib import contextmanager

import pytest

pytest.importorskip("click")
pytest.importorskip("rich")

KSMCORE = ("-m", "ksmcore")
QUIETLY = (*KSMCORE, "run", "--quiet")


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
