"""What the kernel, the limits and the settings around this process mean for ksmcore.

Each function looks at one thing and judges it; the files of the kernel are found under `root`.
"""

from __future__ import annotations

import errno
import os
import platform
import resource
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ksmcore._engine.settings import GUARDS, Settings
from ksmcore._kernel.procfs import (
    available_bytes,
    control_groups,
    number,
    sizes_of,
    text_of,
    threads_blocking,
    words,
)
from ksmcore.sizes import human_bytes

__all__ = ["Check", "Level"]

Level = Literal["good", "advice", "weak", "broken"]

ROOT = Path("/")

# Linux 6.8 is the first with all that ksmcore can use: 6.4 for the guards of userfaultfd, 6.7 for
# tracking, 6.8 to tell pinned pages.
BEST_LINUX = (6, 8)
# Fewer free mappings than this, of the engine and the program together, are few.
FEW_MAPS = 4096
PLENTY_OF_MAPS = 262_144
LITTLE_MEMORY_BYTES = 64 << 20
# Some chunks of the allocator.
FEW_ADDRESSES_BYTES = 1 << 30
NO_LIMIT_BYTES = 1 << 60
# A step by which the store grows.
LITTLE_STORE_BYTES = 64 << 20
# Of the bits of coredump_filter: private mappings of files, which those of the store are.
FILE_BACKED_PRIVATE = 1 << 2
FEW_DESCRIPTORS = 16
NO_DESCRIPTOR = (errno.EMFILE, errno.ENFILE)
# Threads are named up to so many.
MOST_NAMES = 4
# Variables of this project that are no settings.
OTHER_VARIABLES = {
    f"KSMCORE_{name}" for name in "DISABLE CHILDREN STRESS SANITIZE CI_CHILD".split()
}


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    level: Level
    """"good"; "advice": works, and could be better; "weak": does not work as it should; "broken":
    nothing can be merged."""
    text: str
    """What there is, in a line."""
    remedy: str | None = None
    """What would make it better; None if and only if the level is "good"."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """The same for programs: numbers, words, None for what is not known."""


def _chosen(path: Path) -> str | None:
    """Of a file such as "always [madvise] never" the word in brackets."""
    _, _, rest = text_of(path).partition("[")
    return rest.partition("]")[0] or None


def _is_filtered(root: Path) -> bool:
    return words(root / "proc/self/status").get("Seccomp") == "2"


# ---- the kernel ----------------------------------------------------------------------------------


def kernel(release: str | None = None) -> Check:
    """Version and page size."""
    release = platform.release() if release is None else release
    page_bytes = resource.getpagesize()
    text = f"Linux {release}, {platform.machine()}, pages of {page_bytes:,} bytes"
    facts = {"release": release, "machine": platform.machine(), "page_bytes": page_bytes}
    numbers = [part for part in release.replace("-", ".").split(".")[:2] if part.isdigit()]
    if len(numbers) == 2 and tuple(map(int, numbers)) < BEST_LINUX:
        best = ".".join(map(str, BEST_LINUX))
        remedy = f"Linux {best} or newer has everything that ksmcore can use; this one works too"
        return Check("kernel", "advice", text, remedy, facts)
    return Check("kernel", "good", text, None, facts)


def memory_file(reason: str | None) -> Check:
    """memfd_create(2), without which nothing can be shared."""
    facts = {"available": reason is None, "reason": reason}
    if reason is None:
        return Check("memfd", "good", "memory files can be made", None, facts)
    remedy = "allow memfd_create(2): a seccomp filter or a sandbox refuses it"
    return Check("memfd", "broken", f"memory files cannot be made: {reason}", remedy, facts)


def page_map(reason: str | None) -> Check:
    """/proc/self/pagemap, which tells what is present and what is shared."""
    facts = {"available": reason is None, "reason": reason}
    if reason is None:
        return Check("pagemap", "good", "/proc/self/pagemap can be read", None, facts)
    text = f"/proc/self/pagemap cannot be read ({reason}): numbers of shared pages may be too high"
    return Check("pagemap", "weak", text, "mount /proc, and let this process read it", facts)


def guard(
    found: Mapping[str, str | None],
    in_use: str | None = None,
    root: Path = ROOT,
    holds_calls: bool = False,
) -> Check:
    """What keeps writers out of a page that is being merged. `found`: why each is not there;
    `in_use`: the one that engines take, None for the best."""
    possible = next((name for name in GUARDS if found[name] is None), None)
    best = in_use or possible
    facts = {"in_use": best, "missing": {name: why for name, why in found.items() if why}}
    if best is None:
        return Check("guard", "broken", "no guard is to be had", "please report this", facts)
    if best == GUARDS[0]:
        return Check("guard", "good", f"{best}: system calls wait for a merge", None, facts)
    text = f"{best}: all works; a system call that writes into a page at the moment it is merged "
    text += (
        "fails with EFAULT where it does not tell of itself (io_uring, system calls made without "
        "the C library): hold() its memory"
        if holds_calls
        else "fails with EFAULT, so hold() memory that read() and the like write into"
    )
    if best != possible:
        remedy = f"unset KSMCORE_GUARD: '{possible}' can be had here"
        return Check("guard", "advice", text, remedy, facts)
    remedy = f"for the guard '{GUARDS[0]}': {_for_userfaultfd(found[GUARDS[0]], root)}"
    return Check("guard", "advice", text, remedy, facts)


def calls(reason: str | None, setting: bool | str, in_use: str | None = None) -> Check:
    """Are calls that read into memory held by themselves? `reason`: why they cannot be; `setting`:
    hold_calls; `in_use`: the guard that engines take."""
    facts = {"available": reason is None, "reason": reason, "setting": setting}
    if reason is None and setting is not False:
        if in_use == GUARDS[0] and setting == "auto":
            return Check(
                "calls", "good", f"wait by themselves, by the guard '{in_use}'", None, facts
            )
        text = "read(), recv() and the like are held by themselves"
        return Check("calls", "good", text, None, facts)
    text = "read(), recv() and the like are not held by themselves"
    if in_use == GUARDS[0]:
        return Check("calls", "good", f"{text}; the guard '{in_use}' has them wait", None, facts)
    if reason is not None:
        remedy = "hold() memory that they write into, or have the guard 'userfaultfd'"
        return Check("calls", "weak", f"{text}: {reason}", remedy, facts)
    remedy = "set hold_calls to 'auto' (unset KSMCORE_HOLD_CALLS)"
    return Check("calls", "weak", text, remedy, facts)


def _for_userfaultfd(reason: str | None, root: Path) -> str:
    if _is_filtered(root):
        return (
            "allow userfaultfd(2) in the seccomp profile, or give the container the device "
            "(docker run --device /dev/userfaultfd)"
        )
    if reason and reason.startswith(os.strerror(1)):  # EPERM
        return (
            "sudo sysctl vm.unprivileged_userfaultfd=1, or let this user open /dev/userfaultfd, or "
            "give it CAP_SYS_PTRACE"
        )
    return "Linux 6.4 or newer, built with userfaultfd"


def tracking(reason: str | None, in_use: str | None = None, root: Path = ROOT) -> Check:
    """Whether the kernel tells which pages were written. `in_use`: what engines go by, "pagemap" or
    "checksum"; None for what is possible."""
    facts = {"available": reason is None, "reason": reason, "in_use": in_use}
    if reason is None and in_use == "checksum":
        text = "not wanted: each pass reads all pages"
        remedy = "unset KSMCORE_DIRTY and KSMCORE_ORDER: the kernel can tell what was written"
        return Check("tracking", "advice", text, remedy, facts)
    if reason is None:
        text = "the kernel tells which pages were written; the others are not read again"
        return Check("tracking", "good", text, None, facts)
    text = "not to be had: each pass reads all pages (smart_scan=True reads fewer)"
    if _is_filtered(root):
        remedy = "allow userfaultfd(2) in the seccomp profile, on Linux 6.7 or newer"
    else:
        remedy = f"Linux 6.7 or newer, and userfaultfd(2) allowed; here: {reason}"
    return Check("tracking", "advice", text, remedy, facts)


def map_limit(used: int, limit: int) -> Check:
    """vm.max_map_count, of which merged pages that lie scattered take two each."""
    free = max(limit - used, 0)
    text = f"{used:,} memory mappings of {limit:,} in use; ksmcore takes half of the rest at most"
    facts = {"used": used, "limit": limit, "free": free}
    remedy = "sudo sysctl vm.max_map_count=1048576 (on the host, for a container)"
    if free < max(FEW_MAPS, limit // 10):
        text = f"{used:,} memory mappings of {limit:,} in use: hardly any are left for merging"
        return Check("mappings", "weak", text, remedy, facts)
    if limit < PLENTY_OF_MAPS:
        remedy = f"if equal pages lie scattered: {remedy}"
        return Check("mappings", "advice", text, remedy, facts)
    return Check("mappings", "good", text, None, facts)


def huge_pages(root: Path = ROOT) -> Check:
    """Transparent huge pages, of the program's memory and of memory files."""
    here = root / "sys/kernel/mm/transparent_hugepage"
    enabled, shmem = _chosen(here / "enabled"), _chosen(here / "shmem_enabled")
    facts = {"enabled": enabled, "shmem_enabled": shmem}
    if enabled in (None, "never"):
        return Check("huge pages", "good", "the kernel gives none, so none are lost", None, facts)
    text = f"{enabled} for programs, {shmem or 'unknown'} for memory files"
    if shmem in ("always", "within_size", "advise", "force"):
        return Check("huge pages", "good", f"{text}: merged ones can stay huge", None, facts)
    text += ": memory that is merged leaves its huge pages, the rest keeps them"
    remedy = f"if reading gets slower: write advise to /{here.relative_to(root)}/shmem_enabled"
    return Check("huge pages", "advice", text, remedy, facts)


