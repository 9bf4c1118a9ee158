"""The examples at small size: each checks its bytes, saves memory, and says where it does not."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NEEDS = {
    "replay_buffer": "gymnasium",
    "model_variants": "sklearn",
    "undo_history": "numpy",
    "pandas_copies": "pandas",
}
pytestmark = pytest.mark.skipif(not EXAMPLES.exists(), reason="only in the repository")


def run(name, *args, **env):
    pytest.importorskip(NEEDS[name])
    return subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py", *args],
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", **env},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_none_is_left_out():
    found = {path.stem for path in EXAMPLES.glob("*.py")}
    assert found == {*NEEDS, "common"}
    readme = (EXAMPLES / "README.md").read_text()
    assert all(f"({name}.py)" in readme for name in NEEDS)


@pytest.mark.parametrize("name", NEEDS)
def test_it_saves_and_says_where_it_does_not(name):
    done = run(name, "--size", "small")
    assert done.returncode == 0, done.stderr
    pattern = r"^Memory +PSS before ([\d,.]+) MiB, after ([\d,.]+) MiB: saved ([\d,.]+) MiB"
    saved = re.search(pattern, done.stdout, re.M)
    assert saved is not None, done.stdout
    before, after, fell = (float(number.replace(",", "")) for number in saved.groups())
    assert fell == pytest.approx(before - after, abs=0.2)
    assert fell > 5
    assert len(re.findall(r"^Not so ", done.stdout, re.M)) >= 2
    assert re.search(r"^Check ", done.stdout, re.M)


@pytest.mark.parametrize("name", ["undo_history", "pandas_copies"])
def test_where_nothing_is_saved_it_fails(name):
    done = run(name, "--size", "small", KSMCORE_DISABLE="1")
    assert done.returncode == 1
    assert "WRONG: only " in done.stderr
