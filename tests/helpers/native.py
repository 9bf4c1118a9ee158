"""C code of the tests, compiled when it is wanted."""

import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest


def compiled(directory: Path, sources: Iterable[Path]) -> Path:
    """A shared library of these C files; the test is skipped without a compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    library = directory / "compiled.so"
    flags = "-O2 -Wall -Wextra -Werror -shared -fPIC -pthread".split()
    subprocess.run([compiler, *flags, "-o", library, *sources], check=True)
    return library
