"""The memory of any process, this one included, as it is seen from outside.

Owns two descriptors, of ``/proc/PID/mem`` and ``/proc/PID/pagemap``, which stay with the memory
that they were opened for: of a process that has ended, or became another program, nothing more is
read, whoever has its number then. Nothing is stopped, written, or brought into memory on purpose;
what changes meanwhile is seen as it was before or after.

Only pages that a process has for itself are read. What is mapped from a file and was not written,
or is shared memory, is kept once by the kernel anyway.
"""

from __future__ import annotations

import contextlib
import errno
import os
import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ksmcore._kernel import files, procfs, smaps
from ksmcore._kernel.pagemap_entries import OF_FILE, PRESENT, entries_from
from ksmcore._kernel.syscalls import page_bytes

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["CannotLookError", "Outside", "Pages", "Place"]

# How much is asked for at a time: 256 KiB of pagemap, and memory in pieces that stay in the cache.
ENTRIES = 32_768
MOST_READ_BYTES = 1 << 20
# What the kernel keeps there belongs to no process.
KERNELS = ("[vvar", "[vdso]", "[vsyscall]")
# How the file of a program or library begins, and what it tells of each of its parts: the kind, the
# address and the size in memory.
ELF_64_LITTLE = b"\x7fELF\x02\x01"
ELF_PART = struct.Struct("<I12xQ16xQ8x")
ELF_LOAD = 1


class CannotLookError(Exception):
    """A process cannot be looked at, and what would help."""


class Place(NamedTuple):
    """A mapping."""

    name: str
    """File, name in brackets, or "" for plain anonymous memory."""
    start: int
    end: int
    may_own: bool
    """Whether any page there can be the process's own."""
    is_written_file: bool
    """Whether it is the last part of a program or library: its variables."""


class Pages(NamedTuple):
    """Neighbouring pages, as they were when they were read."""

    addr: int
    data: memoryview
    entries: NDArray[np.uint64]
    """Their entries of pagemap."""


