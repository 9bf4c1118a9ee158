"""What of the kernel can be used here and now, and the choice of a guard among it.

Nothing is known beforehand: each is tried out.
"""

from __future__ import annotations

from ksmcore._arrays import memory
from ksmcore._engine.settings import GUARDS
from ksmcore._guard import guard
from ksmcore._hooks import calls
from ksmcore._kernel import syscalls, tracker

__all__ = ["Features", "check_tracker", "choose_guard", "features"]

_REMEDIES = {
    "userfaultfd": (
        "it takes root, CAP_SYS_PTRACE, vm.unprivileged_userfaultfd=1 or access to "
        "/dev/userfaultfd, Linux 6.4, and no seccomp filter against it"
    ),
    "userfaultfd-user": "it takes Linux 6.4, and no seccomp filter against userfaultfd(2)",
}


class Features(dict[str, str | None]):
    """A dict that a notebook can show."""

    def _repr_html_(self) -> str:
        from ksmcore._show import notebook

        return notebook.of_features(self)


def features() -> Features:
    """What ksmcore can use here: name -> None when it is there, else why it is not.

    "pagemap", "memfd": parts of the kernel. "userfaultfd", "userfaultfd-user", "mprotect": the
    guards, the strongest first. "pinned": pages that were never merged, and are pinned for a
    device (direct I/O, io_uring), are left alone; others need a hold. "tracking": the kernel tells
    which pages were written, so that the others are not read again. "calls": functions of the C
    library can tell of the memory that they read into, see the setting hold_calls. "memory": malloc
    and its kin can be redirected, see install_allocator.
    """
    found = Features(syscalls.features())
    for name in GUARDS:
        reason = guard.probe(name)
        found[name] = reason if reason is None else f"{reason} ({_REMEDIES[name]})"
    found["tracking"] = _tracking_missing()
    found["calls"] = calls.missing()
    found["memory"] = memory.missing()
    found["pinned"] = (
        None
        if guard.refuses_pinned("userfaultfd")
        else "only the guard 'userfaultfd' can tell, on Linux 6.8 and later"
    )
    return found


def _tracking_missing() -> str | None:
    reason = tracker.probe()
    return None if reason is None else f"{reason} (it takes Linux 6.7, and userfaultfd(2) allowed)"


def check_tracker() -> None:
    """Raises ValueError where written pages cannot be tracked; the message says why."""
    reason = _tracking_missing()
    if reason is not None:
        raise ValueError(
            f"dirty='pagemap' is not to be had here: {reason}; dirty='checksum' always is"
        )


def choose_guard(asked: str) -> str:
    """The guard to use: the one asked for, or the strongest that is there for "auto".

    Raises:
        ValueError: it is not there; the message says why, and what is.
    """
    if asked == "auto":
        # One that the process has no descriptor for just now is there when a pass begins, or is
        # waited for.
        return next(name for name in GUARDS if guard.probe(name, now=False) is None)
    reason = guard.probe(asked)
    if reason is not None:
        there = ", ".join(repr(name) for name in GUARDS if guard.probe(name) is None)
        raise ValueError(
            f"guard={asked!r} is not to be had here: {reason} ({_REMEDIES[asked]}); there is "
            f"{there}"
        )
    return asked
