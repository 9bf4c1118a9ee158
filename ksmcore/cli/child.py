"""A process below `ksmcore run --children`, see `children`.

It writes its numbers to a file now and then, for it may be killed, and when it ends.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import json
import os
import sys
from pathlib import Path

import ksmcore
from ksmcore._engine import all_engines
from ksmcore._engine.hidden_thread import NowAndThen
from ksmcore.cli.figures import Source
from ksmcore.cli.whose_memory import Whose

__all__ = ["Order", "begin"]

# How often it writes its numbers, and the most of its time that it takes for that.
WRITE_SECONDS = 1.0
WRITE_SHARE = 1 / 50


@dataclasses.dataclass(frozen=True)
class Order:
    """What a child is to do."""

    directory: str
    threshold_bytes: int
    memory: Whose
    scans: bool
    interval_ms: int | None


class _Reporter:
    """Writes the numbers of this process."""

    def __init__(self, order: Order) -> None:
        self.pid = os.getpid()
        self._source = Source(
            ksmcore.default_engine(),
            [sys.executable, *sys.orig_argv[1:]],
            order.threshold_bytes,
            whose_memory=order.memory,
            wants_scans=order.scans,
        )
        # A number may come again when its process is gone.
        self._path = Path(order.directory, f"{self.pid}-{os.urandom(4).hex()}.json")
        self._is_over = False
        # Where who asked is gone, and so the directory, it ends.
        self._writing = NowAndThen(self._write, WRITE_SECONDS, 1 / WRITE_SHARE)

    def finish(self) -> None:
        """Write for the last time. Nothing in a process that was forked since."""
        if self.pid == os.getpid() and not self._is_over:
            self._is_over = True
            self._writing.end(WRITE_SECONDS)
            with contextlib.suppress(Exception):
                self._write()
            all_engines.leave_merged(ksmcore.default_engine())

    def _write(self) -> None:
        figures = self._source.snapshot()
        del figures["regions"]
        fresh = self._path.with_suffix(".new")
        fresh.write_text(json.dumps(figures))
        fresh.replace(self._path)


_reporter: _Reporter | None = None


def begin(told: str) -> None:
    """Do in this process what an order as JSON says; once."""
    global _reporter
    if _reporter is not None and _reporter.pid == os.getpid():
        return
    order = Order(**json.loads(told))
    ksmcore.install_allocator(order.threshold_bytes, memory=order.memory)
    if order.scans:
        asked = {} if order.interval_ms is None else {"sleep_millisecs": order.interval_ms}
        ksmcore.start(**asked)
    _reporter = _Reporter(order)
    atexit.register(_reporter.finish)
    util = sys.modules.get("multiprocessing.util")
    if util is not None:
        # Its children end without atexit; what the program has it do goes first.
        util.Finalize(None, _reporter.finish, exitpriority=-1000)
