"""`ksmcore run --children`: whatever Python a program starts is under ksmcore too."""

import json
import os

import pytest

from helpers.cli import ksmcore, python, write

# What each child does: equal arrays, and a wait until they are merged.
WORK = """
    import sys, time

    def work(_=None):
        import numpy as np
        import ksmcore
        base = np.random.default_rng(1).random(100_000)
        arrays = [base.copy() for _ in range(6)]
        deadline = time.monotonic() + 60
        while ksmcore.stats().bytes_saved < 5 * base.nbytes - 100_000:
            assert time.monotonic() < deadline, ksmcore.stats()
            time.sleep(0.01)
        # Now, not a second later: it may be killed by then.
        from ksmcore.cli import child
        if child._reporter is not None:
            child._reporter._write()
        return True
"""
LEAST_BYTES = 5 * 800_000 - 100_000


def environment(tmp_path, **more):
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, **more}


def run_children(tmp_path, program, *options, **keywords):
    """What it wrote to stderr, and the numbers of the children."""
    write(tmp_path, WORK, "work.py")
    script = write(tmp_path, program)
    file = tmp_path / "numbers.json"
    done = ksmcore("run", *options, "--json", file, script, **keywords)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
    return done.stderr, json.loads(file.read_text())["children"]


def saved(children):
    return [child["peak_bytes_saved"] for child in children]


@pytest.mark.parametrize("method", ["spawn", "forkserver", "fork"])
def test_workers_of_multiprocessing(tmp_path, method):
    """A pool kills them in the end."""
    text, children = run_children(
        tmp_path,
        f"""
        import multiprocessing
        from work import work

        if __name__ == "__main__":
            import numpy
            context = multiprocessing.get_context({method!r})
            with context.Pool(2) as pool:
                assert pool.map(work, range(2), chunksize=1) == [True, True]
            print("done")
        """,
        "--children",
    )
    workers = [n for n in saved(children) if n > 0]
    assert workers
    assert min(workers) >= LEAST_BYTES
    assert f"Children {len(children)} process" in text
    assert "Warning" not in text


def test_other_programs_and_what_they_start(tmp_path):
    """The environment variable does as the option; the last numbers of each are told."""
    text, children = run_children(
        tmp_path,
        """
        import subprocess, sys
        code = "from work import work; work()"
        again = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}])"
        subprocess.run([sys.executable, "-c", again], check=True)
        print("done")
        """,
        env=environment(tmp_path, KSMCORE_CHILDREN="1"),
    )
    assert [n >= LEAST_BYTES for n in saved(children)] == [True]
    assert children[0]["command"][1] == "-c"
    # From Python 3.15 on the interpreter has large blocks of its own.
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert numbers["peak_bytes_saved"] < 1 << 20
    assert numbers["peak_bytes_saved"] > 0 or "Nothing was saved in this process" in text
    again = ksmcore("report", tmp_path / "numbers.json")
    assert "Children 1 process; " in again.stdout


def test_a_sitecustomize_that_was_there_is_imported_as_ever(tmp_path):
    write(tmp_path, "import sys; sys.own = __name__, __file__", "sitecustomize.py")
    _, children = run_children(
        tmp_path,
        """
        import subprocess, sys
        code = (
            "import os, sys, sitecustomize\\n"
            "assert sys.own == ('sitecustomize', sitecustomize.__file__)\\n"
            "assert sitecustomize.__file__.startswith(os.environ['PYTHONPATH'].split(':')[1])\\n"
            "assert not any('ksmcore/cli' in path for path in sys.path)\\n"
            "assert 'ksmcore' not in sys.modules and 'json' in sys.modules\\n"
        )
        subprocess.run([sys.executable, "-c", code], check=True)
        print("done")
        """,
        "--children",
        env=environment(tmp_path),
    )
    assert children == []


def test_a_python_that_has_no_ksmcore_runs_as_ever_and_that_is_told(tmp_path):
    text, children = run_children(
        tmp_path,
        """
        import subprocess, sys
        code = "import sys; sys.modules['ksmcore'] = None; import numpy"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True)
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
        print("done")
        """,
        "--children",
    )
    assert [list(child) for child in children] == [["failed"]]
    assert "1 process without: ModuleNotFoundError" in text


def test_without_it_nothing_changes(tmp_path):
    done = ksmcore(
        "run",
        "--quiet",
        "-c",
        "import os; print([n for n in os.environ if 'KSMCORE_RUN' in n])",
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")
    plain = python(
        "-c", "import ksmcore.cli.startup.sitecustomize; import sys; print(sys.meta_path)"
    )
    assert b"Watcher" not in plain.stdout


def test_nothing_is_left_behind(tmp_path):
    environ = environment(tmp_path, TMPDIR=str(tmp_path))
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import numpy'])"
    done = ksmcore("run", "--children", "-c", code, env=environ)
    assert done.returncode == 0
    assert "Children 1 process;" in done.stderr
    assert list(tmp_path.glob("ksmcore-children-*")) == []
