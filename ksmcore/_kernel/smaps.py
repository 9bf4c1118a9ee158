"""What the kernel says of this process's memory mappings, read from ``/proc/self``.

Owns the parsing of ``smaps``, ``maps``, ``numa_maps`` and ``smaps_rollup``; holds no state between
calls and changes no mapping. All addresses and sizes are in bytes.

Why every question about flags reads ``smaps`` from its start. Measured on Linux 6.18 in a virtual
machine with slow page tables:

* One pass over ``smaps`` costs 2.5-3 us per mapping, and a walk over the page tables of what is
  resident: 1.2 ms for an interpreter with NumPy and 195 mappings, 10-15 ms more for each GiB of
  small resident pages, 145-175 ms for 60,000 mappings.
* ``smaps`` cannot be entered in the middle: a file offset is a number of bytes of text, and the
  kernel produces all text before it (114 ms for an offset behind the end).
* The ioctl PROCMAP_QUERY (Linux 6.11) finds a mapping in 1.3-2 us, but tells neither no-fork,
  no-dump, wipe-on-fork, huge page advice, protection key nor userfaultfd. No other call tells them
  without changing something, so a "good" answer from it would be a guess.

What remains is to stop at the end of the range in question, and not to read twice: `Snapshot`
answers for any number of buffers after one read.
"""

from __future__ import annotations

import bisect
import ctypes
import errno
import mmap
import os
import platform
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

__all__ = [
    "Snapshot",
    "Vma",
    "count_maps",
    "locked_bytes",
    "max_map_count",
    "numa_policy_of",
    "own_numa_policy",
    "parse_numa_maps",
    "parse_smaps",
    "smaps_rollup",
    "sum_smaps",
    "vmas_in",
]

# The kernel's own default, for sandboxes that hide the sysctl.
DEFAULT_MAX_MAP_COUNT = 65_530

# One read() of smaps returns whole records, as many as fit into a buffer of one page inside the
# kernel; asking for more only wastes the allocation on this side.
_SMAPS_READ_BYTES = 16 << 10
# maps has records of some 100 bytes, and is treated alike.
_MAPS_READ_BYTES = 64 << 10

_ADDRESS_END = 1 << 64

_HEADER = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S+) ([0-9a-f]+) \S+ ([0-9]+)(?: +(.*))?")
_HEADER_START = re.compile(rb"([0-9a-f]+)-[0-9a-f]+ ")

# Sizes of one mapping: our field name for the kernel's.
_SIZE_FIELDS = {
    "Rss": "rss",
    "Pss": "pss",
    "Anonymous": "anonymous",
    "Swap": "swap",
    "Locked": "locked",
}


@dataclass(frozen=True, slots=True)
class Vma:
    """One mapping as ``/proc/self/smaps`` shows it; every size is in bytes.

    A field that the running kernel does not print holds its neutral value: 0, an empty set, or
    the system page size for `page_bytes`.
    """

    start: int
    """Address of the first byte."""
    end: int
    """Address after the last byte."""
    readable: bool
    writable: bool
    executable: bool
    shared: bool
    offset: int
    """Offset in the mapped file."""
    inode: int
    """Inode of the mapped file; 0 for private anonymous memory."""
    path: str
    """File name, or a name in brackets, or "" for plain anonymous memory."""
    flags: frozenset[str]
    """Two-letter codes of the VmFlags line."""
    page_bytes: int
    """KernelPageSize; differs from the system page for hugetlb only, not for huge page advice."""
    protection_key: int
    rss: int
    pss: int
    anonymous: int
    swap: int
    locked: int
    """PSS of what mlock(2) holds; the ``lo`` flag says whether it applies at all."""


def parse_smaps(lines: Iterable[str]) -> Iterator[Vma]:
    """Turn the text of an smaps file into mappings, in the order of the text.

    Unknown lines are passed over, and missing ones leave the neutral value, so that older and
    newer kernels are both understood.

    Raises:
        ValueError: the first line is not the head of a mapping.
    """
    head: re.Match[str] | None = None
    fields: dict[str, str] = {}
    for line in lines:
        match = _HEADER.fullmatch(line.removesuffix("\n"))
        if match is not None:
            if head is not None:
                yield _make_vma(head, fields)
            head, fields = match, {}
            continue
        if head is None:
            raise ValueError(f"not the text of an smaps file, which begins {line[:80]!r}")
        key, _, value = line.partition(":")
        fields[key] = value
    if head is not None:
        yield _make_vma(head, fields)


def _make_vma(head: re.Match[str], fields: dict[str, str]) -> Vma:
    start, end, permissions, offset, inode, path = head.groups()
    sizes = {ours: _kib_field(fields.get(theirs, "")) for theirs, ours in _SIZE_FIELDS.items()}
    key = fields.get("ProtectionKey", "").strip()
    return Vma(
        start=int(start, 16),
        end=int(end, 16),
        readable="r" in permissions,
        writable="w" in permissions,
        executable="x" in permissions,
        shared="s" in permissions,
        offset=int(offset, 16),
        inode=int(inode),
        path=path or "",
        flags=frozenset(fields.get("VmFlags", "").split()),
        page_bytes=_kib_field(fields.get("KernelPageSize", "")) or mmap.PAGESIZE,
        protection_key=int(key) if key.isdigit() else 0,
        **sizes,
    )


