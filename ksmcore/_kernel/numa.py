"""NUMA policies: which mappings have one of their own.

Holds no state between calls. Addresses are in bytes.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from ksmcore._kernel import procfs

if TYPE_CHECKING:
    from ksmcore._kernel.smaps import Vma

__all__ = ["own_numa_policy", "parse_numa_maps"]

# get_mempolicy(2) is in no C library that Python can count on, so it is called by number. It only
# reads, and is not on the path of a page; hence not in `syscalls`.
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


def own_numa_policy(mappings: Sequence[Vma]) -> tuple[Vma, str] | None:
    """The first of `mappings` that has a NUMA policy of its own, and the policy; None if none has.

    A policy of the whole process (``numactl --interleave=all python``) does not count: memory
    mapped anew falls under it again, so it needs no care.

    One get_mempolicy(2) per mapping, about 2 us, answers this. Where it fails, by whatever errno
    the filter of a container has chosen, ``/proc/self/numa_maps`` is read, as slow as smaps; it
    prints the process's policy for mappings without one, hence the comparison in
    `parse_numa_maps`. A kernel that has neither has no NUMA support, which gives None.

    Raises:
        OSError: numa_maps is there, and cannot be read now.
    """
    try:
        for vma in mappings:
            policy = _policy_at(vma.start)
            if policy is not None:
                return vma, policy
        return None
    except OSError:
        pass  # the file may tell
    try:
        lines = procfs.read("/proc/self/numa_maps").split("\n")
    except (FileNotFoundError, PermissionError):
        return None
    found = parse_numa_maps(lines, {vma.start for vma in mappings})
    if found is None:
        return None
    addr, policy = found
    return next(vma for vma in mappings if vma.start == addr), policy


def _policy_at(addr: int) -> str | None:
    """Policy of the mapping at `addr`, None for "default" and for no mapping.

    Raises:
        OSError: there is no answer.
    """
    number_of_call = _GET_MEMPOLICY_NR.get(platform.machine())
    if number_of_call is None:
        raise OSError(errno.ENOSYS, "get_mempolicy has no known number on this processor")
    mode = ctypes.c_int(0)
    result = _libc.syscall(
        ctypes.c_long(number_of_call),
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
