"""Waiting for what a test asserts, never for a time."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
# Nothing takes as long; whoever waits longer waits for ever.
WAIT_SECONDS = 120


def wait_until(holds: Callable[[], T], what: str = "it") -> T:
    """Whatever `holds` returns, once it is true. How long that takes is nobody's business here."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not (found := holds()):
        assert time.monotonic() < deadline, f"{what} has not happened"
        time.sleep(0.002)
    return found
