"""Numbers that one process shows another: the server, its directory, and `ksmcore live`."""

import contextlib
import io
import json
import os
import pty
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

import ksmcore as library
from helpers.cli import (
    KSMCORE,
    MERGED,
    is_alive,
    ksmcore,
    running,
    write,
)
from helpers.forks import THREADS_RUN
from helpers.kernels_view import descriptors
from helpers.waiting import wait_until
from ksmcore.cli import live, serving, view
from ksmcore.cli.figures import Source

pytestmark = pytest.mark.filterwarnings(THREADS_RUN)

WAITING = "\n    print('ready', flush=True)\n    sys.stdin.read()\n"


@pytest.fixture
def server():
    made = serving.Server(lambda: {"number": 7})
    yield made
    made.stop()


# ---- the directory -------------------------------------------------------------------------------


def test_the_directory_is_the_users_alone(tmp_path, server):
    found = server.path.parent.stat()
    assert server.path.parent == tmp_path / f"ksmcore-{os.geteuid()}"
    assert stat.S_IMODE(found.st_mode) == 0o700
    assert stat.S_ISSOCK(server.path.stat().st_mode)


def test_the_runtime_directory_goes_first(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "runtime"))
    (tmp_path / "runtime").mkdir(mode=0o700)
    server = serving.Server(lambda: {"number": 7})
    assert server.path.parent == tmp_path / "runtime" / "ksmcore"
    assert serving.ask(os.getpid()) == {"number": 7}
    # A client is told by the environment that the process began with; this one began without it.
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert serving.ask(os.getpid()) is None
    server.stop()


def test_a_process_with_directories_of_its_own_is_found(tmp_path):
    """By its environment, whatever the client's is."""
    script = write(tmp_path, f"{MERGED}{WAITING}")
    (tmp_path / "other").mkdir(mode=0o700)
    environ = {**os.environ, "TMPDIR": str(tmp_path / "other")}
    with running(*KSMCORE, "run", script, env=environ) as process:
        assert process.stdout.readline() == b"ready\n"
        assert serving.ask(process.pid)["pid"] == process.pid


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may look at what is another's")
def test_root_sees_the_processes_of_others(monkeypatch):
    ready, done = os.pipe()
    home = Path(tempfile.mkdtemp(dir="/tmp"))  # where other users get to
    home.chmod(0o1777)
    pid = os.fork()
    if pid == 0:
        try:
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
            tempfile.tempdir = str(home)
            server = serving.Server(lambda: {"user": os.geteuid(), "text": "a\x1b[31mb"})
            os.write(done, str(server.path).encode())
            time.sleep(60)
        finally:
            os._exit(1)
    try:
        path = Path(os.read(ready, 4096).decode())
        monkeypatch.setattr(serving, "_places_of", lambda pid, uid: [path.parent])
        # What would be an order to the terminal is not believed.
        assert serving.ask(pid) == {"user": 65534, "text": "a\\x1b[31mb"}
        os.chown(path.parent, 65533, 65533)
        assert serving.ask(pid) is None
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(ready)
        os.close(done)
        shutil.rmtree(home)


@pytest.mark.parametrize(
    "answer",
    [
        b"[1]",
        b'{"pid": 1}',
        b"[" * 100_000,
        b"no json",
        b"",
        b'{"pid": 1, "command": [], "memory": [], "notes": 7}',
    ],
)
def test_answers_that_are_none(server, monkeypatch, answer):
    monkeypatch.setattr(serving, "_read_all", lambda connection: answer)
    with pytest.raises(serving.NotAnsweringError, match=f"process {os.getpid()}"):
        live.follow(os.getpid(), 1.0, once=True)


def test_brackets_are_no_markup(capsys):
    notes = [("[b]a[/b]", "[/red] [link=x]y[/link]")]
    figures = {"pid": 1, "command": ["[red]"], "memory": {"rss": 1}, "notes": notes}
    Console(width=100).print(view.picture(figures))
    shown = capsys.readouterr().out
    assert "[/red] [link=x]y[/link]" in shown
    assert "[red]" in shown


def test_terminals_without_other_letters():
    with library.Engine() as engine:
        array = engine.full(100_000, 3)
        engine.dedup(array)
        figures = Source(engine, ["python"], 65536).snapshot()
    written = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    Console(file=written, width=60).print(view.picture(figures, ascii_only=True))
    written.flush()
    assert b"####" in written.buffer.getvalue()


