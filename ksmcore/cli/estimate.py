"""`ksmcore estimate`: a program with its arrays looked at while it runs, and nothing merged.

The allocator is there, so that arrays lie as they would under `ksmcore run`, and no scanner; a
thread counts equal pages now and then.
"""

from __future__ import annotations

import json
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ksmcore
from ksmcore._engine.hidden_thread import HiddenThread
from ksmcore._engine.stats import Estimate
from ksmcore.cli.companion import Companion
from ksmcore.cli.figures import DISABLED, SCHEMA
from ksmcore.cli.output import OutputFile
from ksmcore.cli.program import Program
from ksmcore.sizes import counted, human_bytes

if TYPE_CHECKING:
    from ksmcore._engine.engine import Engine

__all__ = ["Watch"]

# A look is followed by a rest of so many times its length, and of so many seconds at least.
REST_PER_LOOK = 20
LEAST_REST_SECONDS = 0.2


@dataclass(frozen=True)
class Look:
    """What one look found."""

    estimate: Estimate
    seconds: float
    """Since the program began."""

    def as_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds, **self.estimate.as_dict()}


class Looks:
    """A thread that looks at an engine's memory now and then, until the last look."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._began = time.monotonic()
        self._stop = threading.Event()
        self.n_looks = 0
        self.best: Look | None = None
        self.last: Look | None = None
        self._thread = HiddenThread(self._run)
        self._thread.start()

    def finish(self) -> None:
        """Look for the last time."""
        self._stop.set()
        self._thread.join()
        self._look()

    def _run(self) -> None:
        rest = LEAST_REST_SECONDS
        try:
            while not self._stop.wait(rest):
                before = time.monotonic()
                self._look()
                rest = max((time.monotonic() - before) * REST_PER_LOOK, LEAST_REST_SECONDS)
        except Exception:
            pass  # the program has closed the engine, perhaps: the last look will tell

    def _look(self) -> None:
        at = time.monotonic() - self._began
        self.last = Look(self._engine.estimate(), at)
        self.n_looks += 1
        if self.best is None or self.last.estimate.bytes_saved > self.best.estimate.bytes_saved:
            self.best = self.last


class Watch(Companion):
    """The allocator and the looks, and what is told of them at the end."""

    def __init__(self, program: Program, threshold_bytes: int, output: OutputFile | None) -> None:
        """Raises ValueError for what the engine refuses."""
        super().__init__("estimate")
        self._command = ["python", *program.command]
        self._threshold_bytes = threshold_bytes
        self._output = output
        self._engine = ksmcore.default_engine()
        ksmcore.install_allocator(threshold_bytes=threshold_bytes)
        self._looks = Looks(self._engine)

    def conclude(self, exit_status: int) -> list[str]:
        try:
            self._looks.finish()
        except Exception as error:
            return [f"ksmcore: no estimate of the end: {error}"]
        best, last = self._looks.best, self._looks.last
        if best is None or last is None:
            return []
        lines = self._text(best, last)
        if self._output is not None:
            found = {
                "schema": SCHEMA,
                "ksmcore": ksmcore.__version__,
                "command": self._command,
                "exit_status": exit_status,
                "threshold_bytes": self._threshold_bytes,
                "looks": self._looks.n_looks,
                "best": best.as_dict(),
                "end": last.as_dict(),
            }
            try:
                self._output.write(json.dumps(found, indent=1) + "\n")
            except OSError as error:
                lines.append(f"ksmcore: {self._output.path} was not written: {error}")
        return lines

    def _text(self, best: Look, last: Look) -> list[str]:
        most = best.estimate
        looks = counted(self._looks.n_looks, "look")
        if most.bytes_saved == 0:
            why = self._why_nothing(most, last.estimate)
            return [f"ksmcore: nothing could be saved: {why} ({looks})."]
        present = last.estimate.pages_present * last.estimate.page_bytes
        return [
            f"ksmcore: {human_bytes(most.bytes_saved)} of "
            f"{human_bytes(most.pages_present * most.page_bytes)} could be saved at the best "
            f"moment, {best.seconds:.1f} s after the start",
            f"  Pages    {most.pages_duplicate:,} equal to another, {most.pages_zero:,} of zeros, "
            f"{most.pages_distinct:,} that would remain",
            f"  End      {human_bytes(last.estimate.bytes_saved)} of {human_bytes(present)}",
            f"  Looked   {counted(self._looks.n_looks, 'time')} in {last.seconds:.1f} s; "
            "nothing was merged",
        ]

    def _why_nothing(self, most: Estimate, last: Estimate) -> str:
        if self._engine._disabled:
            return DISABLED
        if most.pages_present or last.pages_present:
            return "no two pages of its arrays held the same bytes"
        if most.pages or last.pages:
            return "no page of its arrays was in memory when they were looked at"
        return f"no NumPy array of {human_bytes(self._threshold_bytes)} or more was seen"
