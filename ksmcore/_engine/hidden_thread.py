"""Threads of ours beside a program that should not notice them."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from ksmcore._core.making_way import Bell, MakesWay
from ksmcore._kernel.per_process import PerProcess

if TYPE_CHECKING:
    from ksmcore._core.scopes import PassLock

__all__ = ["Bell", "HiddenThread", "NowAndThen", "hide"]

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

    It makes way for forks of Python's (see `_core/making_way`): where `is_asked` is true, and
    `wake` was called, `target` returns True, and is called again after the fork, in the parent.
    `wake` must be a function of C, or a signal handler could raise in it. `lock` is what it waits
    for.
    """

    def __init__(
        self,
        target: Callable[[], bool],
        wake: Callable[[], object],
        lock: PassLock | None = None,
    ) -> None:
        self._target = target
        self._ident = 0
        self._way = MakesWay(self._run, wake, lock)
        self.is_asked = self._way.is_asked
        self.is_alive = self._way.is_alive
        self.come_back = self._way.come_back
        self.join = self._way.join
        """Wait for its end, so many seconds at most; False where it has not come."""

    def start(self) -> None:
        """Raises RuntimeError where the system has no further thread."""
        self._way.start()

    def _run(self) -> bool:
        ident = self._ident = threading.get_ident()
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, OWN_FAULTS)
            _hidden.get().add(ident)
            return self._target()
        finally:
            hide()
            _hidden.get().discard(ident)

    def is_current(self) -> bool:
        return self._ident == threading.get_ident()


class NowAndThen:
    """A hidden thread that calls a function after each rest: of `rest_seconds` at least, and of
    `rest_per_act` times as long as the last call took. Whatever that raises ends it."""

    def __init__(self, act: Callable[[], object], rest_seconds: float, rest_per_act: float) -> None:
        """Begins with a rest. Raises RuntimeError where the system has no further thread."""
        self._act = act
        self._rest_seconds = rest_seconds
        self._rest_per_act = rest_per_act
        self._next_at = time.monotonic() + rest_seconds
        self._is_over = False
        self._bell = Bell()
        self._thread = HiddenThread(self._run, self._bell.ring)
        self._thread.start()

    def end(self, timeout: float = -1.0) -> None:
        """Wait for the end of the present call, so many seconds at most."""
        self._is_over = True
        self._bell.ring()
        self._thread.join(timeout)

    def _run(self) -> bool:
        """Returns True where it makes way for a fork."""
        with contextlib.suppress(Exception):
            while not self._is_over:
                if self._thread.is_asked():
                    return True
                began = time.monotonic()
                if began < self._next_at:
                    self._bell.wait(self._next_at - began)
                    continue
                self._act()
                ended = time.monotonic()
                rest = max((ended - began) * self._rest_per_act, self._rest_seconds)
                self._next_at = ended + rest
        return False
