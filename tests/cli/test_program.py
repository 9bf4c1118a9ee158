"""A program under `ksmcore run` is the same: output, tracebacks and exit status, to the byte."""

import os
import py_compile
import re
import signal
import subprocess
import sys
import textwrap
import time
import zipfile

import pytest

from helpers.cli import QUIETLY, ksmcore, python, write

# Python warns of forks where there are threads; there are more of those under ksmcore.
FORKS_AMONG_THREADS = ("-W", "ignore::DeprecationWarning")


def both(tmp_path, script, *arguments, cwd=None, flags=(), **options):
    """A script run by Python and by ksmcore; the first, which the second must equal."""
    write(tmp_path, script)
    return compare(("program.py", *arguments), cwd=cwd or tmp_path, flags=flags, **options)


def compare(arguments, *, cwd, flags=(), **options):
    plain = python(*flags, *arguments, cwd=cwd, **options)
    ours = python(*flags, *QUIETLY, *arguments, cwd=cwd, **options)
    assert ours.stderr == plain.stderr
    assert ours.stdout == plain.stdout
    assert ours.returncode == plain.returncode
    return plain


# ---- what the program is -------------------------------------------------------------------------

WHERE_AM_I = """
    import sys
    shown = {name: value for name, value in globals().items() if name != "sys"}
    shown["__loader__"] = type(__loader__).__name__, getattr(__loader__, "name", None)
    shown["__spec__"] = __spec__ and (__spec__.name, __spec__.origin, __spec__.parent)
    shown["__builtins__"] = type(__builtins__)
    print(shown, sys.argv, sys.path, sys.modules["__main__"].__dict__ is globals())
"""


@pytest.mark.parametrize(
    ("where", "named"),
    [
        (".", "program.py"),
        (".", "./program.py"),
        ("below", "../program.py"),
        ("below", "link.py"),
    ],
)
def test_module_attributes_arguments_and_path(tmp_path, where, named):
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "link.py").symlink_to("../program.py")
    write(tmp_path, WHERE_AM_I)
    # Options that ksmcore has too, and others that it has not.
    arguments = (named, "--json", "x", "-m", "--", "-x", "")
    done = compare(arguments, cwd=tmp_path / where)
    assert b"'__name__': '__main__'" in done.stdout


def test_absolute_path(tmp_path):
    both(tmp_path, WHERE_AM_I)
    compare((tmp_path / "program.py", "1"), cwd="/")


def test_safe_path(tmp_path):
    """Where Python is told not to look beside the program, it does not."""
    both(tmp_path, WHERE_AM_I, flags=["-I"])


@pytest.fixture
def package(tmp_path):
    """A package that can be run, a module in it, and one that is no program."""
    made = tmp_path / "package"
    made.mkdir()
    (made / "__init__.py").write_text("import sys\nprint('init', sys.argv)\n")
    write(made, WHERE_AM_I, "__main__.py")
    write(made, WHERE_AM_I + "    raise KeyError('part')\n", "part.py")
    (tmp_path / "broken.py").write_text("import package.nothing\n")
    return tmp_path


def without_runpy(stderr):
    """`python -m` shows two frames of its own, up to Python 3.10 with their source."""
    frame = rb'  File "(<frozen runpy>|[^"]*runpy\.py)", line \d+, in \w+\n(    .*\n)?'
    return re.sub(frame, b"", stderr)


@pytest.mark.parametrize("name", ["package", "package.part", "package.__main__", "broken"])
def test_module(package, name):
    plain = python("-m", name, "--json", "-m", cwd=package)
    ours = python(*QUIETLY, "-m", name, "--json", "-m", cwd=package)
    assert ours.stdout.replace(b"\n", b"") == plain.stdout.replace(b"\n", b"")
    assert ours.stderr == without_runpy(plain.stderr)
    assert ours.returncode == plain.returncode


@pytest.mark.parametrize("name", ["nothing", "package.nothing", "nothing.part", "below", "a/b"])
def test_no_such_module(package, name):
    (package / "below").mkdir()
    plain = python("-m", name, cwd=package)
    ours = python(*QUIETLY, "-m", name, cwd=package)
    told = plain.stderr.removeprefix(os.fsencode(sys.executable))
    assert ours.stderr == b"ksmcore run" + told
    assert ours.returncode == plain.returncode == 1


