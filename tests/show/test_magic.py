"""`%%ksmcore`, in a shell of IPython without a terminal."""

import pytest

from helpers.processes import run_python

pytest.importorskip("IPython")

BEGIN = """
import sys
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance(history_length=0)
shell.history_manager.enabled = False
shell.run_line_magic("load_ext", "ksmcore")
"""


def run(tmp_path, program):
    done = run_python(BEGIN, program, flags=(), IPYTHONDIR=str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_a_cell_and_what_it_saved(tmp_path):
    told = run(
        tmp_path,
        '''
        cell = """
        import numpy as np
        base = np.random.default_rng(1).random(1 << 17)
        models = [base.copy() for _ in range(5)]
        len(models)
        """
        shell.run_cell("%%ksmcore" + cell.replace("        ", ""))
        shell.run_cell("outside = np.ones(1 << 17)")
        names = shell.user_ns
        assert (names["models"][3] == names["base"]).all()
        import ksmcore
        assert ksmcore.stats().regions > 0
        shell.run_cell("%%ksmcore -t 1G\\nmore = [base.copy() for _ in range(5)]")
    ''',
    )
    assert "]: 5\n" in told
    assert "PassReport: 5.0 MiB saved" in told
    assert "PassReport: 0 B saved" in told


def test_a_cell_that_raises_shows_that_only(tmp_path):
    told = run(tmp_path, 'shell.run_cell("%%ksmcore\\n1 / 0")')
    assert "ZeroDivisionError" in told
    assert "PassReport" not in told


def test_a_wrong_size_is_told(tmp_path):
    done = run_python(
        BEGIN, 'shell.run_cell("%%ksmcore -t much\\nx = 1")', flags=(), IPYTHONDIR=str(tmp_path)
    )
    assert "UsageError: --threshold much" in done.stdout + done.stderr