@pytest.mark.parametrize(("ascii_only", "marks"), [(False, "█▓▒░·"), (True, "#=-~.")])
def test_bars_can_be_read_without_colour(ascii_only, marks):
    page = library.Engine.page_bytes
    with library.Engine() as engine:
        array = engine.empty((40, page), np.uint8)
        # Of 20 cells: 10 of equal pages, 5 of zeros, 4 of which no two are equal, 1 never touched.
        array[:20] = 1
        array[20:30] = 1
        array[20:30] = 0
        array[30:38] = np.arange(8)[:, None] + 2
        engine.dedup()
        engine.scan()
        figures = Source(engine, ["python"], 65536).snapshot()
    written = io.StringIO()
    Console(file=written, width=100, color_system=None).print(
        view.picture(figures, ascii_only=ascii_only)
    )
    lines = written.getvalue().splitlines()
    merged, zero, unshared, volatile, empty = marks
    (region,) = [line for line in lines if line.startswith("0x")]
    assert merged * 10 + zero * 5 + unshared * 4 + empty in region
    (legend,) = [line for line in lines if line.startswith("Regions")]
    assert f"{merged} merged  {zero} zero  {unshared} unshared  {volatile} volatile" in legend
    # 29 of 38 pages are saved: no full bar.
    (saved,) = [line for line in lines if line.startswith("Saved")]
    assert f" {merged * 15}{empty * 5} " in saved
    assert "(76%)" in saved


@pytest.mark.parametrize("runtime", ["missing", "relative"])
def test_an_unusable_runtime_directory(tmp_path, monkeypatch, runtime):
    monkeypatch.setenv(
        "XDG_RUNTIME_DIR", runtime if runtime == "relative" else str(tmp_path / "no")
    )
    server = serving.Server(lambda: {"number": 7})
    assert server.path.parent == tmp_path / f"ksmcore-{os.geteuid()}"
    assert serving.ask(os.getpid()) == {"number": 7}
    server.stop()


def spoil_mode(directory):
    directory.mkdir()
    directory.chmod(0o755)


def spoil_by_link(directory):
    directory.with_name("elsewhere").mkdir(mode=0o700)
    directory.symlink_to("elsewhere")


def spoil_by_file(directory):
    directory.write_text("")


def spoil_parent(directory):
    directory.mkdir(mode=0o700)
    directory.parent.chmod(0o777)  # without the sticky bit


def spoil_owner(directory):
    if os.geteuid() != 0:
        pytest.skip("only root can give a directory away")
    directory.mkdir(mode=0o700)
    os.chown(directory, 65534, 65534)


def spoil_owner_of_parent(directory):
    if os.geteuid() != 0:
        pytest.skip("only root can give a directory away")
    directory.mkdir(mode=0o700)
    os.chown(directory.parent, 65534, 65534)


@pytest.mark.parametrize(
    "spoil",
    [spoil_mode, spoil_by_link, spoil_by_file, spoil_parent, spoil_owner, spoil_owner_of_parent],
)
def test_a_directory_of_others_is_not_trusted(tmp_path, monkeypatch, spoil):
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    monkeypatch.setattr(serving, "directories", lambda: [home / "ksmcore"])
    with_trust = serving.Server(lambda: {"number": 7})
    path = with_trust.path
    assert serving.ask(os.getpid()) == {"number": 7}
    with_trust.stop()
    path.parent.rmdir()
    spoil(home / "ksmcore")
    with pytest.raises(OSError, match=str(home)):
        serving.Server(lambda: {"number": 7})
    # Nor does a client believe what somebody else has put there.
    if (home / "ksmcore").is_dir():
        with socket.socket(socket.AF_UNIX) as fake:
            fake.bind(str(path))
            fake.listen()
            assert serving.ask(os.getpid()) is None


# ---- server and client ---------------------------------------------------------------------------


def test_each_connection_gets_a_snapshot_of_its_moment():
    numbers = iter(range(10))
    server = serving.Server(lambda: {"number": next(numbers), "large": "x" * 2_000_000})
    answers = [serving.ask(os.getpid()) for _ in range(5)]
    server.stop()
    assert [answer["number"] for answer in answers] == [0, 1, 2, 3, 4]
    assert all(len(answer["large"]) == 2_000_000 for answer in answers)


