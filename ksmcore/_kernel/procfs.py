"""The small files of the kernel: lines "Name: 12 kB", single values, and the limits on memory.

Holds no state between calls. Unmerging asks here, and has to work where little is left: so there is
no codec, which a process in a chroot could not import any more, and no `open`, which an interpreter
that ends takes away before the last engine is closed.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from ksmcore._kernel import files

__all__ = [
    "available_bytes",
    "control_groups",
    "fields",
    "locked_bytes",
    "max_map_count",
    "number",
    "processors",
    "size_bytes",
    "sizes",
    "sizes_of",
    "text_of",
    "threads_blocking",
    "words",
]

# The kernel's own default, for sandboxes that hide the sysctl.
DEFAULT_MAX_MAP_COUNT = 65_530
# Left free for everybody else: unmerging must not be what brings the machine down.
RESERVE_BYTES = 16 << 20

CGROUPS = Path("/sys/fs/cgroup")
TASKS = Path("/proc/self/task")
# Signals 32 and 33, in a mask.
OF_THE_LIBRARY = 3 << 31
# How the names of threads begin that write into no memory but their own: ZeroMQ's, of which every
# Jupyter kernel has some. `_guard/threads.h` knows them too.
HARMLESS_THREADS = ("ZMQbg/",)


# ---- files ---------------------------------------------------------------------------------------


def read(path: str | Path) -> str:
    """All text of a file. Raises OSError."""
    return os.fsdecode(files.read_all(path))


def text_of(path: str | Path) -> str:
    """All text of a file, without the white space around it; "" for what cannot be read."""
    try:
        return read(path).strip()
    except OSError:
        return ""


def number(path: str | Path) -> int | None:
    """The one number that a file holds; None for a word, and for what cannot be read."""
    text = text_of(path)
    return int(text) if text.isdecimal() else None


def fields(lines: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(name, value) of the lines "Name: value"; others are passed over."""
    for line in lines:
        name, colon, value = line.partition(":")
        if colon:
            yield name.strip(), value.strip()


def words(path: str | Path) -> dict[str, str]:
    """Name -> value of a file of such lines; nothing of one that cannot be read."""
    return dict(fields(text_of(path).split("\n")))


def size_bytes(value: str | None) -> int | None:
    """Bytes of a value such as "132 kB"; None for anything else."""
    amount, _, unit = (value or "").strip().partition(" ")
    return int(amount) << 10 if unit == "kB" and amount.isdecimal() else None


def sizes(lines: Iterable[str]) -> Iterator[tuple[str, int]]:
    """(name, bytes) of the lines "Name: 12 kB"; others are passed over."""
    for name, value in fields(lines):
        n_bytes = size_bytes(value)
        if n_bytes is not None:
            yield name, n_bytes


def sizes_of(path: str | Path) -> dict[str, int]:
    """Name -> bytes of a file of such lines; nothing of one that cannot be read."""
    return dict(sizes(text_of(path).split("\n")))


# ---- this process --------------------------------------------------------------------------------


def max_map_count() -> int:
    """How many mappings the kernel lets a process have; its default where the sysctl is hidden."""
    found = number("/proc/sys/vm/max_map_count")
    return DEFAULT_MAX_MAP_COUNT if found is None else found


def locked_bytes() -> int | None:
    """Bytes of this process under mlock(2) or mlockall(2); None if the kernel does not say.

    Raises:
        OSError: status cannot be opened or read.
    """
    return dict(sizes(read("/proc/self/status").split("\n"))).get("VmLck")


def threads_blocking(signum: int, tasks: Path = TASKS) -> list[str] | None:
    """The threads that block a signal, by the names that Python gives them, or else by number; None
    where the kernel does not tell.

    Not those that write into no memory but their own. They are known by name; or they also block
    what the C library keeps for itself, which no program can: they are about to be made, or threads
    of the kernel's.
    """
    names = {str(thread.native_id): thread.name for thread in threading.enumerate()}
    try:
        threads = sorted(os.listdir(tasks))
    except OSError:
        return None
    found = []
    for status in (tasks / thread / "status" for thread in threads):
        # Nothing of a thread that has ended meanwhile.
        told = words(status)
        mask = int(told.get("SigBlk", "0"), 16)
        is_harmless = told.get("Name", "").startswith(HARMLESS_THREADS)
        is_harmless |= mask & OF_THE_LIBRARY == OF_THE_LIBRARY
        if mask >> (signum - 1) & 1 and not is_harmless:
            found.append(names.get(status.parent.name, status.parent.name))
    return found if threads else None


# ---- processors ----------------------------------------------------------------------------------


def processors(membership: Path = Path("/proc/self/cgroup"), cgroups: Path = CGROUPS) -> int:
    """How many processors this process may keep busy: those that it may run on, and no more than
    its control groups give it the time of (version 2 or 1). At least 1."""
    n = len(os.sched_getaffinity(0))
    for group in control_groups(membership, cgroups, "cpu"):
        quota, _, period = text_of(group / "cpu.max").partition(" ")
        quota = quota or text_of(group / "cpu.cfs_quota_us")
        period = period or text_of(group / "cpu.cfs_period_us")
        if quota.isdecimal() and period.isdecimal() and int(period) > 0:
            n = min(n, -(-int(quota) // int(period)))
    return max(n, 1)


# ---- headroom: how much more memory there is before the kernel begins to kill --------------------


def available_bytes(
    meminfo: Path = Path("/proc/meminfo"),
    membership: Path = Path("/proc/self/cgroup"),
    cgroups: Path = CGROUPS,
) -> int:
    """Bytes that can be allocated now, on the machine and under every control group's limit.

    Less a small reserve; at least 0. What cannot be read does not limit.
    """
    limits = [_group_room(group) for group in control_groups(membership, cgroups)]
    limits.append(_machine_room(meminfo))
    known = [room for room in limits if room is not None]
    return max(min(known, default=1 << 62) - RESERVE_BYTES, 0)


def _machine_room(meminfo: Path) -> int | None:
    """MemAvailable, and free swap: pages may go there."""
    there = sizes_of(meminfo)
    if "MemAvailable" not in there:
        return None
    return there["MemAvailable"] + there.get("SwapFree", 0)


def control_groups(membership: Path, cgroups: Path, controller: str = "memory") -> list[Path]:
    """The directories of this process's control groups that limit that, parents included."""
    found = []
    for line in text_of(membership).split("\n"):
        hierarchy, _, rest = line.partition(":")
        controllers, _, name = rest.partition(":")
        if hierarchy == "0":
            root = cgroups
        elif controller in controllers.split(","):
            root = cgroups / controller
        else:
            continue
        path = PurePosixPath(name)
        # In a container the name may be the host's: what is not there is skipped, the root is not.
        found += [root / str(part).lstrip("/") for part in (path, *path.parents)]
    return found


def _group_room(group: Path) -> int | None:
    """Limit less usage of one control group (version 2 or 1), caches that can be dropped aside."""
    for limit_name, usage_name, cache_name in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        limit, usage = number(group / limit_name), number(group / usage_name)
        if limit is not None and usage is not None:
            return limit - usage + _cache_bytes(group / "memory.stat", cache_name)
    return None


def _cache_bytes(stat: Path, name: str) -> int:
    for line in text_of(stat).split("\n"):
        if line.startswith(f"{name} "):
            return int(line[len(name) :])
    return 0