def _kib_field(value: str) -> int:
    """Bytes of a value such as ``"  132 kB"``; 0 for anything else."""
    words = value.split()
    return int(words[0]) << 10 if len(words) == 2 and words[0].isdigit() else 0


class Snapshot:
    """The text of smaps for a stretch of addresses, parsed only where it is asked about.

    Other threads may change mappings at any time, also while the text is read: a mapping that
    grows meanwhile can appear twice. Ranges whose owner keeps them mapped (a held buffer export)
    are always covered by what is really there.
    """

    __slots__ = ("_chunks", "_parsed", "_parsed_range", "_starts")

    def __init__(self, start: int = 0, end: int = _ADDRESS_END) -> None:
        """Read what the kernel says of the mappings that overlap [start, end).

        Raises:
            OSError: smaps cannot be opened or read (a sandbox without it, no descriptor left).
        """
        # Each chunk begins with the head of a record, whose address stands in _starts; so a
        # mapping is found by bisection, and 60,000 of them are never parsed for the sake of one.
        self._chunks: list[bytes] = []
        self._starts: list[int] = []
        # The last stretch of chunks that was parsed: many buffers lie in one mapping.
        self._parsed_range = (0, 0)
        self._parsed: list[Vma] = []
        for first, chunk in _chunks_of("/proc/self/smaps"):
            if first >= end:
                break
            if first <= start:
                # Everything before this chunk lies below the range.
                self._chunks.clear()
                self._starts.clear()
            self._chunks.append(chunk)
            self._starts.append(first)

    def vmas_in(self, start: int, end: int) -> list[Vma]:
        """The mappings that overlap [start, end), lowest first."""
        low = max(bisect.bisect_right(self._starts, start) - 1, 0)
        high = bisect.bisect_left(self._starts, end)
        if self._parsed_range != (low, high):
            text = os.fsdecode(b"".join(self._chunks[low:high]))
            # The kernel writes a newline in a file name as \012, but leaves alone other
            # characters at which splitlines() would break.
            lines = text.removesuffix("\n").split("\n") if text else []
            self._parsed = list(parse_smaps(lines))
            self._parsed_range = (low, high)
        return [vma for vma in self._parsed if vma.start < end and vma.end > start]


