"""One process tells its numbers to another: snapshots as JSON over a Unix socket.

`ksmcore run` has a server for its own process; `ksmcore live` is the client. The sockets lie in a
directory of the user's own, `PID.sock` each, by the number that the process has in its own PID
namespace: containers that share the directory can have several of one number, and the others are
`PID.XXXXXXXX.sock`. Whoever connects is sent one JSON document: the user, or root, who has to take
it for another's words.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import socket
import stat
import struct
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ksmcore._engine.hidden_thread import HiddenThread
from ksmcore._kernel import files, procfs

__all__ = ["NotAnsweringError", "Server", "ask"]

# How long either side waits for the other, at most.
PATIENCE_SECONDS = 5.0
# More than any answer has.
MOST_BYTES = 16 << 20


class NotAnsweringError(Exception):
    """The process is there and serves, and does not answer; the text says why."""


# ---- the directory -------------------------------------------------------------------------------


def directories() -> list[Path]:
    """Where the sockets of this process's user may lie, the best place first."""
    return _directories(os.geteuid(), os.environ, tempfile.gettempdir())


def _directories(uid: int, environ: Mapping[str, str], temporary: str) -> list[Path]:
    runtime = environ.get("XDG_RUNTIME_DIR", "")
    found = [Path(runtime, "ksmcore")] if os.path.isabs(runtime) else []
    return [*found, Path(temporary, f"ksmcore-{uid}")]


def _places_of(pid: int, uid: int) -> list[Path]:
    """Where a process may have its socket: by its own environment, if that can be read."""
    found = directories() if uid == os.geteuid() else []
    with contextlib.suppress(OSError):
        raw = Path("/proc", str(pid), "environ").read_bytes().split(b"\0")
        environ = dict(os.fsdecode(line).split("=", 1) for line in raw if b"=" in line)
        # As tempfile looks for them.
        named = [environ.get(name, "") for name in ("TMPDIR", "TEMP", "TMP")]
        for temporary in [*named, "/tmp", "/var/tmp", "/usr/tmp"]:
            if os.path.isabs(temporary):
                found += _directories(uid, environ, temporary)
    return list(dict.fromkeys(found))


def _candidates(pid: int) -> Iterator[tuple[Path, int]]:
    """What may be the socket of a process, and the user who must have put it there."""
    status = procfs.words(Path("/proc", str(pid), "status"))
    if "Uid" not in status:
        return
    uid = int(status["Uid"].split()[1])  # the effective one
    own_pid = status.get("NSpid", str(pid)).split()[-1]
    for directory in _places_of(pid, uid):
        yield directory / f"{own_pid}.sock", uid
        for path in sorted(directory.glob(f"{own_pid}.*.sock")):
            yield path, uid


def check_own(directory: Path, uid: int | None = None) -> None:
    """PermissionError unless nobody but a user (None: the present one), and root, can put anything
    there, or put another in its place."""
    uid = os.geteuid() if uid is None else uid
    own, around = os.lstat(directory), os.stat(directory.parent)
    if not stat.S_ISDIR(own.st_mode) or own.st_uid != uid or own.st_mode & 0o077:
        raise PermissionError(f"{directory} is not a directory of user {uid} alone (0700)")
    others_write = around.st_mode & 0o022 and not around.st_mode & stat.S_ISVTX
    if around.st_uid not in (0, uid) or others_write:
        raise PermissionError(f"{directory.parent} is in the hands of others")


def _made_directory() -> Path:
    """The first of the directories that can be had."""
    failed: OSError | None = None
    for directory in directories():
        try:
            with contextlib.suppress(FileExistsError):
                directory.mkdir(mode=0o700)
            check_own(directory)
        except OSError as error:
            failed = error
        else:
            return directory
    raise failed or FileNotFoundError("no directory for sockets")


