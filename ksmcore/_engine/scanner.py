"""The background scanner: a thread that makes passes, a batch and a rest at a time.

Called by the engine. Calls the engine's passes, and the pacing between them.

- It holds its engine only during a batch, so an engine that nobody else knows is collected.
- Where nothing is registered it parks, and a registration wakes it: at once, or, where the arena
  has registered memory in the midst of NumPy's work, when it looks for that the next time.
- Its thread is not among `threading.enumerate()`: there are programs that join all threads.
- A fork waits for the end of the batch (`_in_batch`), and no batch begins before it is over; in the
  child there is no scanner.
- What goes wrong in it is logged, kept, and raised by `stop`. Guard windows are closed by the core,
  whatever happens here.
"""

from __future__ import annotations

import _thread
import contextlib
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable

from ksmcore._engine.pacing import Pacer
from ksmcore._engine.passes import END_OF_MEMORY, Begun, PassMaker

__all__ = ["Scanner"]

log = logging.getLogger("ksmcore")

# How long it takes at most until it sees that the arena has registered something.
LOOK_SECONDS = 0.25
# How often a new one looks whether the one before has ended.
OVERLAP_SECONDS = 0.005

_scanners: weakref.WeakSet[Scanner] = weakref.WeakSet()
_forking = threading.Lock()
_held_for_fork: list[threading.Lock] = []


_hidden: set[int] = set()  # identities of threads


def _hide() -> None:
    """If this thread is hidden: whoever asks for the current thread, as each message that is logged
    does, makes an entry for it in the module threading; take that out again."""
    ident = threading.get_ident()
    with contextlib.suppress(AttributeError):  # should there be none of this some day
        if ident in _hidden:
            with threading._active_limbo_lock:  # type: ignore[attr-defined]
                threading._active.pop(ident, None)  # type: ignore[attr-defined]


def _hide_before_handlers(record: logging.LogRecord) -> bool:
    """A filter that lets all through."""
    del record
    _hide()
    return True


log.addFilter(_hide_before_handlers)


class HiddenThread:
    """A thread that ends with the process, and that the module threading knows nothing of."""

    def __init__(self, target: Callable[[], None]) -> None:
        self._target = target
        self._ident = 0
        self._alive = threading.Lock()

    def start(self) -> None:
        """Raises RuntimeError where the system has no further thread."""
        self._alive.acquire()
        try:
            _thread.start_new_thread(self._run, ())
        except BaseException:
            self._alive.release()
            raise

    def _run(self) -> None:
        self._ident = threading.get_ident()
        _hidden.add(self._ident)
        try:
            self._target()
        finally:
            _hide()
            _hidden.discard(self._ident)
            self._alive.release()

    def is_alive(self) -> bool:
        return self._alive.locked()

    def is_current(self) -> bool:
        return self._ident == threading.get_ident()

    def join(self, timeout: float = -1) -> None:
        """Wait for its end."""
        if self._alive.acquire(timeout=timeout):
            self._alive.release()


