"""The tests of other libraries' objects, for each that is there, in a process of its own: threads
of theirs block SIGSEGV, or they warn of forks, which is not for other tests to meet."""

import subprocess
import sys
from importlib.util import find_spec

import pytest

from helpers.processes import TESTS

LIBRARIES = ["torch", "jax", "pyarrow", "pandas", "polars", "xarray", "sklearn", "scipy"]


@pytest.mark.parametrize("library", LIBRARIES)
def test_objects_of(library):
    if find_spec(library) is None:
        pytest.skip(f"no {library}")
    files = [str(TESTS / room / "libraries.py") for room in ("gate", "engine")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", library]
    done = subprocess.run(
        [*command, *files], cwd=TESTS.parent, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout or " skipped" in done.stdout
