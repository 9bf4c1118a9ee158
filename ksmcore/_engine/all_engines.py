"""All engines of this process: their memory taken together, and the end of the interpreter."""

from __future__ import annotations

import atexit
import logging
import weakref
from typing import TYPE_CHECKING

from ksmcore._engine.stats import MemoryInfo, memory_info

if TYPE_CHECKING:
    from ksmcore._engine.engine import Engine

__all__ = ["add", "discard", "leave_merged", "process_left_out_bytes", "process_memory_info"]

log = logging.getLogger("ksmcore")

_open: weakref.WeakSet[Engine] = weakref.WeakSet()


def add(engine: Engine) -> None:
    _open.add(engine)


def discard(engine: Engine) -> None:
    _open.discard(engine)


def leave_merged(engine: Engine) -> None:
    """For who knows that the process ends with its interpreter. Its scanner stops, and what is
    merged is not copied for an end that frees it: that would take as long as the merging did, and
    as much memory as the program has without."""
    engine._now().scanner.give_up()
    discard(engine)


def process_memory_info() -> MemoryInfo:
    """`memory_info` for all engines of this process."""
    # Kept meanwhile: the collector closes no descriptor, and no other file gets its number.
    engines = list(_open)
    return memory_info(fd for engine in engines for fd in engine._core.store_fds)


def process_left_out_bytes() -> int:
    """What the engines of this process did not merge in their last passes for want of mappings."""
    stats = [engine.stats() for engine in list(_open)]
    return sum(one.pages_left_out * one.page_bytes for one in stats)


@atexit.register
def _close_all() -> None:
    """Let memory that outlives the interpreter be plain again."""
    for engine in list(_open):
        try:
            engine.close()
        except Exception as error:
            log.warning("at exit: %r stays merged: %s", engine, error)