class Scanner:
    """The background scanner of one engine: started and stopped any number of times."""

    def __init__(self, engine: PassMaker) -> None:
        self._engine = weakref.ref(engine)
        self._thread: HiddenThread | None = None  # the last one
        self._is_stopped = True
        # Held for moments only: whoever stops waits for the thread, and that may be in a callback
        # that stops or starts as well.
        self._control = threading.RLock()
        self._at_work = threading.Lock()
        self._in_batch = threading.Lock()
        self._wake = threading.Event()
        # True whenever a registration should wake it: there may be nothing to do at present.
        self._is_resting = False
        self._error: BaseException | None = None
        self._pacer = Pacer()
        self._cpu_at = 0.0
        # Between two passes it is None; END_OF_MEMORY in the rest after the last batch.
        self._cursor: int | None = None
        self._begun: Begun | None = None
        _scanners.add(self)

    @property
    def is_running(self) -> bool:
        thread = self._thread
        return not self._is_stopped and thread is not None and thread.is_alive()

    @property
    def error(self) -> BaseException | None:
        """What it died of, until `stop` has raised it."""
        return self._error

    def start(self) -> None:
        """Begin with the next pass; nothing when it runs already."""
        with self._control:
            if self.is_running:
                return
            self._error = None
            # In this order: the one before must not take itself for wanted again.
            self._thread = HiddenThread(self._run)
            self._is_stopped = False
            self._thread.start()
        log.info("scanner started")

    def stop(self) -> None:
        """End after the present batch; raises what it died of, once. Nothing if it does not run."""
        with self._control:
            thread, was_stopped = self._thread, self._is_stopped
            self._is_stopped = True
            self._wake.set()
        if thread is not None and not thread.is_current():
            thread.join()
        with self._control:
            error, self._error = self._error, None
        if not was_stopped:
            log.info("scanner stopped")
        if error is not None:
            raise error

    def wake(self, *, only_if_resting: bool = False) -> None:
        """Something has changed that should not wait for the end of a rest."""
        if self._is_resting or not only_if_resting:
            self._wake.set()

    def _is_wanted(self) -> bool:
        """Is this thread still the scanner? Not after `stop`, even if another was started since."""
        thread = self._thread
        return not self._is_stopped and thread is not None and thread.is_current()

    def _run(self) -> None:
        # One that was stopped may still be in its last batch. No plain wait: it may be in a
        # callback that has started this one, and stops it again.
        while not self._at_work.acquire(timeout=OVERLAP_SECONDS):
            if not self._is_wanted():
                return
        try:
            self._cursor = None
            self._cpu_at = time.thread_time()
            while self._is_wanted():
                engine = self._engine()
                if engine is None or engine._is_inherited():
                    return
                # In this order: what is registered from here on either is seen or wakes.
                self._wake.clear()
                self._is_resting = True
                n_enlisted = engine._core.n_enlisted
                rest = self._step(engine)
                del engine
                _hide()
                if self._is_wanted():
                    self._rest(rest, n_enlisted)
        except BaseException as error:
            log.exception("the scanner has ended")
            self._error = error
        finally:
            self._at_work.release()

    def _rest(self, seconds: float | None, n_enlisted: int) -> None:
        """Until `wake`, or so long; where a registration should wake, until there is one."""
        end = None if seconds is None else time.monotonic() + seconds
        while True:
            left = LOOK_SECONDS if end is None else end - time.monotonic()
            if left <= 0 or self._wake.wait(min(left, LOOK_SECONDS)):
                return
            engine = self._engine()
            if engine is None or engine._is_inherited():
                return
            if self._is_resting and engine._core.n_enlisted != n_enlisted:
                return
            engine._tidy(idle_only=True)
            del engine  # nobody else may hold it any more

    def _step(self, engine: PassMaker) -> float | None:
        """One batch; returns for how long to rest then, None: until woken."""
        engine._tidy(idle_only=True)
        _, n_pages = engine._core.pages_before(END_OF_MEMORY)
        if n_pages == 0:
            self._cursor = None
            return None
        if self._cursor == END_OF_MEMORY:
            was_idle = self._end_pass(engine)
            if not self._is_wanted():
                return None
            if was_idle:
                return self._pacer.idle_rest(engine._settings)
        if self._cursor is None:
            self._begun = engine._begin_batches(self._in_batch)
            self._pacer.begin_pass(time.monotonic())
            self._cursor = 0
        self._is_resting = False
        batch_pages = self._pacer.batch_pages(engine._settings, n_pages)
        self._cursor = engine._make_batch(self._in_batch, self._cursor, batch_pages)
        n_done, n_pages = engine._core.pages_before(self._cursor)
        # All that this thread has spent since the last batch, passes begun and ended included.
        cpu_seconds, self._cpu_at = time.thread_time() - self._cpu_at, time.thread_time()
        part_done = n_done / max(n_pages, 1)
        return self._pacer.rest(engine._settings, time.monotonic(), cpu_seconds, part_done)

    def _end_pass(self, engine: PassMaker) -> bool:
        """The rest after its last batch is part of a pass. Was it an idle one, in which nothing was
        read?"""
        self._cursor = None
        if self._begun is None:
            return False
        report = engine._end_batches(self._begun)
        log.debug("pass: %r", report)
        engine._tell(report)
        return report.pages_hashed == 0


def _stop_for_fork() -> None:
    _forking.acquire()
    for scanner in list(_scanners):
        scanner._in_batch.acquire()
        _held_for_fork.append(scanner._in_batch)


def _go_on_after_fork() -> None:
    while _held_for_fork:
        _held_for_fork.pop().release()
    _forking.release()


def _begin_anew_in_child() -> None:
    global _forking
    _forking = threading.Lock()
    _hidden.clear()  # their identities may be those of other threads here
    # Its engine makes itself a new one (see Registrar._own); this one's thread does not exist here.
    with contextlib.suppress(RuntimeError):
        while _held_for_fork:
            _held_for_fork.pop().release()


os.register_at_fork(
    before=_stop_for_fork, after_in_parent=_go_on_after_fork, after_in_child=_begin_anew_in_child
)
