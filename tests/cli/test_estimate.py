"""`ksmcore estimate`: what could be saved, of a program that is run while nothing is merged."""

import json
import os

import pytest

import ksmcore as library
from helpers.cli import ksmcore, write

REACHES_ALL = pytest.mark.skipif(
    library.features()["memory"] is not None, reason="malloc cannot be redirected here"
)

PROGRAM = """
    import gc, sys, time
    import numpy as np
    import ksmcore
    from ksmcore.cli.estimate import Looks
    [looks] = [one for one in gc.get_objects() if isinstance(one, Looks)]
    base = np.random.default_rng(1).random(100_000)
    models = [base.copy() for _ in range(12)]
    # The look that is being made may have begun before.
    seen = looks.n_looks
    while looks.n_looks < seen + 2:
        time.sleep(0.01)
    del models
    stats = ksmcore.stats()
    print(stats.pages_merged, ksmcore.default_engine().scanning, stats.full_scans)
    kept = [base.copy() for _ in range(3)]
    sys.exit(4)
"""
COPY_BYTES = 800_000


def test_the_best_moment_and_the_end(tmp_path):
    write(tmp_path, PROGRAM)
    done = ksmcore("estimate", "--json", "out.json", "program.py", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (4, "0 False 0\n")
    assert done.stderr.startswith("ksmcore: ")
    assert "could be saved at the best moment" in done.stderr
    assert "nothing was merged" in done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    # Of each copy some bytes at both ends may lie on pages that no other has.
    assert 11.5 * COPY_BYTES < found["best"]["bytes_saved"] < 14 * COPY_BYTES
    # What was freed may not have gone back to the system yet.
    assert 2.5 * COPY_BYTES < found["end"]["bytes_saved"] <= found["best"]["bytes_saved"]
    assert 0 < found["best"]["seconds"] < found["end"]["seconds"]
    assert found["looks"] >= 2
    assert found["exit_status"] == 4


def test_nothing_to_save(tmp_path):
    write(tmp_path, "print('output')")
    done = ksmcore("estimate", "--memory", "numpy", "program.py", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "output\n")
    assert "no NumPy array of 64.0 KiB or more was seen" in done.stderr
    write(tmp_path, "import numpy; kept = numpy.random.default_rng(1).random(100_000)")
    done = ksmcore("estimate", "--memory", "numpy", "program.py", cwd=tmp_path)
    assert "no two pages of its arrays held the same bytes" in done.stderr


def test_tracebacks_modules_and_arguments(tmp_path):
    write(tmp_path, "import sys; print(sys.argv[1:], __name__); 1/0", "module.py")
    done = ksmcore("estimate", "-m", "module", "--json", "x", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "['--json', 'x'] __main__\n")
    assert done.stderr.startswith("Traceback (most recent call last):\n  File ")
    assert "ksmcore/" not in done.stderr
    assert "runpy" not in done.stderr


def test_no_such_program(tmp_path):
    done = ksmcore("estimate", "nothing.py", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("ksmcore estimate: can't open file ")
    assert done.stderr.count("\n") == 1


def test_a_report_that_cannot_be_written_any_more(tmp_path):
    (tmp_path / "gone").mkdir()
    write(tmp_path, "import os; os.rmdir('gone'); raise SystemExit(3)")
    done = ksmcore("estimate", "--json", "gone/out.json", "program.py", cwd=tmp_path)
    assert done.returncode == 3
    assert "ksmcore: gone/out.json was not written: " in done.stderr


@pytest.mark.parametrize(
    ("script", "environ", "why"),
    [
        ("print()", {}, "no NumPy array of 64.0 KiB or more was seen (1 look)"),
        pytest.param(
            "print()", {}, "no block of memory of 1.0 GiB or more was seen", marks=REACHES_ALL
        ),
        ("import numpy; a = numpy.zeros(1 << 20)", {}, "no page of its arrays was in memory"),
        ("import numpy; a = numpy.ones(99999)", {"KSMCORE_DISABLE": "1"}, "KSMCORE_DISABLE is set"),
    ],
)
def test_why_there_is_nothing(tmp_path, script, environ, why):
    write(tmp_path, script)
    options = ("--threshold", "1G") if "block" in why else ("--memory", "numpy")
    done = ksmcore("estimate", *options, "program.py", cwd=tmp_path, env={**os.environ, **environ})
    assert done.stderr.startswith("ksmcore: nothing could be saved: ")
    assert why in done.stderr


def test_forks_while_it_looks(tmp_path):
    script = """
        import os, sys
        import numpy as np
        kept = [np.arange(2_000_000) for _ in range(6)]
        for _ in range(60):
            if os.fork() == 0:
                kept[0][:] = 1
                sys.exit(int(kept[1][3]) - 3)
            assert os.wait()[1] == 0
        print("done")
    """
    write(tmp_path, script)
    done = ksmcore("estimate", "program.py", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "done\n")
    assert done.stderr.count("ksmcore: ") == 1
