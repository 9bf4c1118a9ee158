"""What the command line itself says beside a program: on stderr, and into files.

The program may have closed stderr, or put something else there; it may have changed its directory.
So both are looked up before it begins.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import sys
from pathlib import Path

__all__ = ["Messages", "OutputFile"]

STDOUT = 1
STDERR = 2
# As many as the kernel follows.
MOST_LINKS = 40
# Endings of what nobody wants a report written over.
PROGRAMS = {".py", ".pyw", ".pyc", ".pyz", ".ipynb"}


class Messages:
    """Lines on the stderr that the process was started with."""

    def __init__(self) -> None:
        self._identity = self._identify()

    @staticmethod
    def _identify() -> tuple[int, int] | None:
        with contextlib.suppress(OSError):
            found = os.fstat(STDERR)
            return found.st_dev, found.st_ino
        return None

    def say(self, *lines: str) -> None:
        """Write lines, after what the program wrote so far. Nothing if stderr is not what it was:
        it may be a file of the program's own now."""
        _flush()
        if self._identity is None or self._identify() != self._identity:
            return
        data = "".join(f"{line}\n" for line in lines).encode(errors="replace")
        with contextlib.suppress(OSError):
            while data:
                data = data[os.write(STDERR, data) :]


def _flush() -> None:
    """What the program wrote so far comes first."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()


def _own_output(path: str) -> int | None:
    """A duplicate of stdout or stderr, if that goes to this file: whoever else writes through it
    then goes on behind what is written."""
    for fd in (STDOUT, STDERR):
        with contextlib.suppress(OSError):
            if os.path.samestat(os.stat(path), os.fstat(fd)):
                return os.dup(fd)
    return None


def _resolved(path: str) -> str:
    """Where a file lies, or would be made: every link on the way followed.

    Raises:
        PermissionError: a link on the way is planted, see `_check_owner`.
    """
    place, n_links = "/", 0
    todo = os.path.join(os.getcwd(), path).split("/")[::-1]
    while todo:
        part = todo.pop()
        if part == "..":
            place = os.path.dirname(place)
        if part in ("", ".", ".."):
            continue
        here = os.path.join(place, part)
        try:
            target = os.readlink(here)
        except OSError:  # no link, or nothing
            place = here
            continue
        n_links += 1
        if n_links > MOST_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
        _check_owner(here)
        place = "/" if target.startswith("/") else place
        todo += target.split("/")[::-1]
    return place


def _check_owner(path: str) -> None:
    """Of what lies where everybody can write only root's, one's own, and what belongs to the owner
    of the directory leads further: any other may be there to have this user's rights put to use.
    So has it the kernel (fs.protected_symlinks, protected_fifos), where it is told to."""
    found, around = os.lstat(path), os.stat(os.path.dirname(path))
    if around.st_mode & stat.S_IWOTH and found.st_uid not in (os.geteuid(), 0, around.st_uid):
        why = f"user {found.st_uid} has put it where everybody can write"
        raise PermissionError(errno.EACCES, why, path)


def _check_replaceable(path: Path) -> None:
    """In a sticky directory a file of another user's stays."""
    around = path.parent.stat()
    if not around.st_mode & stat.S_ISVTX or not os.path.lexists(path):
        return
    if os.geteuid() not in (0, around.st_uid, path.lstat().st_uid):
        raise PermissionError(errno.EACCES, "it is another user's", str(path))


def _open_directory(path: str) -> int:
    """A descriptor of the directory of that name, if no link leads there by now."""
    fd = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    for part in path.split("/")[1:]:
        flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            inner = os.open(part or ".", flags, dir_fd=fd)
        finally:
            os.close(fd)
        fd = inner
    return fd


