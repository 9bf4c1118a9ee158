"""`ksmcore run --live`: a view at the foot of the terminal, and a program that does not notice."""

import os
import pty
import re
import select
import struct
import sys
import termios
import time
from fcntl import ioctl
from pathlib import Path

import pytest

from helpers.cli import KSMCORE, ksmcore, own_directories, python, write
from helpers.forks import THREADS_RUN

__all__ = ["own_directories"]

pytestmark = pytest.mark.filterwarnings(THREADS_RUN)

# What we write is between these two: the cursor is saved before, and put back after.
OURS = re.compile(rb"(?:\x1bD)*(?:\x1b\[\d+A)?\x1b7.*?\x1b8", re.DOTALL)

PROGRAM = """
    import os, subprocess, sys, time
    print("first line")
    sys.stdout.write("a line in")
    sys.stdout.flush()
    time.sleep(1.2)
    print(" two parts")
    os.write(1, b"from os.write\\n")
    subprocess.run(["echo", "from a child"], check=True)
    if os.fork() == 0:
        sys.exit(0)
    os.wait()
    print("\\x1b[31mred\\x1b[0m", file=sys.stderr)
    for i in range(100):
        print("line", i)
        time.sleep(0.01)
    while not os.path.exists("seen"):
        time.sleep(0.01)
    print(sys.stdout.isatty(), os.get_terminal_size().lines)
"""


def set_size(terminal, rows, columns):
    ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


def in_terminal(
    *command, cwd, rows=30, columns=100, term="xterm-256color", resize=None, until=lambda _: True
):
    """What a command writes to a terminal of that size, and its exit status. PROGRAM goes on to its
    end when what was written is enough for `until`."""
    seen = Path(cwd, "seen")
    seen.unlink(missing_ok=True)
    pid, terminal = pty.fork()
    if pid == 0:
        try:
            os.chdir(cwd)
            os.environ["TERM"] = term
            set_size(0, rows, columns)
            os.execv(sys.executable, [sys.executable, *map(str, command)])
        finally:
            os._exit(99)
    shown = bytearray()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if resize is not None and b"two parts" in shown:
            set_size(terminal, *resize)
            resize = None
        if until(bytes(shown)):
            seen.touch()
        if select.select([terminal], [], [], 1)[0]:
            try:
                shown += os.read(terminal, 65536)
            except OSError:
                break
    os.close(terminal)
    return bytes(shown), os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_everything_that_the_program_writes_is_as_without(tmp_path):
    write(tmp_path, PROGRAM)
    plain, status = in_terminal("program.py", cwd=tmp_path)
    assert status == 0
    run = (*KSMCORE, "run", "--quiet", "--live", "program.py")
    ours, status = in_terminal(
        *run, cwd=tmp_path, until=lambda shown: len(OURS.findall(shown)) >= 4
    )
    assert status == 0
    assert OURS.sub(b"", ours) == plain
    frames = OURS.findall(ours)
    assert len(frames) >= 4
    assert b"Scanner" in frames[0]
    # The program is left the upper rows, and all of them in the end.
    assert b"\x1b[1;22r" in frames[0]
    assert b"\x1b[r" in frames[-1]
    assert b"\x1b[r" not in b"".join(frames[:-1])


def test_a_terminal_that_changes_its_size(tmp_path):
    write(tmp_path, PROGRAM)
    run = (*KSMCORE, "run", "--quiet", "--live", "program.py")
    ours, status = in_terminal(
        *run, cwd=tmp_path, resize=(40, 80), until=lambda shown: b"\x1b[1;32r" in shown
    )
    assert status == 0
    assert b"\x1b[1;32r" in ours
    last = OURS.findall(ours)[-1]
    assert b"\x1b[33;1H\x1b[J" in last
    # Less room than is needed for both: all of it is the program's.
    ours, status = in_terminal(
        *run, cwd=tmp_path, resize=(10, 80), until=lambda shown: b"\x1b[r" in shown
    )
    assert status == 0
    assert b"True 10" in ours


def test_the_summary_comes_after_the_view(tmp_path):
    write(tmp_path, "import time; time.sleep(0.8); 1/0")
    ours, status = in_terminal(*KSMCORE, "run", "--live", "program.py", cwd=tmp_path)
    assert status == 1
    assert ours.index(b"ZeroDivisionError") < ours.rindex(b"\x1b[r") < ours.index(b"ksmcore: ")


@pytest.mark.parametrize(
    ("term", "rows", "told"),
    [("dumb", 30, b"cannot move its cursor"), ("xterm", 10, b"has less than 14 lines")],
)
def test_terminals_that_cannot(tmp_path, term, rows, told):
    write(tmp_path, "print('output')")
    run = (*KSMCORE, "run", "--quiet", "--live", "program.py")
    ours, status = in_terminal(*run, cwd=tmp_path, term=term, rows=rows)
    assert status == 0
    assert told in ours
    assert b"output" in ours
    assert b"\x1b" not in ours


def test_stderr_is_no_terminal(tmp_path):
    write(tmp_path, "print('output')")
    done = ksmcore("run", "--quiet", "--live", "program.py", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "output\n")
    assert done.stderr == "ksmcore: no live view: stderr is no terminal\n"
    assert python("program.py", cwd=tmp_path).returncode == 0