def test_a_snapshot_that_fails_is_no_end():
    answers = [{"number": 1}, {}, {"number": 2}]

    def snapshot():
        return {"number": answers.pop(0)["number"]}

    server = serving.Server(snapshot)
    assert serving.ask(os.getpid()) == {"number": 1}
    with pytest.raises(serving.NotAnsweringError):
        serving.ask(os.getpid())
    assert serving.ask(os.getpid()) == {"number": 2}
    server.stop()


def test_nothing_is_left(server):
    fds = descriptors()
    another_path = server.path
    server.stop()
    server.stop()
    assert not another_path.exists()
    assert len(descriptors()) == len(fds) - 3  # the socket and a pipe
    assert serving.ask(os.getpid()) is None


def test_sockets_of_the_dead_are_cleared(server):
    directory = server.path.parent
    dead, alive, other = (directory / name for name in ("4194999.sock", "1.sock", "notes.sock"))
    for path in (dead, alive, other):
        path.touch()
    server.stop()
    again = serving.Server(dict)
    assert not dead.exists()
    assert alive.exists()
    assert other.exists()
    again.stop()


def test_sockets_of_the_living_stay_whatever_their_numbers(server):
    """A container that shares the directory has numbers of its own."""
    directory = server.path.parent
    living = socket.socket(socket.AF_UNIX)
    with living:
        living.bind(str(directory / "4194999.sock"))
        living.listen()
        dead = directory / "4194998.0a0a0a0a.sock"
        with socket.socket(socket.AF_UNIX) as gone:
            gone.bind(str(dead))
        again = serving.Server(dict)
        assert (directory / "4194999.sock").exists()
        assert not dead.exists()
        # Its own number, too.
        assert again.path != server.path
        assert again.path.name.split(".")[0] == str(os.getpid())
        again.stop()
        living.settimeout(0)
        with pytest.raises(BlockingIOError):
            living.accept()  # nobody was bothered
    assert serving.ask(os.getpid()) == {"number": 7}


UNSHARED = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")


def can_unshare():
    return subprocess.run([*UNSHARED, "true"], capture_output=True, check=False).returncode == 0


