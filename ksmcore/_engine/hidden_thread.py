"""Threads of ours beside a program that should not notice them."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Callable

from ksmcore._core.scopes import start_thread
from ksmcore._kernel.per_process import PerProcess

__all__ = ["HiddenThread", "hide"]

log = logging.getLogger("ksmcore")

# What a thread causes itself. The kernel ends a process in which one of them comes to a thread that
# blocks it: a page that goes away while it is read, a system call of which a sandbox wants to know.
OWN_FAULTS = {
    signal.SIGSEGV,
    signal.SIGBUS,
    signal.SIGFPE,
    signal.SIGILL,
    signal.SIGTRAP,
    signal.SIGSYS,
}

# Identities of threads: in a forked child they may be those of others.
_hidden: PerProcess[set[int]] = PerProcess(set)


def hide() -> None:
    """If this thread is hidden: whoever asks for the current thread, as each message that is logged
    does, makes an entry for it in the module threading; take that out again."""
    ident = threading.get_ident()
    with contextlib.suppress(AttributeError):  # should there be none of this some day
        if ident in _hidden.get():
            with threading._active_limbo_lock:  # type: ignore[attr-defined]
                threading._active.pop(ident, None)  # type: ignore[attr-defined]


def _hide_before_handlers(record: logging.LogRecord) -> bool:
    """A filter that lets all through."""
    del record
    hide()
    return True


log.addFilter(_hide_before_handlers)


class HiddenThread:
    """A thread that ends with the process, and that the module threading knows nothing of: there
    are programs that wait for all threads that it knows.

    It gets none of the signals that are sent to the process. A program may keep a signal for
    itself, by blocking it in all its threads and waiting for it; and a handler must not run, and
    write into memory that is being merged, on the thread that merges it. Its own faults it gets,
    whatever the thread that starts it blocks.
    """

    def __init__(self, target: Callable[[], object]) -> None:
        self._target = target
        self._ident = 0
        self._alive = threading.Lock()

    def start(self) -> None:
        """Raises RuntimeError where the system has no further thread."""
        # No handler of Python's may raise in the midst of it: whoever waited for the end of a
        # thread that never began would wait for ever.
        start_thread(self._run, self._alive)

    def _run(self) -> None:
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, OWN_FAULTS)
            self._ident = threading.get_ident()
            _hidden.get().add(self._ident)
            self._target()
        finally:
            hide()
            _hidden.get().discard(self._ident)
            self._alive.release()

    def is_alive(self) -> bool:
        return self._alive.locked()

    def is_current(self) -> bool:
        return self._ident == threading.get_ident()

    def join(self, timeout: float = -1) -> bool:
        """Wait for its end; False where it has not come."""
        ended = self._alive.acquire(timeout=timeout)
        if ended:
            self._alive.release()
        return ended