class Outside(contextlib.AbstractContextManager["Outside"]):
    """One process. `close` it, or use it in a `with` block."""

    def __init__(self, pid: int) -> None:
        """Raises CannotLookError."""
        self.pid = pid
        self._mem = self._pagemap = -1
        self.n_gone = 0
        """Pages that were not there any more when they were to be read."""
        self.n_elsewhere = 0
        """Present pages of files and of shared memory, which were not read."""
        self._here = f"/proc/{pid}"
        self._page_bytes = page_bytes()
        self._buffer = bytearray(MOST_READ_BYTES)
        try:
            self._pagemap = files.open_read(f"{self._here}/pagemap")
            self._mem = files.open_read(f"{self._here}/mem")
            self.command = self._read_command()
        except OSError as error:
            self.close()
            raise CannotLookError(_why_not(pid, error)) from None
        if not self.is_there():
            self.close()
            raise CannotLookError(_why_not(pid, ProcessLookupError()))

    def close(self) -> None:
        for fd in (self._mem, self._pagemap):
            if fd >= 0:
                files.close(fd)
        self._mem = self._pagemap = -1

    def __exit__(self, *_: object) -> None:
        self.close()

    def is_there(self) -> bool:
        """Whether the memory that it was opened for still exists."""
        with contextlib.suppress(ProcessLookupError):
            return len(os.pread(self._pagemap, 8, 0)) == 8
        return False

    def _read_command(self) -> list[str]:
        words = procfs.read(f"{self._here}/cmdline").rstrip("\0").split("\0")
        return words if words != [""] else [f"[{procfs.text_of(f'{self._here}/comm')}]"]

    def places(self) -> list[Place]:
        """Its mappings now, lowest first; none of a process that has ended or of the kernel's.

        Raises CannotLookError.
        """
        try:
            # With sizes: a mapping of a terabyte, of which nothing is there, costs nothing then.
            text = procfs.read(f"{self._here}/smaps")
        except (FileNotFoundError, ProcessLookupError):
            return []
        except OSError as error:
            raise CannotLookError(_why_not(self.pid, error)) from None
        found: list[Place] = []
        heads: dict[str, int] = {}
        for vma in smaps.parse_smaps(text.removesuffix("\n").split("\n") if text else []):
            if not vma.path.startswith(KERNELS):
                may_own = not vma.shared and vma.anonymous > 0
                is_data = vma.writable and not vma.shared and vma.path.startswith("/")
                found.append(Place(vma.path, vma.start, vma.end, may_own, is_data))
                if vma.path and vma.offset == 0:
                    heads[vma.path] = vma.start
                if not vma.path:
                    self._part(found, heads)
                if not may_own:
                    self.n_elsewhere += vma.rss // self._page_bytes
        return found

    def _part(self, found: list[Place], heads: dict[str, int]) -> None:
        """Other memory may follow a library's variables, and be of one mapping with those that
        begin as zeros: part the last place there."""
        if len(found) < 2:
            return
        before, place = found[-2:]
        if not before.is_written_file or before.end != place.start:
            return
        end = self._end_of_variables(heads.get(before.name))
        if end is None or end >= place.end:
            return
        if end <= place.start:
            found[-2] = before._replace(is_written_file=False)
        else:
            found[-1:] = [place._replace(end=end), place._replace(start=end)]

    def _end_of_variables(self, head: int | None) -> int | None:
        """The page after those of the program or library whose file is mapped there from its
        beginning; None where that does not tell."""
        page = memoryview(bytearray(self._page_bytes))
        if head is None or not self._fill(head, page) or page[:6] != ELF_64_LITTLE:
            return None
        (offset,) = struct.unpack_from("<Q", page, 32)
        size, count = struct.unpack_from("<HH", page, 54)
        if size < ELF_PART.size or offset + count * size > len(page):
            return None
        parts = [ELF_PART.unpack_from(page, offset + i * size) for i in range(count)]
        loaded = [(start, start + n_bytes) for kind, start, n_bytes in parts if kind == ELF_LOAD]
        if not loaded:
            return None
        begin = loaded[0][0] // self._page_bytes * self._page_bytes
        len_bytes = -(-(loaded[-1][1] - begin) // self._page_bytes) * self._page_bytes
        return head + int(len_bytes)

    def anonymous_places(self) -> list[Place]:
        """Its mappings of private memory that is of no file, without a look at what is there: for
        many mappings a small part of the time.

        Raises OSError.
        """
        lines = procfs.read(f"{self._here}/maps").splitlines()
        # Most are of files, in a program of many libraries; the inode is the fifth word.
        of_no_file = (line for line in lines if line.split(None, 5)[4:5] == ["0"])
        return [
            Place(vma.path, vma.start, vma.end, may_own=True, is_written_file=False)
            for vma in smaps.parse_smaps(of_no_file)
            if not vma.shared and not vma.path.startswith(KERNELS)
        ]

    def own_pages(self, place: Place) -> Iterator[Pages]:
        """The pages of a mapping that are the process's own, read; what it yields holds until the
        next. Raises OSError for what should not happen."""
        step = ENTRIES * self._page_bytes
        for start in range(place.start, place.end, step):
            n_pages = (min(place.end, start + step) - start) // self._page_bytes
            entries = entries_from(self._pagemap, start, n_pages)
            is_there = (entries & PRESENT) != 0
            is_own = is_there & ((entries & OF_FILE) == 0)
            self.n_elsewhere += int(np.count_nonzero(is_there) - np.count_nonzero(is_own))
            for first, last in _stretches(is_own, MOST_READ_BYTES // self._page_bytes):
                yield from self._read(start + first * self._page_bytes, entries[first:last])

    def _read(self, addr: int, entries: NDArray[np.uint64]) -> Iterator[Pages]:
        """Page by page where the whole cannot be read: some of it was unmapped meanwhile."""
        size = len(entries) * self._page_bytes
        data = memoryview(self._buffer)[:size]
        if self._fill(addr, data):
            yield Pages(addr, data, entries)
            return
        for i in range(len(entries)):
            at, one = addr + i * self._page_bytes, data[: self._page_bytes]
            if self._fill(at, one):
                yield Pages(at, one, entries[i : i + 1])
            else:
                self.n_gone += 1

    def _fill(self, addr: int, data: memoryview) -> bool:
        done = 0
        while done < len(data):
            try:
                n = os.preadv(self._mem, [data[done:]], addr + done)
            except OSError as error:
                if error.errno in (errno.EIO, errno.EFAULT, errno.ESRCH, errno.ENOMEM):
                    return False
                raise
            if n == 0:
                return False
            done += n
        return True


def _stretches(is_wanted: NDArray[np.bool_], longest: int) -> Iterator[tuple[int, int]]:
    """(first, one after the last) of what is wanted and adjacent, in pieces."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], is_wanted, [False]))))
    for first, last in edges.reshape(-1, 2).tolist():
        for start in range(first, last, longest):
            yield start, min(start + longest, last)


def _why_not(pid: int, error: OSError) -> str:
    """In words, with what helps."""
    # Of what has ended, and is not yet waited for, the kernel says either.
    has_ended = procfs.words(f"/proc/{pid}/status").get("State", "")[:1] in ("Z", "X")
    if isinstance(error, (FileNotFoundError, ProcessLookupError)) or has_ended:
        if os.path.exists(f"/proc/{pid}"):
            return f"process {pid} has no memory: it has ended, or is a thread of the kernel"
        return f"there is no process {pid}"
    if not isinstance(error, PermissionError):
        return f"process {pid} cannot be looked at: {error.strerror}"
    return f"process {pid} may not be looked at: {_what_helps(pid)}"


def _what_helps(pid: int) -> str:
    scope = procfs.number("/proc/sys/kernel/yama/ptrace_scope") or 0
    if scope == 3:
        return (
            "nobody may here, until the machine starts anew with kernel.yama.ptrace_scope below 3"
        )
    privileged = (
        "as root (sudo), or in a container with the capability SYS_PTRACE "
        "(docker run --cap-add SYS_PTRACE), it works"
    )
    try:
        owner = os.stat(f"/proc/{pid}").st_uid
    except OSError:
        return privileged
    if owner != os.geteuid():
        return f"it is of user {owner}; {privileged}"
    if scope:
        return (
            f"kernel.yama.ptrace_scope is {scope}, which keeps a user's processes from each other; "
            f"{privileged}" + (", or after sudo sysctl kernel.yama.ptrace_scope=0" * (scope == 1))
        )
    return f"it has more rights than this process, or had itself closed to others; {privileged}"
