"""The pytest plugin, in runs of pytest of its own."""

import os
import subprocess
import sys

import pytest

from helpers.processes import run_python

HEAD = """
import numpy as np
import pytest

def fill(ksm, n):
    a = ksm.empty((n, 4096), np.uint8)
    a[:] = (np.arange(n) % 250)[:, None] + 1
    ksm.dedup(a, ksm.array(a))
"""


@pytest.fixture
def run(tmp_path):
    """Run a test module; gives (exit status, output)."""

    def run_module(text, *options):
        module = tmp_path / "test_it.py"
        module.write_text(HEAD + text)
        (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --strict-markers\n")
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options, str(module)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
        return done.returncode, done.stdout + done.stderr

    return run_module


def test_fixture_marker_and_summary(run):
    code, output = run("""
def test_plain():
    pass

@pytest.mark.min_saved("400 kB")
def test_enough(ksm):
    fill(ksm, 100)

@pytest.mark.min_saved("1 GiB")
def test_too_little(ksm):
    fill(ksm, 100)

def test_fresh(ksm):
    assert ksm.stats().regions == 0
    ksm.close()
""")
    assert code == 1
    assert "1 failed, 3 passed" in output
    assert "409,600 bytes saved at most, of 1,073,741,824 asked for" in output
    summary = output.split("ksmcore: memory saved")[1]
    assert "400.0 KiB  test_it.py::test_enough" in summary
    assert "400.0 KiB  test_it.py::test_too_little" in summary
    assert "test_plain" not in summary
    assert "0 B  test_it.py::test_fresh" in summary


def test_silent_and_not_imported_otherwise(run):
    code, output = run("def test_plain(): pass\n")
    assert code == 0
    assert "memory saved" not in output
    script = "import sys, ksmcore_pytest; sys.exit('numpy' in sys.modules)"
    assert run_python(script).returncode == 0


@pytest.mark.parametrize(
    ("marker", "parameter", "said"),
    [
        ('min_saved("much")', "ksm", "text like '50 MB'"),
        ("min_saved()", "ksm", "it takes one size"),
        ("min_saved()", "", "it takes one size"),
    ],
)
def test_wrong_use(run, marker, parameter, said):
    module = f"@pytest.mark.{marker}\ndef test_it({parameter}): pass\ndef test_other(): pass\n"
    code, output = run(module)
    assert code == 1
    assert "1 passed, 1 error" in output
    assert said in output
    assert "another exception" not in output


COPIES = """
def copies(n):
    base = np.random.default_rng(1).random(1 << 17)
    return [base.copy() for _ in range(n)]
"""


def test_all_tests_under_the_allocator(run):
    code, output = run(
        COPIES
        + """
import unittest

def test_plain():
    pass

def test_few():
    arrays = copies(3)

def test_many():
    arrays = copies(5)

@pytest.fixture(params=[6, 7])
def made(request):
    return copies(request.param)

def test_of_fixtures(made):
    assert (made[0] == made[1]).all()

class T(unittest.TestCase):
    def test_method(self):
        arrays = copies(9)

@pytest.mark.min_saved("20 MiB")
def test_too_little():
    arrays = copies(4)

def test_with_fixture(ksm):
    fill(ksm, 100)

def test_fails():
    arrays = copies(4)  # they live on, with the traceback
    assert False, "mine"
""",
        "--ksmcore",
    )
    assert code == 1
    assert "2 failed, 7 passed" in output
    assert "of 20,971,520 asked for" in output
    lines = output.split("ksmcore: memory saved")[1].splitlines()
    told = [line.split("test_it.py::")[-1] for line in lines if "test_it.py" in line]
    assert told[:6] == [
        "T::test_method",
        "test_of_fixtures[7]",
        "test_of_fixtures[6]",
        "test_many",
        "test_too_little",
        "test_few",
    ]
    assert "8.0 MiB  test_it.py::T::test_method" in output
    assert "400.0 KiB  test_it.py::test_with_fixture" in output
    assert "1 other saved less, or nothing" in output


def test_the_marker_alone(run):
    code, output = run(
        COPIES
        + """
@pytest.mark.min_saved("3 MB")
def test_enough():
    arrays = copies(4)

@pytest.mark.min_saved("3 MB")
def test_too_little():
    arrays = copies(2)

def test_other():
    import ksmcore
    arrays = copies(4)
    assert ksmcore.dedup().bytes_saved <= 0
"""
    )
    assert code == 1
    assert "1 failed, 2 passed" in output
    assert "1.0 MiB  test_it.py::test_too_little" in output


def test_methods_of_unittest(run):
    code, output = run("""
import unittest

class T(unittest.TestCase):
    @pytest.fixture(autouse=True)
    def _take(self, ksm):
        self.ksm = ksm

    @pytest.mark.min_saved("400 kB")
    def test_enough(self):
        fill(self.ksm, 100)

    @pytest.mark.min_saved(1e9)
    def test_too_little(self):
        fill(self.ksm, 100)

    @pytest.mark.min_saved(1e9)
    def test_wrong(self):
        self.fail("mine")

    @pytest.mark.min_saved(1e9)
    def test_skipped(self):
        self.skipTest("mine")
""")
    assert code == 1
    assert "2 failed, 1 passed, 1 skipped" in output
    assert "409,600 bytes saved at most, of 1,000,000,000 asked for" in output
    assert "AssertionError: mine" in output
    summary = output.split("ksmcore: memory saved")[1]
    assert "400.0 KiB  test_it.py::T::test_enough" in summary


def test_a_fixture_of_that_name_may_be_anothers(run):
    code, output = run("""
@pytest.fixture
def ksm():
    return "mine"

def test_it(ksm):
    assert ksm == "mine"
""")
    assert code == 0
    assert "memory saved" not in output


def test_a_failing_test_fails_for_its_own_reason(run):
    code, output = run("""
@pytest.mark.min_saved("1 GiB")
def test_it(ksm):
    raise KeyError("mine")
""")
    assert code == 1
    assert "KeyError: 'mine'" in output
    assert "asked for" not in output


@pytest.mark.parametrize("before", [["-m", "ksmcore", "run", "--quiet"], []])
def test_pytest_does_not_warn_of_what_was_imported_before_it(tmp_path, before):
    """The modules of an installed distribution with a plugin are marked for rewriting, which comes
    too late for what `ksmcore run` has imported."""
    pytest.importorskip("click")
    pytest.importorskip("rich")
    installed = tmp_path / "site/installed_ksmcore-1.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: installed-ksmcore\nVersion: 1\n"
    )
    (installed / "entry_points.txt").write_text("[pytest11]\nksmcore = ksmcore_pytest\n")
    (installed / "RECORD").write_text("ksmcore/__init__.py,,\nksmcore_pytest.py,,\n")
    (tmp_path / "test_it.py").write_text("import sys, ksmcore\ndef test(): assert 1 < 2 < 3\n")
    command = ["-m", "pytest", "-p", "no:cacheprovider", "-W", "error", "test_it.py"]
    done = subprocess.run(
        [sys.executable, *before, *command],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "1 passed" in done.stdout
    assert "warning" not in done.stdout.lower()