@contextlib.contextmanager
def container(tmp_path):
    """A run in a PID namespace of its own; gives its number outside."""
    command = [*UNSHARED, sys.executable, *KSMCORE, "run", "--quiet", "program.py"]
    with subprocess.Popen(
        command, cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        try:
            ready(process)
            (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            yield int(child)
        finally:
            process.kill()


def test_processes_in_other_pid_namespaces_are_found_and_left_alone(tmp_path):
    """Inside they have other numbers, and several can have the same."""
    if shutil.which("unshare") is None or not can_unshare():
        pytest.skip("no PID namespace can be made here")
    write(tmp_path, f"import sys{WAITING.replace(chr(10) + '    ', chr(10))}")
    write(tmp_path, "", "nothing.py")
    with container(tmp_path) as first, container(tmp_path) as second:
        assert len(sockets(tmp_path)) == 2
        assert ksmcore("run", "--quiet", "nothing.py", cwd=tmp_path).returncode == 0
        assert len(sockets(tmp_path)) == 2
        assert serving.ask(first)["pid"] == serving.ask(second)["pid"] == 1
        assert serving.ask(first)["seconds"] > serving.ask(second)["seconds"]
        assert "Scanner" in ksmcore("live", "--once", second).stdout


def test_another_process_behind_a_socket_is_not_believed(server):
    """A socket that is named for a process is that process's."""
    server.path.rename(server.path.with_name("1.sock"))
    assert serving.ask(1) is None


def test_a_forked_child_has_no_server_and_leaves_the_parents(server):
    fd = server._fd
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            server.stop()
            try:
                os.fstat(fd)
            except OSError:
                status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert server.path.exists()
    assert serving.ask(os.getpid()) == {"number": 7}


# ---- `ksmcore live` ------------------------------------------------------------------------------


def ready(process):
    line = process.stdout.readline()
    assert line == b"ready\n", process.stderr.read()


def sockets(tmp_path):
    return sorted(tmp_path.glob("ksmcore-*/*.sock"))


def test_a_run_is_shown_and_then_gone(tmp_path):
    write(tmp_path, MERGED + WAITING)
    with running(*KSMCORE, "run", "program.py", cwd=tmp_path) as process:
        ready(process)
        assert [path.stem for path in sockets(tmp_path)] == [str(process.pid)]
        done = ksmcore("live", "--once", process.pid, env={**os.environ, "COLUMNS": "200"})
        assert done.returncode == 0
        narrow = ksmcore("live", "--once", process.pid, env={**os.environ, "COLUMNS": "80"})
        assert max(map(len, narrow.stdout.splitlines())) <= 80
        assert "…" not in narrow.stdout
        for text in (f"pid {process.pid}", "python program.py", "PSS", "running  passes"):
            assert text in done.stdout
        figures = serving.ask(process.pid)
        assert figures["bytes_saved"] >= 10 * 800_000
        assert figures["scanning"]
        assert json.dumps(figures)
        process.communicate(timeout=60)
        assert process.returncode == 0
    assert sockets(tmp_path) == []


def test_the_last_numbers_stay_while_the_process_ends(monkeypatch):
    """Its server is gone before it is."""
    waits = iter([lambda: None, lambda: None, stop])
    seen = []
    answers = iter([{"served": 1}, {"served": 2}, None, None])
    monkeypatch.setattr(live, "ask", lambda pid: next(answers))
    monkeypatch.setattr(live, "kernel_view", lambda pid: {"kernel": pid})
    monkeypatch.setattr(live, "picture", lambda figures, **_: str(figures))
    monkeypatch.setattr(live.time, "sleep", lambda seconds: next(waits)())
    monkeypatch.setattr(live, "Console", lambda: Screen(seen))
    monkeypatch.setattr(live, "Live", Screen)
    live.follow(os.getpid(), 1.0, once=False)
    assert seen[-1] == "{'served': 2}"
    assert not any("kernel" in one for one in seen)
    assert "no numbers any more" in seen[-2]


def stop():
    raise KeyboardInterrupt


class Screen:
    """A terminal, and a live view of it, that note what is shown."""

    encoding, is_terminal, height = "utf-8", True, 24

    def __init__(self, seen=None, *, console=None, screen=None):
        self.seen = seen if console is None else console.seen

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def update(self, shown, refresh):
        self.seen.append(" ".join(getattr(shown, "renderables", [shown])))

    def print(self, shown):
        self.seen.append(shown)


@pytest.mark.parametrize("end", ["1/0", "sys.exit(3)", "import os; os.kill(os.getpid(), 2)"])
def test_the_socket_goes_with_the_process(tmp_path, end):
    write(tmp_path, f"import sys, pathlib; print(*pathlib.Path(sys.argv[1]).glob('k*/*')); {end}")
    done = ksmcore("run", "program.py", tmp_path, cwd=tmp_path)
    assert ".sock" in done.stdout
    assert sockets(tmp_path) == []


def test_a_socket_that_cannot_be_removed_hides_no_summary(tmp_path):
    """As in a program that began as root, and has given up its rights."""
    write(
        tmp_path,
        """
        import os, pathlib, shutil, sys
        (directory,) = pathlib.Path(sys.argv[1]).glob("ksmcore-*")
        shutil.rmtree(directory)
        directory.touch()
        """,
    )
    done = ksmcore("run", "program.py", tmp_path, cwd=tmp_path)
    assert done.stderr.startswith("ksmcore: ")
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give up rights")
def test_a_run_that_gives_up_its_rights(tmp_path):
    script = "import os; os.setgroups([]); os.setgid(65534); os.setuid(65534); print('over')"
    done = ksmcore("run", "-c", script, cwd=tmp_path)
    assert done.stdout == "over\n"
    assert done.stderr.startswith("ksmcore: ")
    assert "Traceback" not in done.stderr


def test_forks_of_a_run(tmp_path):
    """Children serve nothing, take nothing of the parent's away, and keep no client waiting."""
    script = """
        import os, sys, time
        import numpy as np
        child = os.fork()
        if child == 0:
            time.sleep(60)
            sys.exit(0)
        other = os.fork()
        if other == 0:
            sys.exit(0)
        os.waitpid(other, 0)
        print("ready", flush=True)
        print(child, flush=True)
        sys.stdin.read()
        os.kill(child, 9)
        os.wait()
    """
    write(tmp_path, script)
    with running(*KSMCORE, "run", "--quiet", "program.py", cwd=tmp_path) as process:
        ready(process)
        child = int(process.stdout.readline())
        assert [path.stem for path in sockets(tmp_path)] == [str(process.pid)]
        assert serving.ask(process.pid)["pid"] == process.pid
        assert serving.ask(child) is None
        done = ksmcore("live", "--once", child)
        assert "no numbers" in done.stdout
        assert process.communicate(timeout=60)[1] == b""
    assert not is_alive(child)


def test_a_process_that_does_not_answer(tmp_path, monkeypatch):
    write(tmp_path, f"import sys{WAITING.replace(chr(10) + '    ', chr(10))}")
    with running(*KSMCORE, "run", "program.py", cwd=tmp_path) as process:
        ready(process)
        process.send_signal(signal.SIGSTOP)
        wait_until(lambda: ") T " in Path(f"/proc/{process.pid}/stat").read_text())
        with monkeypatch.context() as patch:
            patch.setattr(serving, "PATIENCE_SECONDS", 0.3)
            with pytest.raises(serving.NotAnsweringError, match="has not answered"):
                serving.ask(process.pid)
        process.send_signal(signal.SIGCONT)
        assert serving.ask(process.pid)["pid"] == process.pid


def test_no_such_process():
    done = ksmcore("live", "4194999")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "Error: there is no process 4194999\n"
    assert ksmcore("live", "0").returncode == 2


def test_what_the_kernel_tells(tmp_path):
    figures = view.kernel_view(os.getpid())
    rss = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
    assert abs(figures["memory"]["rss"] - rss) < rss // 10
    assert figures["memory"]["pss"] <= figures["memory"]["rss"]
    with pytest.raises(ProcessLookupError):
        view.kernel_view(4194999)


def test_what_the_kernel_tells_of_a_process_of_others(tmp_path):
    """PSS is not for everybody; RSS is."""
    here = tmp_path / "7"
    here.mkdir()
    (here / "cmdline").write_bytes(b"program\0a b\0")
    (here / "comm").write_text("program\n")
    (here / "status").write_text("Name:\tprogram\nVmRSS:\t    12 kB\nVmSwap:\t 4 kB\n")
    figures = view.kernel_view(7, tmp_path)
    assert figures["command"] == ["program", "a b"]
    assert figures["memory"] == {"pss": None, "rss": 12288, "swap": 4096}
    (here / "status").write_text("Name:\tkthread\n")
    (here / "cmdline").write_bytes(b"")
    (here / "maps").write_bytes(b"")
    figures = view.kernel_view(7, tmp_path)
    assert figures["command"] == ["[program]"]
    assert [name for name, _ in figures["notes"]] == ["ksmcore"]


def test_escape_sequences_of_a_command_are_shown_not_obeyed(capsys):
    from rich.console import Console

    figures = {"pid": 1, "command": ["a\x1b[31m", "b\n"], "memory": {"rss": 1}, "notes": []}
    Console(width=100).print(view.picture(figures))
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "\\x1b[31m" in shown


def test_time_goes_on_in_a_terminal(tmp_path):
    """Frames follow each other until the process ends; then the last one stays, and says so."""
    write(tmp_path, f"import sys{WAITING.replace(chr(10) + '    ', chr(10))}")
    with running(*KSMCORE, "run", "program.py", cwd=tmp_path) as process:
        ready(process)
        pid, terminal = pty.fork()
        if pid == 0:
            os.environ.update(TERM="xterm", COLUMNS="100", LINES="30")
            command = [sys.executable, *KSMCORE, "live", "--interval", "0.1", str(process.pid)]
            os.execv(sys.executable, command)
        shown = bytearray()

        def read():
            try:
                shown.extend(os.read(terminal, 65536))
            except OSError:
                return None
            return True

        deadline = time.monotonic() + 60
        while shown.count(b"Scanner") < 3 and time.monotonic() < deadline:
            read()
        process.communicate(timeout=60)
        while read():
            pass
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    left_alternate_screen = shown.rindex(b"\x1b[?1049l")
    assert b"has ended" in shown[left_alternate_screen:]
    assert b"Scanner" in shown[left_alternate_screen:]
