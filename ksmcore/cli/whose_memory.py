"""Whose memory a program has merged: that of NumPy's arrays, or what any library asks of malloc;
and how much there is that is not reached."""

from __future__ import annotations

import contextlib
import os
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal

import ksmcore
from ksmcore._engine.inventory import look_elsewhere
from ksmcore._kernel.syscalls import page_bytes

if TYPE_CHECKING:
    from ksmcore._engine.engine import Engine

__all__ = ["Whose", "elsewhere", "install", "past_malloc"]

Whose = Literal["numpy", "all"]

# How long the memory elsewhere is looked at: a part of what the program took, and within bounds.
PART_OF_RUN = 0.01
LEAST_SECONDS = 0.05
MOST_SECONDS = 1.0

ARROWS_POOL = "ARROW_DEFAULT_MEMORY_POOL"
# Libraries whose own allocators ask the kernel for memory, not malloc.
PAST_MALLOC = ("polars",)


def install(engine: Engine, threshold_bytes: int, asked: Whose | None) -> Whose:
    """Install the allocator of the default engine, for all that can be reached unless somebody is
    asked for; returns whose memory that is.

    Raises ValueError for a threshold that is none, and for what is asked for and is not to be had.
    """
    if engine._disabled:
        return "numpy"
    if asked is None:
        with contextlib.suppress(ValueError):
            return install(engine, threshold_bytes, "all")
    whose = asked or "numpy"
    ksmcore.install_allocator(threshold_bytes, memory=whose)
    if whose == "all" and ARROWS_POOL not in os.environ:
        # For the library, which reads it when it is loaded: what Python shows stays as it was.
        os.putenv(ARROWS_POOL, "system")
    return whose


def past_malloc() -> list[str]:
    """Libraries in use that have their memory from elsewhere."""
    found = [name for name in PAST_MALLOC if name in sys.modules]
    with contextlib.suppress(Exception):  # half imported, or another thing of that name
        backend = sys.modules["pyarrow"].default_memory_pool().backend_name
        if backend != "system":
            found.append(f"pyarrow ({backend})")
    return found


def elsewhere(engine: Engine, seconds: float) -> dict[str, Any] | None:
    """Private memory outside of the engine's regions, and how much of it is equal, after a run of
    so many seconds; None where it cannot be told."""
    most_seconds = min(max(seconds * PART_OF_RUN, LEAST_SECONDS), MOST_SECONDS)
    size = page_bytes()
    try:
        regions = engine._core.regions()
        reached = [(addr, addr + n_pages * size) for _, addr, n_pages in regions]
        return asdict(look_elsewhere(reached, most_seconds))
    except Exception:  # whatever it is, the program's end is not the place for it
        return None
