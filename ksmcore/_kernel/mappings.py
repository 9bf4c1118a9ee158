"""This process's mappings, by what the kernel tells of them without a look at their pages.

From Linux 6.11 on it is asked for single mappings (PROCMAP_QUERY, some 2 us each); before, all text
of ``/proc/self/maps`` is read, which takes longer the more mappings there are.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import struct
from collections.abc import Iterator
from typing import NamedTuple

from ksmcore._kernel import files, procfs
from ksmcore._kernel.syscalls import page_bytes

__all__ = ["Mapping", "Mappings"]

# size, flags, address asked for | start, end, permissions, page size, offset, inode | major, minor,
# sizes of name and build id | where these go
_QUERY = struct.Struct("=9Q4I2Q")
_PROCMAP_QUERY = 3 << 30 | _QUERY.size << 16 | ord("f") << 8 | 17
_COVERING_OR_NEXT = 0x10
_MOST_NAME_BYTES = 4096

_HEAD = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S+) ([0-9a-f]+) (\S+):(\S+) ([0-9]+) *(.*)")


class Mapping(NamedTuple):
    start: int
    end: int
    permissions: str
    """As ``maps`` has them: r, w, x or -, then s for shared or p for private."""
    offset: int
    device: tuple[int, int]
    inode: int
    """0: no file."""
    path: str
    """File name, or a name in brackets, or "" for plain anonymous memory."""
    page_bytes: int
    """Where it is not told: those of the system."""


class Mappings:
    """Answers for any number of ranges; where there is nothing but text that is read once.

    Raises OSError, as its methods do: the kernel does not tell, or not now.
    """

    def __init__(self) -> None:
        self._text: list[Mapping] | None = None
        self._name = ctypes.create_string_buffer(_MOST_NAME_BYTES)

    def overlapping(self, addr: int, end: int) -> list[Mapping]:
        """The mappings that overlap [addr, end), lowest first."""
        if self._text is None:
            # Whatever a filter may answer, "no such mapping" included, the text is asked then.
            fd = files.open_read("/proc/self/maps")
            try:
                with contextlib.suppress(OSError):
                    if found := list(self._asked(fd, addr, end)):
                        return found
            finally:
                files.close(fd)
            text = procfs.read("/proc/self/maps")
            self._text = [_parsed(line) for line in text.removesuffix("\n").split("\n")]
        return [one for one in self._text if one.start < end and one.end > addr]

    def _asked(self, fd: int, addr: int, end: int) -> Iterator[Mapping]:
        while addr < end:
            found = self._query(fd, addr)
            if found is None or found.start >= end:
                return
            yield found
            addr = found.end

    def _query(self, fd: int, addr: int) -> Mapping | None:
        """The mapping there, or the next one."""
        name = ctypes.addressof(self._name)
        question = (_QUERY.size, _COVERING_OR_NEXT, addr, *[0] * 8, len(self._name), 0, name, 0)
        answer = bytearray(_QUERY.pack(*question))
        try:
            fcntl.ioctl(fd, _PROCMAP_QUERY, answer)
        except OSError as error:
            if error.errno == errno.ENOENT:
                return None
            raise
        _, _, _, start, end, flags, size, offset, inode, major, minor, n_name, *_ = _QUERY.unpack(
            answer
        )
        if end <= addr:
            # Somebody has answered in the kernel's place, and nothing.
            raise OSError(errno.ENOTTY, "PROCMAP_QUERY is not answered")
        permissions = "".join(
            either[flags >> n & 1] for n, either in enumerate(("-r", "-w", "-x", "ps"))
        )
        path = os.fsdecode(self._name.value) if n_name else ""
        return Mapping(start, end, permissions, offset, (major, minor), inode, path, size)


def _parsed(line: str) -> Mapping:
    found = _HEAD.match(line)
    if found is None:
        raise OSError(errno.EIO, f"not a line of a maps file: {line[:80]!r}")
    start, end, permissions, offset, major, minor, inode, path = found.groups()
    return Mapping(
        int(start, 16), int(end, 16), permissions, int(offset, 16),
        (int(major, 16), int(minor, 16)), int(inode), path, page_bytes(),
    )  # fmt: skip