def kernel_ksm(root: Path = ROOT) -> Check:
    """The kernel's own KSM, which ksmcore needs not, and which may work beside it."""
    run = number(root / "sys/kernel/mm/ksm/run")
    joined = words(root / "proc/self/ksm_stat").get("ksm_merge_any") == "yes"
    facts = {"run": run, "whole_process": joined}
    states: dict[int | None, str] = {0: "off", 1: "on", 2: "off, and told to unmerge"}
    state = states.get(run, "not there")
    text = f"{state}; ksmcore does not need it"
    if joined and run == 1:
        text = "on, for the whole of this process too: both look for the same pages"
        remedy = "switch one of them off (MemoryKSM= of systemd, PR_SET_MEMORY_MERGE)"
        return Check("kernel's KSM", "advice", text, remedy, facts)
    return Check("kernel's KSM", "good", text, None, facts)


def descriptors(root: Path = ROOT) -> Check:
    """RLIMIT_NOFILE (`ulimit -n`): an engine keeps some, and a pass opens one or two more."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        used = len(os.listdir(root / "proc/self/fd")) - 1  # the one that lists them
    except OSError as error:
        if error.errno not in NO_DESCRIPTOR:
            facts = {"used": None, "limit": limit}
            return Check("descriptors", "good", f"{limit:,} at most", None, facts)
        used = limit
    facts = {"used": used, "limit": limit}
    text = f"{used:,} of {limit:,} in use"
    if limit != resource.RLIM_INFINITY and limit - used < FEW_DESCRIPTORS:
        remedy = "close some, or raise the limit (ulimit -n, RLIMIT_NOFILE)"
        return Check("descriptors", "weak", text, remedy, facts)
    return Check("descriptors", "good", text, None, facts)


def proc_files(root: Path = ROOT) -> Check:
    """/proc, which tells what is mapped where; registering, passes and numbers go by it."""
    missing = []
    for name in ("maps", "pagemap", "smaps", "status"):
        try:
            os.close(os.open(root / "proc/self" / name, os.O_RDONLY | os.O_CLOEXEC))
        except OSError as error:
            if error.errno not in NO_DESCRIPTOR:
                missing.append(f"{name} ({error.strerror})")
    facts = {"missing": missing}
    if not missing:
        return Check("proc", "good", "/proc/self is there", None, facts)
    text = f"of /proc/self cannot be read: {', '.join(missing)}"
    remedy = (
        "mount /proc (for a chroot: mount --bind /proc DIRECTORY/proc, before the process goes "
        "there), and let this process read it"
    )
    return Check("proc", "weak", text, remedy, facts)


# ---- limits --------------------------------------------------------------------------------------


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


# ---- threads -------------------------------------------------------------------------------------


def blocked_signals(in_use: str | None, root: Path = ROOT) -> Check:
    """Threads that block SIGSEGV, by which the guard "mprotect" makes writers wait. `in_use`: the
    guard that engines take."""
    found = threads_blocking(signal.SIGSEGV, root / "proc/self/task")
    facts = {"threads": found}
    if not found:
        text = "not known" if found is None else "no thread blocks SIGSEGV"
        return Check("signals", "good", text, None, facts)
    more = f" and {len(found) - MOST_NAMES} more" if len(found) > MOST_NAMES else ""
    text = f"SIGSEGV is blocked by {', '.join(found[:MOST_NAMES])}{more}"
    if in_use != "mprotect":
        text += f"; the guard '{in_use}' does not need it"
        return Check("signals", "good", text, None, facts)
    remedy = (
        "leave SIGSEGV out of what threads block (pthread_sigmask), or let a userfaultfd guard be "
        "had: while a thread blocks it the guard 'mprotect' can keep no writer out"
    )
    return Check("signals", "weak", text, remedy, facts)


# ---- Python --------------------------------------------------------------------------------------


def library(path: str = os.__file__) -> Check:
    """Python's standard library, of which some is imported late."""
    version = platform.python_version()
    facts = {"version": version, "readable": os.access(path, os.R_OK)}
    if facts["readable"]:
        return Check("python", "good", f"Python {version}", None, facts)
    text = f"Python {version}, whose library cannot be read here ({path})"
    remedy = (
        "what is imported only now fails: make it readable (after a chroot, or a change of users), "
        "or import before what will be needed"
    )
    return Check("python", "advice", text, remedy, facts)