def _is_dead(path: Path) -> bool:
    """Has no process this socket (any more)? The number in its name would not tell: it is one of
    the PID namespace that the process lives in."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        try:
            # A living one is of another type, which is another error; its process notices nothing.
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return True
        except OSError:
            pass
    return False


def _clear(directory: Path) -> None:
    """Remove the sockets of processes that were killed before they could."""
    own = str(os.getpid())
    for path in directory.glob("*.sock"):
        pid = path.name.split(".")[0]
        if not pid.isdecimal() or (pid != own and Path("/proc", pid).exists()):
            continue
        if _is_dead(path):
            path.unlink(missing_ok=True)


def _bind(server: socket.socket, directory: Path) -> Path:
    """Give a socket its name. Raises OSError."""
    path = directory / f"{os.getpid()}.sock"
    try:
        server.bind(str(path))
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        path = path.with_suffix(f".{os.urandom(4).hex()}.sock")
        server.bind(str(path))
    return path


# ---- the server ----------------------------------------------------------------------------------


class Server:
    """Serves this process's snapshots until `stop`. A forked child has none, and leaves the
    parent's alone. Its descriptors are closed there at once (see `files`), so no socket object that
    the child inherits may own one, or it would close whatever has the number by then."""

    def __init__(self, snapshot: Callable[[], dict[str, Any]]) -> None:
        """Raises OSError where there can be no socket."""
        self._snapshot = snapshot
        self._pid = os.getpid()
        directory = _made_directory()
        _clear(directory)
        with socket.socket(socket.AF_UNIX) as listening:
            self.path = _bind(listening, directory)
            listening.listen(8)
            listening.setblocking(False)
            files.keep(listening.fileno())
            self._fd = listening.detach()
        self._stopping = False
        self._waker = files.Waker()
        self._thread = HiddenThread(self._serve, self._waker.wake)
        self._thread.start()

    def stop(self) -> None:
        """Remove the socket, and end. Nothing in a forked child, and a second time."""
        if self._stopping or self._pid != os.getpid():
            return
        self._stopping = True
        # One that stays, of a program that has given up its rights, the next process removes.
        with contextlib.suppress(OSError):
            self.path.unlink()
        self._waker.wake()
        self._thread.join(1.0)
        self._waker.close()
        files.close(self._fd)

    def _serve(self) -> bool:
        # Sockets only here, in the frame of a thread that no child has.
        listening = socket.socket(fileno=self._fd)
        try:
            while not self._stopping and not self._thread.is_asked():
                if not self._waker.is_kept():
                    return False  # the program has closed all descriptors, the socket among them
                self._serve_one(listening)
        finally:
            listening.detach()
        self._waker.sleep()
        return not self._stopping

    def _serve_one(self, listening: socket.socket) -> None:
        """Or be woken."""
        woken = select.poll()
        woken.register(self._waker, select.POLLIN)
        try:
            both = select.poll()
            both.register(self._waker, select.POLLIN)
            both.register(listening, select.POLLIN)
            both.poll()
            connection, _ = listening.accept()
        except BlockingIOError:
            return
        except OSError:
            woken.poll(1000)  # the program has used up its file descriptors, perhaps
            return
        # Whatever happens here, the program should not notice.
        with contextlib.suppress(Exception):
            self._answer(connection)
        files.close(connection.detach())

    def _answer(self, connection: socket.socket) -> None:
        files.keep(connection.fileno())
        connection.settimeout(PATIENCE_SECONDS)
        connection.sendall(json.dumps(self._snapshot()).encode())
        # A close would not do: a child that is about to run another program has the connection too.
        connection.shutdown(socket.SHUT_RDWR)


# ---- the client ----------------------------------------------------------------------------------


def ask(pid: int) -> dict[str, Any] | None:
    """The numbers of a process; None if it serves none to this user.

    Raises:
        NotAnsweringError: it does, and does not answer now.
    """
    for path, uid in _candidates(pid):
        try:
            check_own(path.parent, uid)
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(PATIENCE_SECONDS)
                connection.connect(str(path))
                if _peer(connection) == pid:
                    answer = _printable(json.loads(_read_all(connection)))
                    if not isinstance(answer, dict):
                        raise ValueError("it is no snapshot")
                    return answer
        except (FileNotFoundError, ConnectionRefusedError, PermissionError):
            continue
        except TimeoutError:
            raise NotAnsweringError(
                f"process {pid} has not answered for {PATIENCE_SECONDS:.0f} seconds: it is "
                "stopped, or busy in code that does not let other threads run"
            ) from None
        except (OSError, ValueError, RecursionError) as error:
            if not Path("/proc", str(pid)).exists():
                return None
            raise NotAnsweringError(f"process {pid} gave no answer: {error}") from None
    return None


def _peer(connection: socket.socket) -> int:
    """The process at the other end."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, _, _ = struct.unpack("3i", raw)
    return int(pid)


def _read_all(connection: socket.socket) -> bytes:
    deadline = time.monotonic() + PATIENCE_SECONDS
    received = bytearray()
    while some := connection.recv(1 << 16):
        received += some
        if time.monotonic() > deadline:
            raise TimeoutError
        if len(received) > MOST_BYTES:
            raise ValueError("it does not end")
    return bytes(received)


def _printable(value: Any) -> Any:
    """The same, with what would be an order to the terminal written out."""
    if isinstance(value, str):
        return "".join(
            letter if letter.isprintable() else letter.encode("unicode_escape").decode()
            for letter in value
        )
    if isinstance(value, list):
        return [_printable(part) for part in value]
    if isinstance(value, dict):
        return {_printable(name): _printable(part) for name, part in value.items()}
    return value
