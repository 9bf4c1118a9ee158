"""What the kernel, the threads and the settings around this process mean for ksmcore; the limits of
memory are in `limits`.

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
    number,
    text_of,
    threads_blocking,
    words,
)
from ksmcore._platform import is_disabled
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
FEW_DESCRIPTORS = 16
NO_DESCRIPTOR = (errno.EMFILE, errno.ENFILE)
# Threads are named up to so many.
MOST_NAMES = 4
# Variables of this project that are no settings.
OTHER_VARIABLES = {
    "KSMCORE_CHILDREN",
    "KSMCORE_CI_CHILD",
    "KSMCORE_DISABLE",
    "KSMCORE_SANITIZE",
    "KSMCORE_STRESS",
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


def map_limit(used: int, limit: int, left_out_bytes: int = 0) -> Check:
    """vm.max_map_count, of which merged pages that lie scattered take two each. `left_out_bytes`:
    what was not merged for want of them."""
    free = max(limit - used, 0)
    text = f"{used:,} memory mappings of {limit:,} in use; ksmcore takes half of the rest at most"
    facts = {"used": used, "limit": limit, "free": free, "left_out_bytes": left_out_bytes}
    remedy = "sudo sysctl vm.max_map_count=1048576 (on the host, for a container)"
    if free < max(FEW_MAPS, limit // 10):
        text = f"{used:,} memory mappings of {limit:,} in use: hardly any are left for merging"
        return Check("mappings", "weak", text, remedy, facts)
    if left_out_bytes:
        text += f", which leaves out up to {human_bytes(left_out_bytes)} that could be saved"
        remedy += ", or lay equal data out in the same order"
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
    if is_disabled(own):
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
