"""Threads of ours beside a program that should not notice them."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

__all__ = ["no_signals"]

# Sent to the thread that caused them; a guard waits in the handler of SIGSEGV.
OWN_FAULTS = {signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP}


@contextlib.contextmanager
def no_signals() -> Iterator[None]:
    """Threads that are started within get none of the signals that are sent to the process.

    A program may keep a signal for itself, by blocking it in all threads that it knows of and
    waiting for it; a thread of ours that did not block it would be given it, and end the process.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals() - OWN_FAULTS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