def numpy_allocator(handler: str | None = None) -> Check:
    """NumPy's version, and whose memory its arrays get."""
    handler = _handler_name() if handler is None else handler
    text = f"NumPy {np.__version__}, allocator '{handler}'"
    facts = {"version": np.__version__, "allocator": handler}
    if handler in ("default_allocator", "ksmcore"):
        return Check("numpy", "good", text, None, facts)
    remedy = (
        "another library gives arrays their memory: they are merged only where it is private and "
        "page-aligned; have that library leave NumPy's allocator alone"
    )
    return Check("numpy", "advice", text, remedy, facts)


def _handler_name() -> str:
    try:
        from numpy._core import multiarray
    except ImportError:  # NumPy 1
        from numpy.core import multiarray  # type: ignore[no-redef]
    find: Any = multiarray.get_handler_name
    return str(find())


def environment(environ: Mapping[str, str] = os.environ) -> Check:
    """KSMCORE_... variables."""
    own = {name: value for name, value in sorted(environ.items()) if name.startswith("KSMCORE_")}
    facts = {"variables": own}
    if not own:
        return Check("environment", "good", "no KSMCORE_... variable is set", None, facts)
    text = " ".join(f"{name}={value}" for name, value in own.items())
    if own.get("KSMCORE_DISABLE", "0").lower() not in ("", "0", "no"):
        return Check("environment", "broken", text, "unset KSMCORE_DISABLE to merge at all", facts)
    try:
        Settings.made()
    except (TypeError, ValueError) as error:
        return Check("environment", "broken", text, f"correct or unset it: {error}", facts)
    known = {f"KSMCORE_{setting.name.upper()}" for setting in fields(Settings)}
    strange = own.keys() - known - OTHER_VARIABLES
    if strange:
        names = ", ".join(sorted(strange))
        return Check("environment", "advice", text, f"there is no such setting: {names}", facts)
    return Check("environment", "good", text, None, facts)