def test_no_such_script(tmp_path):
    plain = python("nothing.py", cwd=tmp_path)
    ours = python(*QUIETLY, "nothing.py", cwd=tmp_path)
    assert ours.stderr == b"ksmcore run" + plain.stderr.removeprefix(os.fsencode(sys.executable))
    assert ours.returncode == plain.returncode == 2


def test_directory_and_archive(package):
    compare(("package", "1"), cwd=package)
    with zipfile.ZipFile(package / "archive", "w") as archive:
        archive.write(package / "package" / "__main__.py", "__main__.py")
    compare(("archive", "1"), cwd=package)
    (package / "below").mkdir()
    assert python(*QUIETLY, "below", cwd=package).returncode == 1


def test_source_in_other_encodings(tmp_path):
    (tmp_path / "latin.py").write_bytes("# coding: latin-1\nprint('é')\n".encode("latin-1"))
    compare(["latin.py"], cwd=tmp_path)
    (tmp_path / "bom.py").write_bytes("\ufeffprint('é')\r\nprint(1)\r\n".encode())
    assert compare(["bom.py"], cwd=tmp_path).returncode == 0


def test_compiled(tmp_path):
    write(tmp_path, WHERE_AM_I)
    py_compile.compile(str(tmp_path / "program.py"), cfile=str(tmp_path / "program.pyc"))
    assert compare(["program.pyc", "1"], cwd=tmp_path).returncode == 0


@pytest.mark.parametrize("command", ["run", "estimate"])
def test_from_a_pipe(tmp_path, command):
    """As a shell's <(...) has it."""
    reading, writing = os.pipe()
    os.write(writing, b"import sys; print(sys.argv, __name__)")
    os.close(writing)
    done = ksmcore(command, f"/dev/fd/{reading}", "a", pass_fds=[reading], cwd=tmp_path)
    os.close(reading)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"['/dev/fd/{reading}', 'a'] __main__\n"


@pytest.mark.parametrize("end", ["", "raise KeyError('part')", "1 +", "raise SystemExit(3)"])
def test_code(tmp_path, end):
    code = textwrap.dedent(WHERE_AM_I) + end
    # Its arguments may look like options, of ksmcore too.
    compare(("-c", code, "--json", "x", "-c", "-"), cwd=tmp_path)


def test_code_that_is_nothing_and_that_is_indented(tmp_path):
    compare(("-c", ""), cwd=tmp_path)
    compare(("-c", "  print(1)\n  print(2)"), cwd=tmp_path)


@pytest.mark.parametrize("end", ["", "raise KeyError('part')", "1 +", "raise SystemExit(3)"])
def test_from_stdin(tmp_path, end):
    source = (textwrap.dedent(WHERE_AM_I) + end).encode()
    plain = python("-", "--json", "x", cwd=tmp_path, input=source)
    ours = python(*QUIETLY, "-", "--json", "x", cwd=tmp_path, input=source)
    assert (ours.returncode, ours.stdout) == (plain.returncode, plain.stdout)
    assert ours.stderr == plain.stderr


