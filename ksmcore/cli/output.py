"""What the command line itself says beside a program: on stderr, and into files.

Called by `run` and `estimate`. The program may have closed stderr, or put something else there; it
may have changed its directory. So both are looked up before it begins.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

__all__ = ["Messages", "OutputFile"]

STDERR = 2


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
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        if self._identity is None or self._identify() != self._identity:
            return
        data = "".join(f"{line}\n" for line in lines).encode(errors="replace")
        with contextlib.suppress(OSError):
            while data:
                data = data[os.write(STDERR, data) :]


class OutputFile:
    """A file that is written when the program has ended."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self._absolute = Path(os.path.abspath(path))

    def write(self, text: str) -> None:
        """All at once: what was there before stays until it is replaced. Raises OSError."""
        if self._absolute.exists() and not self._absolute.is_file():
            self._absolute.write_text(text, encoding="utf-8")  # a terminal, a pipe, /dev/null
            return
        unfinished = self._absolute.with_name(f".{self._absolute.name}.{os.getpid()}")
        try:
            unfinished.write_text(text, encoding="utf-8")
            unfinished.replace(self._absolute)
        except OSError:
            with contextlib.suppress(OSError):
                unfinished.unlink(missing_ok=True)
            raise