def _chunks_of(path: str) -> Iterator[tuple[int, bytes]]:
    """Pieces of an smaps file that begin at the head of a record, each with the address there."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        pending = b""
        while chunk := os.read(fd, _SMAPS_READ_BYTES):
            # A read normally gives whole records; where it does not, the pieces are joined.
            if pending.endswith(b"\n") and _HEADER_START.match(chunk):
                yield _first_address(pending), pending
                pending = chunk
            else:
                pending += chunk
        if pending:
            yield _first_address(pending), pending
    finally:
        os.close(fd)


def _first_address(chunk: bytes) -> int:
    """Address in the head that `chunk` begins with; 0 for other text, which the parser refuses."""
    head = _HEADER_START.match(chunk)
    return int(head[1], 16) if head else 0


def vmas_in(start: int, end: int) -> list[Vma]:
    """The mappings that overlap [start, end), lowest first; gaps are simply absent.

    Reads smaps from its start up to `end`, about 2.5 us per mapping on the way.

    Raises:
        OSError: smaps cannot be opened or read.
    """
    return Snapshot(start, end).vmas_in(start, end)


# get_mempolicy(2) is in no C library that Python can count on, so it is called by number. It only
# reads, and is not on the path of a page; hence not in _sys.
_GET_MEMPOLICY_NR = {"x86_64": 239, "aarch64": 236}
_libc = ctypes.CDLL(None, use_errno=True)
_MPOL_F_ADDR = 1 << 1
_MPOL_MODE_MASK = (1 << 13) - 1  # the bits above are the modifiers (static, relative, balancing)
_MPOL_NAMES = {
    0: "default",
    1: "preferred",
    2: "bind",
    3: "interleave",
    4: "local",
    5: "preferred (many)",
    6: "weighted interleave",
}


def numa_policy_of(start: int, end: int) -> str | None:
    """Name of the first NUMA policy that a mapping in [start, end) has of its own, else None.

    Raises:
        OSError: see `own_numa_policy`; or smaps cannot be read.
    """
    found = own_numa_policy(vmas_in(start, end))
    return None if found is None else found[1]


def own_numa_policy(mappings: Sequence[Vma]) -> tuple[Vma, str] | None:
    """The first of `mappings` that has a NUMA policy of its own, and the policy; None if none has.

    A policy of the whole process (``numactl --interleave=all python``) does not count: memory
    mapped anew falls under it again, so it needs no care.

    One get_mempolicy(2) per mapping, about 2 us, answers this. Where a container forbids the call
    ``/proc/self/numa_maps`` is read, as slow as smaps; it prints the process's policy for
    mappings without one, hence the comparison in `parse_numa_maps`. A kernel that has neither has
    no NUMA support, which gives None.

    Raises:
        OSError: the kernel fails in another way than not to know or to forbid the question.
    """
    try:
        for vma in mappings:
            policy = _policy_at(vma.start)
            if policy is not None:
                return vma, policy
        return None
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EPERM, errno.EACCES):
            raise
    try:
        with open("/proc/self/numa_maps", encoding="utf-8", errors="surrogateescape") as lines:
            found = parse_numa_maps(lines, {vma.start for vma in mappings})
    except (FileNotFoundError, PermissionError):
        return None
    if found is None:
        return None
    addr, policy = found
    return next(vma for vma in mappings if vma.start == addr), policy


def _policy_at(addr: int) -> str | None:
    """Policy of the mapping at `addr`, None for "default" and for no mapping.

    Raises:
        OSError: with ENOSYS where the call is not known, EPERM where it is forbidden.
    """
    number = _GET_MEMPOLICY_NR.get(platform.machine())
    if number is None:
        raise OSError(errno.ENOSYS, "get_mempolicy has no known number on this processor")
    mode = ctypes.c_int(0)
    result = _libc.syscall(
        ctypes.c_long(number),
        ctypes.byref(mode),
        None,
        ctypes.c_ulong(0),
        ctypes.c_void_p(addr),
        ctypes.c_ulong(_MPOL_F_ADDR),
    )
    if result != 0:
        code = ctypes.get_errno()
        if code == errno.EFAULT:  # nothing is mapped here (any more)
            return None
        raise OSError(code, f"get_mempolicy at {addr:#x}: {os.strerror(code)}")
    code = mode.value & _MPOL_MODE_MASK
    return None if code == 0 else _MPOL_NAMES.get(code, f"mode {code}")


def parse_numa_maps(lines: Iterable[str], starts: Iterable[int]) -> tuple[int, str] | None:
    """The first address in `starts` whose line in numa_maps text shows a policy, and the policy.

    The first line belongs to the program file, on which nobody sets a policy; so what it shows is
    the policy of the process, and a mapping that shows the same is taken to have none. None if
    there is no other.
    """
    wanted = set(starts)
    process_policy: str | None = None
    for line in lines:
        words = line.split(maxsplit=2)
        if len(words) < 2:
            continue
        addr, policy = int(words[0], 16), words[1]
        if process_policy is None:
            process_policy = policy
        if addr in wanted and policy not in ("default", process_policy):
            return addr, policy
    return None


def count_maps() -> int:
    """Number of mappings of this process, about 0.35 us each (21 ms for 60,000).

    Raises:
        OSError: maps cannot be opened or read.
    """
    n_lines = 0
    fd = os.open("/proc/self/maps", os.O_RDONLY | os.O_CLOEXEC)
    try:
        while chunk := os.read(fd, _MAPS_READ_BYTES):
            n_lines += chunk.count(b"\n")
    finally:
        os.close(fd)
    return n_lines


def max_map_count() -> int:
    """How many mappings the kernel lets a process have; its default where the sysctl is hidden."""
    try:
        with open("/proc/sys/vm/max_map_count", "rb") as sysctl:
            return int(sysctl.read())
    except (OSError, ValueError):
        return DEFAULT_MAX_MAP_COUNT


def locked_bytes() -> int | None:
    """Bytes of this process under mlock(2) or mlockall(2); None if the kernel does not say.

    Raises:
        OSError: status cannot be opened or read.
    """
    with open("/proc/self/status", "rb") as status:
        for line in status:
            if line.startswith(b"VmLck:"):
                return _kib_field(line[len(b"VmLck:") :].decode("ascii"))
    return None


def smaps_rollup() -> dict[str, int]:
    """Sums over all mappings of this process: the kernel's names (Rss, Pss, Swap, ...) to bytes.

    About 16 ms with 60,000 mappings. Kernels before 4.14 have no smaps_rollup; there the fields
    of smaps are added up, ten times slower. The sizes that are not sums (Size of the mapping,
    page sizes) are left out in both cases.

    Raises:
        OSError: neither file can be read.
    """
    try:
        with open("/proc/self/smaps_rollup", encoding="utf-8", errors="surrogateescape") as lines:
            return sum_smaps(lines)
    except FileNotFoundError:
        with open("/proc/self/smaps", encoding="utf-8", errors="surrogateescape") as lines:
            return sum_smaps(lines)


def sum_smaps(lines: Iterable[str]) -> dict[str, int]:
    """Add up the kB fields of smaps or smaps_rollup text; kernel's names to bytes."""
    sums: dict[str, int] = {}
    for line in lines:
        key, colon, value = line.partition(":")
        if not colon or not value.endswith("kB\n"):
            continue
        if key in ("Size", "KernelPageSize", "MMUPageSize"):
            continue
        sums[key] = sums.get(key, 0) + _kib_field(value)
    return sums
