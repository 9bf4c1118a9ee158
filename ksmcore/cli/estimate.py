"""`ksmcore estimate`: a program with its arrays, or all of its memory, looked at while it runs, and
nothing merged.

The allocator is there, so that arrays lie as they would under `ksmcore run`, and no scanner; a
thread counts equal pages now and then.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Generic, TypeVar

import ksmcore
from ksmcore._engine.hidden_thread import NowAndThen
from ksmcore._engine.inventory import Inventory, take_inventory
from ksmcore._engine.stats import Estimate
from ksmcore.cli.companion import Companion
from ksmcore.cli.figures import SCHEMA, blocks_of, elsewhere_lines
from ksmcore.cli.inventory import place_lines
from ksmcore.cli.output import OutputFile
from ksmcore.cli.program import Program
from ksmcore.cli.untouched import DISABLED
from ksmcore.cli.whose_memory import Whose, elsewhere, install, past_malloc
from ksmcore.sizes import counted, human_bytes

__all__ = ["Watch", "WholeWatch", "estimate_text", "whole_text"]

# A look is followed by a rest of so many times its length, and of so many seconds at least.
REST_PER_LOOK = 20
LEAST_REST_SECONDS = 0.2


Found = TypeVar("Found", Estimate, Inventory)


@dataclass(frozen=True)
class Look(Generic[Found]):
    """What one look found."""

    found: Found
    seconds: float
    """Since the program began."""


class Looks(Generic[Found]):
    """A thread that looks at a program's memory now and then, until the last look."""

    def __init__(self, look: Callable[[], Found], saved: Callable[[Found], int]) -> None:
        """`saved` tells of two finds which is better."""
        self._look_now: Callable[[], Found] = look
        self._saved: Callable[[Found], int] = saved
        self._began = time.monotonic()
        self.n_looks = 0
        self.best: Look[Found] | None = None
        self.last: Look[Found] | None = None
        # Where the program has closed the engine it ends: the last look will tell.
        self._looking = NowAndThen(self._look, LEAST_REST_SECONDS, REST_PER_LOOK)

    def finish(self) -> None:
        """Look for the last time."""
        self._looking.end()
        self._look()

    def _look(self) -> None:
        at = time.monotonic() - self._began
        self.last = Look(self._look_now(), at)
        self.n_looks += 1
        if self.best is None or self._saved(self.last.found) > self._saved(self.best.found):
            self.best = self.last


class Watching(Companion, Generic[Found]):
    """The allocator and the looks, and what is told of them at the end."""

    def __init__(
        self,
        program: Program,
        threshold_bytes: int,
        memory: Whose | None,
        output: OutputFile | None,
    ) -> None:
        """Raises ValueError for what the engine refuses."""
        super().__init__("estimate")
        self._command = ["python", *program.command]
        self._threshold_bytes = threshold_bytes
        self._output = output
        self._engine = ksmcore.default_engine()
        self._whose_memory = install(self._engine, threshold_bytes, memory)
        self._looks: Looks[Found] = self._begin()

    def _begin(self) -> Looks[Found]:
        raise NotImplementedError

    def _text(self, best: Look[Found], last: Look[Found]) -> list[str]:
        raise NotImplementedError

    def _data(self, look: Look[Found]) -> dict[str, Any]:
        raise NotImplementedError

    def _besides(self, seconds: float) -> dict[str, Any]:
        """Of what is not looked at, when it ran for so long."""
        return {}

    def conclude(self, exit_status: int) -> list[str]:
        try:
            self._looks.finish()
        except Exception as error:
            return [f"ksmcore: no estimate of the end: {error}"]
        best, last = self._looks.best, self._looks.last
        if best is None or last is None:
            return []
        besides = self._besides(last.seconds)
        lines = self._text(best, last) + elsewhere_lines(besides)
        if self._output is not None:
            found = {
                "schema": SCHEMA,
                "ksmcore": ksmcore.__version__,
                "command": self._command,
                "exit_status": exit_status,
                "threshold_bytes": self._threshold_bytes,
                "whose_memory": self._whose_memory,
                "looks": self._looks.n_looks,
                "best": {"seconds": best.seconds, **self._data(best)},
                "end": {"seconds": last.seconds, **self._data(last)},
                **besides,
            }
            try:
                self._output.write(json.dumps(found, indent=1) + "\n")
            except OSError as error:
                lines.append(f"ksmcore: {self._output.path} was not written: {error}")
        return lines


