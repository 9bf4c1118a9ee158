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


class OutputFile:
    """A file that is written when the program has ended."""

    def __init__(self, path: str) -> None:
        """What can be known to go wrong is told now, before the program runs for hours.

        Raises:
            ValueError: a program, which somebody forgot to give a file's name before; or no file.
            OSError: nothing can be written there.
        """
        if path in ("", "-"):
            raise ValueError(f"{path!r} is no file's name")
        self.path = Path(path)
        self._fd = _own_output(path)
        self._is_replaced = self._fd is None and (self.path.is_file() or not self.path.exists())
        # Where it really lies: the program may go elsewhere, and a link stays one. What /dev/stdout
        # and /dev/fd/3 lead to may have no name.
        self._real = Path(os.path.realpath(path) if self._is_replaced else os.path.abspath(path))
        if self._real.exists() and self._real.suffix in PROGRAMS:
            raise ValueError(f"{path} is a program, and would be overwritten")
        if self._real.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        if not self._real.parent.is_dir():
            raise FileNotFoundError(errno.ENOENT, "no such directory", str(self.path.parent))
        if not os.access(self._real.parent if self._is_replaced else self._real, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    def is_same_file(self, other: OutputFile) -> bool:
        """Would one of the two be replaced by the other?"""
        return self._is_replaced and self._real == other._real

    def write(self, text: str) -> None:
        """All at once: what was there before stays until it is replaced. Raises OSError."""
        if not self._is_replaced:
            # A terminal, a pipe, /dev/null, or where the program's own output goes.
            _flush()
            target = self._real if self._fd is None else self._fd
            with open(target, "w", encoding="utf-8") as file:
                file.write(text)
            self._fd = None
            return
        unfinished = self._real.with_name(f".{self._real.name}.{os.getpid()}")
        try:
            self._write_as_before(unfinished, text)
            unfinished.replace(self._real)
        except OSError as error:
            with contextlib.suppress(OSError):
                unfinished.unlink(missing_ok=True)
            raise OSError(error.errno, error.strerror, str(self.path)) from None

    def _write_as_before(self, path: Path, text: str) -> None:
        """A new file that the same people may read as the one that it is to replace."""
        mode = stat.S_IMODE(self._real.stat().st_mode) if self._real.exists() else None

        def opened(name: str, flags: int) -> int:
            return os.open(name, flags, 0o666 if mode is None else 0o600)

        with open(path, "w", encoding="utf-8", opener=opened) as file:
            if mode is not None:
                os.fchmod(file.fileno(), mode)
            file.write(text)