def _identity(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_dev, status.st_ino, stat.S_IFMT(status.st_mode)


class OutputFile:
    """A file that is written when the program has ended.

    Hours may have gone by then, in which others could put links in its place: so nothing is written
    through a name that is looked up again without care.
    """

    def __init__(self, path: str) -> None:
        """What can be known to go wrong is told now, before the program runs for hours.

        Raises:
            ValueError: a program, which somebody forgot to give a file's name before; or no file.
            OSError: nothing can be written there, or it should not.
        """
        if path in ("", "-"):
            raise ValueError(f"{path!r} is no file's name")
        self.path = Path(path)
        real = _resolved(path)
        self._fd = _own_output(path)
        self._is_replaced = self._fd is None and (
            not self.path.exists()
            or (self.path.is_file() and os.path.exists(real) and os.path.samefile(path, real))
        )
        # Where it really lies: the program may go elsewhere, and a link stays one. What /dev/stdout
        # and /dev/fd/3 lead to may have no name.
        self._real = Path(real if self._is_replaced else os.path.abspath(path))
        if self._real.exists() and self._real.suffix in PROGRAMS:
            raise ValueError(f"{path} is a program, and would be overwritten")
        if self._real.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        if not self._real.parent.is_dir():
            raise FileNotFoundError(errno.ENOENT, "no such directory", str(self.path.parent))
        if not os.access(self._real.parent if self._is_replaced else self._real, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        if self._is_replaced:
            _check_replaceable(self._real)
        elif self._fd is None:
            if os.path.lexists(real):
                _check_owner(real)
            self._found = _identity(self._real.stat())

    def is_same_file(self, other: OutputFile) -> bool:
        """Would one of the two be replaced by the other?"""
        return self._is_replaced and self._real == other._real

    def write(self, text: str) -> None:
        """All at once: what was there before stays until it is replaced. Raises OSError."""
        # A file's name in it may be no text.
        data = text.encode(errors="backslashreplace")
        try:
            if self._is_replaced:
                self._replace(data)
            else:
                self._append(data)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from None

    def _append(self, data: bytes) -> None:
        """To a terminal, a pipe, /dev/null, or where the program's own output goes."""
        _flush()
        fd, self._fd = self._fd, None
        goes_on = fd is not None  # behind what is there
        if fd is None:
            self._check_same(self._real.stat())  # to open something else may do something
            fd = os.open(self._real, os.O_WRONLY | os.O_NOCTTY | os.O_CLOEXEC)
            try:
                self._check_same(os.fstat(fd))
            except OSError:
                os.close(fd)
                raise
        with open(fd, "wb") as file:
            if stat.S_ISREG(os.fstat(fd).st_mode) and not goes_on:
                file.truncate()
            file.write(data)

    def _check_same(self, status: os.stat_result) -> None:
        if _identity(status) != self._found:
            raise PermissionError(errno.EACCES, "it is something else by now", str(self.path))

    def _replace(self, data: bytes) -> None:
        """By a new file that the same people may read as the one that it replaces."""
        directory = _open_directory(str(self._real.parent))
        unfinished = f".ksmcore-{os.urandom(8).hex()}"
        try:
            mode = self._mode_before(directory)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            fd = os.open(unfinished, flags, 0o666 if mode is None else 0o600, dir_fd=directory)
            try:
                with open(fd, "wb") as file:
                    if mode is not None:
                        os.fchmod(fd, mode)
                    file.write(data)
                os.replace(unfinished, self._real.name, src_dir_fd=directory, dst_dir_fd=directory)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(unfinished, dir_fd=directory)
                raise
        finally:
            os.close(directory)

    def _mode_before(self, directory: int) -> int | None:
        """Who may do what with the file that is there; None if there is none."""
        try:
            before = os.stat(self._real.name, dir_fd=directory, follow_symlinks=False)
        except FileNotFoundError:
            return None
        if not stat.S_ISREG(before.st_mode):
            return None
        # A file of another's is no reason to let him write into one of ours.
        kept = 0o777 if before.st_uid == os.geteuid() else 0o755
        return before.st_mode & kept
