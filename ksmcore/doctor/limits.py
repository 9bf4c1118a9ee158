"""What limits the memory of this process, and what becomes of it, means for ksmcore.

Each function looks at one thing and judges it; the files of the kernel are found under `root`.
"""

from __future__ import annotations

import resource
from pathlib import Path

from ksmcore._kernel.procfs import available_bytes, control_groups, number, sizes_of, text_of
from ksmcore.doctor.checks import ROOT, Check, Level
from ksmcore.sizes import human_bytes

LITTLE_MEMORY_BYTES = 64 << 20
# Some chunks of the allocator.
FEW_ADDRESSES_BYTES = 1 << 30
NO_LIMIT_BYTES = 1 << 60
# A step by which the store grows.
LITTLE_STORE_BYTES = 64 << 20
# Of the bits of coredump_filter: private mappings of files, which those of the store are.
FILE_BACKED_PRIVATE = 1 << 2


def memory_limit(root: Path = ROOT) -> Check:
    """The memory that may still be taken: to unmerge takes some."""
    meminfo, membership = root / "proc/meminfo", root / "proc/self/cgroup"
    cgroups = root / "sys/fs/cgroup"
    available = available_bytes(meminfo, membership, cgroups)
    limit, whose = _smallest_limit(membership, cgroups)
    total = sizes_of(meminfo).get("MemTotal")
    is_known = available < NO_LIMIT_BYTES
    facts = {
        "available_bytes": available if is_known else None,
        "limit_bytes": limit,
        "cgroup": whose,
        "machine_bytes": total,
    }
    text = f"{human_bytes(available)} can be had" if is_known else "not known"
    if limit:
        text += f", under a control group's limit of {human_bytes(limit)}"
    else:
        text += "; no control group limits it"
    least = LITTLE_MEMORY_BYTES if limit is None else max(LITTLE_MEMORY_BYTES, limit // 20)
    if available < least:
        remedy = (
            "raise the limit, or hold less: unregister() needs memory, and is refused "
            "(MemoryError) where there is too little"
        )
        return Check("memory", "weak", text, remedy, facts)
    return Check("memory", "good", text, None, facts)


def address_space(root: Path = ROOT) -> Check:
    """RLIMIT_AS (`ulimit -v`): the allocator takes addresses in chunks."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    used = sizes_of(root / "proc/self/status").get("VmSize")
    if limit == resource.RLIM_INFINITY or used is None:
        facts = {"limit_bytes": None, "used_bytes": used}
        return Check("addresses", "good", "no limit (ulimit -v)", None, facts)
    facts = {"limit_bytes": limit, "used_bytes": used}
    left = max(limit - used, 0)
    text = f"{human_bytes(left)} left of {human_bytes(limit)} (ulimit -v)"
    remedy = (
        "raise it (ulimit -v unlimited): the allocator takes 64 MiB of addresses at once, and "
        "leaves arrays to NumPy where it gets none"
    )
    return Check(
        "addresses", "weak" if left < FEW_ADDRESSES_BYTES else "advice", text, remedy, facts
    )


def file_size() -> Check:
    """RLIMIT_FSIZE (`ulimit -f`): the store is a file, though it lies in memory."""
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if limit == resource.RLIM_INFINITY:
        return Check("file size", "good", "no limit (ulimit -f)", None, {"limit_bytes": None})
    text = f"{human_bytes(limit)} a file (ulimit -f), and what is shared lies in one, of memory"
    remedy = "raise it (ulimit -f unlimited, RLIMIT_FSIZE): what finds no room stays unmerged"
    level: Level = "weak" if limit < LITTLE_STORE_BYTES else "advice"
    return Check("file size", level, text, remedy, {"limit_bytes": limit})


def locked(n_bytes: int | None, with_what_comes: bool | None) -> Check:
    """mlock(2). `n_bytes` are locked, so many of this process; `with_what_comes`: whatever is
    mapped from now on is, too. None for what is not known."""
    facts = {"locked_bytes": n_bytes, "future": with_what_comes}
    if with_what_comes:
        text = "whatever is mapped from now on is locked (mlockall with MCL_FUTURE)"
        remedy = (
            "munlockall(2), or mlockall without MCL_FUTURE: locked memory is not merged, and "
            "merging that of before takes more than it gives back"
        )
        return Check("locked", "weak", text, remedy, facts)
    if n_bytes:
        text = f"{human_bytes(n_bytes)} (mlock), which are left alone"
        return Check("locked", "advice", text, "munlock(2) what need not be locked", facts)
    text = "not known" if n_bytes is None else "nothing"
    return Check("locked", "good", text, None, facts)


def core_files(root: Path = ROOT) -> Check:
    """Whether what is merged would be in a core file."""
    limit, _ = resource.getrlimit(resource.RLIMIT_CORE)
    pattern = text_of(root / "proc/sys/kernel/core_pattern")
    own = root / "proc/self/coredump_filter"
    try:
        kinds = int(text_of(own), 16)
    except ValueError:
        return Check("core files", "good", "not known", None, {"filter": None})
    facts = {"filter": kinds, "limit_bytes": limit, "pattern": pattern}
    if kinds & FILE_BACKED_PRIVATE:
        return Check("core files", "good", "merged memory would be in them", None, facts)
    if limit == 0 and not pattern.startswith("|"):
        return Check("core files", "good", "none are written (ulimit -c)", None, facts)
    text = "merged memory that was not written since would not be in them"
    remedy = (
        f"if you need it there: echo {kinds | FILE_BACKED_PRIVATE:#x} > /proc/self/coredump_filter "
        "(what is started later inherits it)"
    )
    return Check("core files", "advice", text, remedy, facts)


def _smallest_limit(membership: Path, cgroups: Path) -> tuple[int | None, str | None]:
    """(bytes, directory) of the control group with the least limit; version 2 or 1."""
    found: list[tuple[int, str]] = []
    for group in control_groups(membership, cgroups):
        for name in ("memory.max", "memory.limit_in_bytes"):
            limit = number(group / name)
            if limit is not None and limit < NO_LIMIT_BYTES:
                found.append((limit, str(group)))
    return min(found, default=(None, None))


def overcommit(root: Path = ROOT) -> Check:
    """Whether the kernel promises more memory than there is."""
    mode = number(root / "proc/sys/vm/overcommit_memory")
    sizes = sizes_of(root / "proc/meminfo")
    limit, promised = sizes.get("CommitLimit"), sizes.get("Committed_AS")
    facts = {"mode": mode, "limit_bytes": limit, "committed_bytes": promised}
    if mode != 2:
        texts: dict[int | None, str] = {0: "as far as it seems sensible", 1: "always"}
        text = f"memory is promised: {texts.get(mode, 'not known')}"
        return Check("overcommit", "good", text, None, facts)
    remedy = "sudo sysctl vm.overcommit_memory=0, or a larger vm.overcommit_ratio"
    if limit is None or promised is None:
        return Check("overcommit", "advice", "never (mode 2)", remedy, facts)
    left = max(limit - promised, 0)
    text = f"never (mode 2): {human_bytes(left)} of {human_bytes(limit)} not yet promised"
    return Check("overcommit", "weak" if left < limit // 10 else "advice", text, remedy, facts)