class Watch(Watching[Estimate]):
    """Of what `run` would reach."""

    def _begin(self) -> Looks[Estimate]:
        return Looks(self._engine.estimate, lambda found: found.bytes_saved)

    def _data(self, look: Look[Estimate]) -> dict[str, Any]:
        return look.found.as_dict()

    def _besides(self, seconds: float) -> dict[str, Any]:
        return {"elsewhere": elsewhere(self._engine, seconds), "past_malloc": past_malloc()}

    def _text(self, best: Look[Estimate], last: Look[Estimate]) -> list[str]:
        most = best.found
        if most.bytes_saved == 0:
            why = self._why_nothing(most, last.found)
            looks = counted(self._looks.n_looks, "look")
            return [f"ksmcore: nothing could be saved: {why} ({looks})."]
        return estimate_text(
            most.as_dict(), best.seconds, last.found.as_dict(), last.seconds, self._looks.n_looks
        )

    def _why_nothing(self, most: Estimate, last: Estimate) -> str:
        if self._engine._disabled:
            return DISABLED
        if most.pages_present or last.pages_present:
            return "no two pages of its arrays held the same bytes"
        if most.pages or last.pages:
            return "no page of its arrays was in memory when they were looked at"
        return f"no {blocks_of(self._whose_memory, self._threshold_bytes)} was seen"


class WholeWatch(Watching[Inventory]):
    """Of all memory that the program has for itself."""

    def _begin(self) -> Looks[Inventory]:
        return Looks(
            lambda: take_inventory([os.getpid()]),
            lambda found: found.saveable_bytes,
        )

    def _data(self, look: Look[Inventory]) -> dict[str, Any]:
        return asdict(look.found)

    def _text(self, best: Look[Inventory], last: Look[Inventory]) -> list[str]:
        return whole_text(
            asdict(best.found), best.seconds, asdict(last.found), last.seconds, self._looks.n_looks
        )


def estimate_text(
    best: Mapping[str, Any], best_at: float, last: Mapping[str, Any], last_at: float, n_looks: int
) -> list[str]:
    """What was found in arrays, in lines for a person."""
    size = best["page_bytes"]
    return [
        f"ksmcore: {human_bytes(best['bytes_saved'])} of "
        f"{human_bytes(best['pages_present'] * size)} could be saved at the best "
        f"moment, {best_at:.1f} s after the start",
        f"  Pages    {best['pages_duplicate']:,} equal to another, {best['pages_zero']:,} of "
        f"zeros, {best['pages_distinct']:,} that would remain",
        f"  End      {human_bytes(last['bytes_saved'])} of "
        f"{human_bytes(last['pages_present'] * size)}",
        f"  Looked   {counted(n_looks, 'time')} in {last_at:.1f} s; nothing was merged",
    ]


def whole_text(
    best: Mapping[str, Any], best_at: float, last: Mapping[str, Any], last_at: float, n_looks: int
) -> list[str]:
    """What was found in all of the memory, in lines for a person."""
    if not best["processes"]:
        return [f"ksmcore: {why}" for why in best["failures"].values()]
    return [
        f"ksmcore: {human_bytes(best['saveable_bytes'])} of {human_bytes(best['bytes'])} of the "
        "program's whole memory could be saved at the best moment, "
        f"{best_at:.1f} s after the start",
        *place_lines(best["processes"][0]),
        f"  End      {human_bytes(last['saveable_bytes'])} of {human_bytes(last['bytes'])}",
        f"  Looked   {counted(n_looks, 'time')} in {last_at:.1f} s; nothing was merged",
    ]