def test_nothing_is_left_of_stdin(tmp_path):
    source = b"import sys\nprint(repr(sys.stdin.read()))\n"
    assert python(*QUIETLY, "-", cwd=tmp_path, input=source).stdout == b"''\n"
    program = "import os, sys; os.close(0); os.execv(sys.executable, sys.orig_argv[:1] + {!r})"
    done = python("-c", program.format([*QUIETLY, "-"]), cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.startswith(b"ksmcore run: the program should come from stdin")


def test_both_of_what_excludes_each_other(tmp_path):
    done = python(*QUIETLY, "-m", "-c", "print(1)", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, b"")
    assert b"-m and -c exclude each other" in done.stderr


# ---- how it ends ---------------------------------------------------------------------------------

# So that it shows if what was freed is used again.
FREED_IS_OVERWRITTEN = {**os.environ, "PYTHONMALLOC": "debug"}

ENDS = {
    "nothing": "pass",
    "status": "import sys; sys.exit(3)",
    "large status": "import sys; sys.exit(256 + 7)",
    "text": "import sys; sys.exit('text')",
    "none": "raise SystemExit",
    "other": "raise SystemExit([1, 2])",
    "os._exit": "import os; os._exit(5)",
    "error": """
        def f(x):
            return 1 / x
        f(0)
    """,
    "chain": """
        try:
            {}["a"]
        except KeyError as error:
            try:
                raise ValueError("second") from error
            except ValueError:
                raise TypeError("third")
    """,
    "notes": "raise OSError(2, 'text', 'file')",
    "recursion": "raise RecursionError('no')",
    "generator exit": "raise GeneratorExit",
    "syntax": "x = = 1",
    "null": "x = '\\0",
    "indentation": "if 1:\nx = 1",
    "other file": "exec(compile('1/0', 'nowhere.py', 'exec'))",
    "import of what fails": "import json.nothing",
    "ctrl-c": "import os, signal; print(1); os.kill(os.getpid(), signal.SIGINT)",
    "own ctrl-c": "raise KeyboardInterrupt",
    "sigterm": "import os, signal; print(1, flush=True); os.kill(os.getpid(), signal.SIGTERM)",
    "handled sigterm": """
        import os, signal, sys
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(4))
        os.kill(os.getpid(), signal.SIGTERM)
    """,
    "abort": "import os; os.abort()",
    "hook": """
        import sys
        sys.excepthook = lambda kind, error, tb: print(kind, error, tb.tb_lineno, tb is
            error.__traceback__, tb.tb_frame.f_code.co_name, sys.last_value is error)
        1/0
    """,
    "failing hook": """
        import sys
        def hook(kind, error, tb):
            raise ValueError("in the hook")
        sys.excepthook = hook
        1/0
    """,
    "leaving hook": """
        import sys
        sys.excepthook = lambda *_: sys.exit(9)
        1/0
    """,
    "handlers": """
        import atexit, sys, traceback
        atexit.register(print, "first")
        atexit.register(len)
        @atexit.register
        def last():
            print("last", sys.last_value)
            traceback.print_tb(sys.last_traceback)
        1/0
    """,
    "thread": """
        import threading, time
        def work():
            time.sleep(0.3)
            print("after the end")
            1/0
        threading.Thread(target=work, name="worker").start()
        print("end")
    """,
    "daemon thread": """
        import threading
        threading.Thread(target=threading.Event().wait, daemon=True).start()
    """,
    "warning": "import warnings; warnings.warn('text'); warnings.warn('d', DeprecationWarning)",
    "input": "print(input()); input()",
    "unflushed": "import sys; sys.stdout.write('no new line'); sys.stderr.write('none either')",
    "deleted": "import sys; del sys.modules['__main__']; 1/0",
    "no stderr": "import sys; sys.stderr = None; 1/0",
    "closed stdout": "import sys; print(1); sys.stdout.close()",
    "closed stderr": "import os; os.close(2); print(1)",
    "objects at the end": """
        class Said:
            def __del__(self):
                print("gone", __name__)
        kept = Said()
    """,
}


@pytest.mark.parametrize("end", ENDS)
def test_ends(tmp_path, end):
    both(tmp_path, ENDS[end], input=b"a line\n")


def test_the_statuses_are_what_they_should_be(tmp_path):
    """So that no two wrong ones are equal."""
    expected = {
        "status": 3,
        "text": 1,
        "error": 1,
        "ctrl-c": -signal.SIGINT,
        "sigterm": -signal.SIGTERM,
        "handled sigterm": 4,
        "os._exit": 5,
    }
    for end, status in expected.items():
        write(tmp_path, ENDS[end])
        assert python(*QUIETLY, "program.py", cwd=tmp_path).returncode == status


@pytest.mark.parametrize(
    "end", ["error", "syntax", "null", "indentation", "chain", "hook", "deleted", "text"]
)
def test_ends_under_the_installed_script(tmp_path, end):
    """`ksmcore run`, as against `python -m ksmcore run`: other frames lie above the program, and
    nothing but the interpreter knows of the module that it began with."""
    start = "import sys; from ksmcore.cli import main; sys.exit(main())"
    (tmp_path / "ksmcore-script").write_text(start)
    write(tmp_path, ENDS[end])
    plain = python("program.py", cwd=tmp_path)
    ours = python(
        "ksmcore-script", "run", "--quiet", "program.py", cwd=tmp_path, env=FREED_IS_OVERWRITTEN
    )
    assert ours.stderr == plain.stderr
    assert ours.returncode == plain.returncode


@pytest.mark.parametrize("flags", [["-W", "error"], ["-X", "dev"], ["-O"], ["-u"], ["-b"]])
def test_flags_of_python(tmp_path, flags):
    script = """
        import sys
        print(sys.flags, sys.warnoptions, __debug__)
        print(b"" == "")
        import warnings
        warnings.warn("text")
    """
    both(tmp_path, script, flags=flags)


def test_broken_pipe(tmp_path):
    (tmp_path / "program.py").write_text("for i in range(100_000): print(i)")
    ends = []
    for run in ((), QUIETLY):
        command = [sys.executable, *run, "program.py"]
        with subprocess.Popen(
            command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            process.stdout.read(10)
            process.stdout.close()
            ends.append((process.stderr.read(), process.wait(timeout=60)))
    assert ends[0] == ends[1]


def test_ctrl_c_from_outside(tmp_path):
    """While the scanner works and the program sleeps."""
    script = """
        import sys, time
        import numpy as np
        arrays = [np.full(300_000, 7.0) for _ in range(20)]
        try:
            print("ready", flush=True)
            time.sleep(60)
        finally:
            print("cleaned up", (np.array(arrays) == 7).all())
    """
    write(tmp_path, script)
    ends = []
    for run in ((), QUIETLY):
        command = [sys.executable, *run, "program.py"]
        with subprocess.Popen(
            command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            assert process.stdout.readline() == b"ready\n"
            time.sleep(0.5)  # until it sleeps
            process.send_signal(signal.SIGINT)
            ends.append((*process.communicate(timeout=60), process.returncode))
    assert ends[0] == ends[1]
    assert ends[0][0] == b"cleaned up True\n"
    assert ends[0][2] == -signal.SIGINT


def test_signals_are_for_the_program(tmp_path, monkeypatch):
    """One that it has blocked, and waits for, is given to none of our threads."""
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")  # NumPy's would take them too
    script = """
        import os, signal
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGTERM})
        for _ in range(20):
            os.kill(os.getpid(), signal.SIGUSR1)
            print(signal.sigwait({signal.SIGUSR1}))
        print(signal.pthread_sigmask(signal.SIG_BLOCK, ()))
    """
    assert both(tmp_path, script).returncode == 0


# ---- modules that look at __main__ ---------------------------------------------------------------


def test_pickle_doctest_inspect(tmp_path):
    script = '''
        """
        >>> double(2)
        4
        """
        import doctest, inspect, pickle
        import __main__
        def double(x):
            return 2 * x
        class Point:
            def __init__(self, x):
                self.x = x
        if __name__ == "__main__":
            print(doctest.testmod())
            print(inspect.getsource(double), inspect.getfile(double))
            print(pickle.loads(pickle.dumps(Point(3))).x, __main__.double is double)
    '''
    assert b"attempted=1" in both(tmp_path, script).stdout


MULTIPROCESSING = """
    import multiprocessing as mp, os, sys
    import numpy as np
    class Work:
        def __init__(self, x):
            self.x = x
    def do(work):
        return np.full(200_000, work.x).sum() + int(sys.argv[2])
    if __name__ == "__main__":
        kept = [np.full(200_000, 7.0) for _ in range(10)]
        with mp.get_context(sys.argv[1]).Pool(2) as pool:
            print(pool.map(do, [Work(i) for i in range(4)]))
        print(all((array == 7).all() for array in kept))
"""


@pytest.mark.parametrize("method", ["spawn", "fork", "forkserver"])
def test_multiprocessing(tmp_path, method):
    done = both(tmp_path, MULTIPROCESSING, method, "5", flags=FORKS_AMONG_THREADS)
    assert done.returncode == 0
    assert b"True" in done.stdout


def test_multiprocessing_of_a_module(tmp_path):
    write(tmp_path, MULTIPROCESSING)
    done = compare(("-m", "program", "spawn", "5"), cwd=tmp_path)
    assert done.returncode == 0


def test_subprocess_of_itself(tmp_path):
    script = """
        import subprocess, sys
        print(sys.executable)
        if len(sys.argv) == 1:
            print(subprocess.run([sys.executable, sys.argv[0], "child"], check=True))
    """
    assert both(tmp_path, script).returncode == 0


def test_forked_children_exit_by_themselves(tmp_path):
    """Their handlers run, and none of ours."""
    script = """
        import atexit, os, sys
        import numpy as np
        array = np.full(300_000, 7.0)
        atexit.register(print, "handler", flush=True)
        for status in (0, 3):
            print("parent", flush=True)
            pid = os.fork()
            if pid == 0:
                array[:] = 8
                sys.exit(status)
            print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), array.sum(), flush=True)
        if os.fork() == 0:
            1/0
        os.wait()
    """
    assert both(tmp_path, script, flags=FORKS_AMONG_THREADS).returncode == 0
