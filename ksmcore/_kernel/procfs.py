"""Headroom: how much more memory this process can get before the kernel begins to kill.

Called by registration, before merged pages are given memory of their own again. Reads the kernel's
files only; what cannot be read does not limit.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath

__all__ = ["available_bytes"]

# Left free for everybody else: unmerging must not be what brings the machine down.
RESERVE_BYTES = 16 << 20

CGROUPS = Path("/sys/fs/cgroup")


def available_bytes(
    meminfo: Path = Path("/proc/meminfo"),
    membership: Path = Path("/proc/self/cgroup"),
    cgroups: Path = CGROUPS,
) -> int:
    """Bytes that can be allocated now, on the machine and under every control group's limit.

    Less a small reserve; at least 0.
    """
    limits = [_group_room(group) for group in _groups(membership, cgroups)]
    limits.append(_machine_room(meminfo))
    known = [room for room in limits if room is not None]
    return max(min(known, default=1 << 62) - RESERVE_BYTES, 0)


def _machine_room(meminfo: Path) -> int | None:
    """MemAvailable, and free swap: pages may go there."""
    fields = {}
    for line in _read(meminfo).splitlines():
        name, _, rest = line.partition(":")
        words = rest.split()
        if len(words) == 2 and words[0].isdigit():
            fields[name] = int(words[0]) * 1024
    if "MemAvailable" not in fields:
        return None
    return fields["MemAvailable"] + fields.get("SwapFree", 0)


def _groups(membership: Path, cgroups: Path) -> list[Path]:
    """The directories of this process's control groups that limit memory, parents included."""
    found = []
    for line in _read(membership).splitlines():
        hierarchy, _, rest = line.partition(":")
        controllers, _, name = rest.partition(":")
        if hierarchy == "0":
            root = cgroups
        elif "memory" in controllers.split(","):
            root = cgroups / "memory"
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
        limit, usage = _read(group / limit_name).strip(), _read(group / usage_name).strip()
        if limit.isdigit() and usage.isdigit():
            stat = dict(line.split() for line in _read(group / "memory.stat").splitlines())
            return int(limit) - int(usage) + int(stat.get(cache_name, 0))
    return None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
