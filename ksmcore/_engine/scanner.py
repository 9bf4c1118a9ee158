"""The background scanner: a thread that makes passes, a batch and a rest at a time.

- It holds its engine's passes only during a batch: an engine that nobody else knows is collected.
- Where nothing is registered it parks, and a registration wakes it: at once, or, where the arena
  has registered memory in the midst of NumPy's work, when it looks for that the next time.
- Its thread is hidden, and makes way for forks of Python's (see `HiddenThread`): after one it goes
  on where it was. In the child there is no scanner.
- Where there is no descriptor or no memory at the moment, or the kernel does not tell what is
  mapped, it waits and tries again; that is counted.
- What else goes wrong in it is logged, kept, and raised by `stop`. Guard windows are closed by the
  core, whatever happens here.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import weakref
from typing import TYPE_CHECKING

from ksmcore._core.scopes import LockScope
from ksmcore._engine.hidden_thread import Bell, HiddenThread, hide
from ksmcore._engine.pacing import Pacer, are_wanted, young_seconds
from ksmcore._engine.passes import (
    END_OF_MEMORY,
    Begun,
    EngineClosedError,
    NotNowError,
    Passes,
)
from ksmcore._kernel import forks, procfs

if TYPE_CHECKING:
    from ksmcore._engine.engine import Engine
    from ksmcore._engine.settings import InForce

__all__ = ["Scanner", "Scanning"]

log = logging.getLogger("ksmcore")

# How long it takes at most until it sees that the arena has registered something.
LOOK_SECONDS = 0.25
# How often a new one looks whether the one before has ended.
OVERLAP_SECONDS = 0.005
# Of the pages that an idle pass has met, one in so many makes the next come soon by being young.
YOUNG_SHARE = 64
# How long it waits where nothing can be merged for the moment.
PUT_OFF_SECONDS = 1.0


class Scanner:
    """The background scanner of one engine: started and stopped any number of times."""

    def __init__(self, passes: Passes, in_force: InForce) -> None:
        self._ref = weakref.ref(passes)
        self._in_force = in_force
        self._generation = forks.generation()
        self._thread: HiddenThread | None = None  # the last one
        self._lock = passes.alone
        self._is_stopped = True
        # Held for moments only: whoever stops waits for the thread, and that may be in a callback
        # that stops or starts as well.
        self._control = threading.RLock()
        self._at_work = threading.Lock()
        self._bell = Bell()
        self._is_woken = False
        # True whenever a registration should wake it: there may be nothing to do at present.
        self._is_resting = False
        self._error: BaseException | None = None
        self.n_put_off = 0
        """How often nothing could be merged for the moment."""
        self.cpu_seconds = 0.0
        """Processor time that its threads have had, up to the last batch or rest."""
        self._is_put_off = False  # since the last batch
        self._pacer = Pacer()
        self._cpu_at = 0.0
        self._helper_seconds = 0.0
        # After the last batch: the time, the program's processor time, and its processors.
        self._program_at = 0.0, 0.0
        self._n_processors = 1
        # Between two passes it is None; END_OF_MEMORY in the rest after the last batch.
        self._cursor: int | None = None
        self._begun: Begun | None = None
        # Whose these are; and the rest that it is in, as `_rest` has it.
        self._worker: HiddenThread | None = None
        self._resting: tuple[float | None, int] | None = None

    @property
    def is_running(self) -> bool:
        thread = self._thread
        return not self._is_stopped and thread is not None and thread.is_alive()

    @property
    def error(self) -> BaseException | None:
        """What it died of, until `stop` has raised it."""
        return self._error

    def start(self) -> None:
        """Begin with the next pass; nothing when it runs already. ValueError when the engine was
        closed: who closes it sets `ended` before the last `stop`."""
        with LockScope(self._control):
            passes = self._passes()
            if passes is not None:
                passes.check_open()
            if self.is_running:
                self._come_back()
                return
            self._error = None
            # In this order: the one before must not take itself for wanted again.
            self._thread = HiddenThread(self._run, self._bell.ring, self._lock)
            self._is_stopped = False
            self._thread.start()
        log.info("scanner started")

    def stop(self) -> None:
        """End after the present batch; raises what it died of, once. Nothing if it does not run."""
        with LockScope(self._control):
            thread, was_stopped = self._thread, self._is_stopped
            self._is_stopped = True
            self._bell.ring()
        if thread is not None and not thread.is_current():
            thread.join()
        with LockScope(self._control):
            error, self._error = self._error, None
        if not was_stopped:
            log.info("scanner stopped")
        if error is not None:
            raise error

    def give_up(self) -> None:
        """`stop`, where what it died of is to be logged."""
        try:
            self.stop()
        except Exception:
            log.exception("the scanner had ended by an error")

    def wake(self, *, only_if_resting: bool = False) -> None:
        """Something has changed that should not wait for the end of a rest."""
        if self._is_resting or not only_if_resting:
            self._is_woken = True
            self._bell.ring()
        self._come_back()

    def _come_back(self) -> None:
        """If the system had no thread for it after a fork."""
        if self._thread is not None:
            self._thread.come_back()

    def _is_wanted(self) -> bool:
        """Is this thread still the scanner? Not after `stop`, even if another was started since."""
        thread = self._thread
        return not self._is_stopped and thread is not None and thread.is_current()

    def _passes(self) -> Passes | None:
        """None when the engine was collected. Also in a forked child, which this thread itself may
        be: a finaliser forked, in the midst of it."""
        return self._ref() if self._generation == forks.generation() else None

    def _is_asked(self) -> bool:
        """Is it to make way for a fork?"""
        thread = self._thread
        return thread is not None and thread.is_asked()

    def _run(self) -> bool:
        """Returns True where it makes way, and is to be called again."""
        # One that was stopped may still be in its last batch. No plain wait: it may be in a
        # callback that has started this one, and stops it again.
        while not self._at_work.acquire(timeout=OVERLAP_SECONDS):
            if not self._is_wanted():
                return False
            if self._is_asked():
                return True
        try:
            if self._worker is not self._thread:
                self._worker, self._cursor, self._resting = self._thread, None, None
            return self._work()
        except EngineClosedError:
            return False  # by another thread, which waits for the end of this one
        except BaseException as error:
            log.exception("the scanner has ended")
            self._error = error
            return False
        finally:
            self._at_work.release()

    def _work(self) -> bool:
        self._cpu_at = began = self._spent()
        self._program_at = time.monotonic(), time.process_time()
        # Not in every pass: the control groups take longer to read than a small pass.
        self._n_processors = procfs.processors()
        before = self.cpu_seconds
        while self._is_wanted():
            if self._resting is None:
                passes = self._passes()
                if passes is None:
                    return False
                # In this order: what is registered from here on either is seen or wakes.
                self._is_woken = False
                self._is_resting = True
                n_enlisted = passes.n_enlisted
                rest = self._step(passes)
                self._resting = None if rest is None else time.monotonic() + rest, n_enlisted
                self.cpu_seconds = before + self._spent() - began
                del passes  # nobody else may hold it any more
                hide()
            if self._is_wanted() and not self._rest(*self._resting):
                return True
            self._resting = None
        return False

    def _rest(self, end: float | None, n_enlisted: int) -> bool:
        """Until `wake`, or until then; where a registration should wake, until there is one. False
        where it is to make way."""
        while not self._is_asked():
            if self._is_woken or not self._is_wanted():
                return True
            left = LOOK_SECONDS if end is None else end - time.monotonic()
            if left <= 0:
                return True
            if self._bell.wait(min(left, LOOK_SECONDS)):
                continue
            passes = self._passes()
            if passes is None or (self._is_resting and passes.n_enlisted != n_enlisted):
                return True
            self._tidy(passes)
            del passes
        return False

    def _step(self, passes: Passes) -> float | None:
        """One batch; returns for how long to rest then, None: until woken."""
        settings = self._in_force.settings
        self._tidy(passes)
        _, n_pages = passes.pages_before(END_OF_MEMORY)
        if n_pages == 0:
            self._cursor = None
            return None
        if self._cursor == END_OF_MEMORY:
            rest = self._end_pass(passes)
            if not self._is_wanted():
                return None
            if rest > 0:
                return rest
        try:
            if self._cursor is None:
                self._begun = passes.begin_batches()
                self._pacer.begin_pass(time.monotonic())
                self._cursor = 0
            self._is_resting = False
            batch_pages = self._pacer.batch_pages(settings, n_pages)
            self._cursor, was_fruitful = passes.make_batch(self._cursor, batch_pages)
        except NotNowError as error:
            return self._put_off(error)
        self._is_put_off = False
        n_done, n_pages = passes.pages_before(self._cursor)
        # All that this thread has spent since the last batch, passes begun and ended included.
        self._helper_seconds = passes.helper_seconds
        spent, now, program = self._spent(), time.monotonic(), time.process_time()
        cpu_seconds, self._cpu_at = spent - self._cpu_at, spent
        (program_before, cpu_before), self._program_at = self._program_at, (now, program)
        return self._pacer.rest(
            settings,
            now,
            cpu_seconds,
            n_done / max(n_pages, 1),
            was_fruitful=was_fruitful,
            is_crowded=are_wanted(
                program - cpu_before - cpu_seconds, now - program_before, self._n_processors
            ),
        )

    def _spent(self) -> float:
        """Processor time of this thread, and of those that have helped it."""
        return time.thread_time() + self._helper_seconds

    def _tidy(self, passes: Passes) -> None:
        passes.tidy(idle_only=True, young_seconds=young_seconds(self._in_force.settings))

    def _put_off(self, error: NotNowError) -> float:
        """For how long to rest then."""
        log.log(
            logging.DEBUG if self._is_put_off else logging.WARNING, "the scanner waits: %s", error
        )
        self._is_put_off = True
        self.n_put_off += 1
        return PUT_OFF_SECONDS

    def _end_pass(self, passes: Passes) -> float:
        """The rest after its last batch is part of a pass. Returns for how long to rest besides:
        as is due for a look at all mappings; long after an idle one, in which nothing was read, but
        no longer than until what was too young for it is so no more, where that is much."""
        self._cursor = None
        if self._begun is None:
            return 0.0
        report = passes.end_batches(self._begun)
        log.debug("pass: %r", report)
        passes.tell(report)
        settings = self._in_force.settings
        if report.pages_hashed > 0:
            # What is registered meanwhile does not end this rest.
            self._is_resting = False
            return self._pacer.rest_after_look(settings, passes.look_seconds)
        rest = self._pacer.idle_rest(settings)
        if report.skipped["young"] * YOUNG_SHARE > report.pages_scanned:
            rest = min(rest, young_seconds(settings))
        return rest


class Scanning(contextlib.AbstractContextManager["Engine"]):
    """The background scanner, running: `with engine.start(): ...` stops it at the end."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def __enter__(self) -> Engine:
        return self._engine

    def __exit__(self, *_: object) -> None:
        self._engine.stop()
