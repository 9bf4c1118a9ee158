"""What the examples share: the --size argument, the kernel's view of memory, and how they end."""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ksmcore._kernel import smaps

SEED = 2009
MIB = 1 << 20


class WrongError(Exception):
    """A byte is not what it should be, or nothing was saved: the example ends with status 1."""


def say(what: str, text: str) -> None:
    print(f"{what:<10}{text}", flush=True)


def mib(n_bytes: float) -> str:
    return f"{n_bytes / MIB:,.1f} MiB"


def pss() -> int:
    """Bytes that this process has by the kernel's account; a shared page counts once in all.

    Without mapped files: their share changes whenever another process with the same libraries
    starts or ends.
    """
    totals = smaps.smaps_rollup()
    return totals["Pss"] - totals.get("Pss_File", 0)


def digest(array: NDArray[Any]) -> bytes:
    """A checksum of all bytes, the same wherever in memory the array lies."""
    return hashlib.blake2b(np.ascontiguousarray(array).reshape(-1).data, digest_size=16).digest()


def check(right: bool, what: str) -> None:
    if not right:
        raise WrongError(what)


@contextmanager
def timed(what: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    say("Time", f"{what}: {time.perf_counter() - started:.2f} s")


def say_saved(before: int, after: int, at_least: int) -> None:
    """Print PSS before and after; WrongError where less than `at_least` bytes were given back."""
    saved = before - after
    text = f"PSS before {mib(before)}, after {mib(after)}: saved {mib(saved)}"
    say("Memory", f"{text}, {saved / before:.0%}")
    check(saved >= at_least, f"only {mib(saved)} were saved, where {mib(at_least)} should be")


def run(example: Callable[[bool], None], description: str | None) -> int:
    """Run `example(full)` for the size that the command line asks for; the exit status."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--size",
        choices=("small", "full"),
        default="full",
        help="small: seconds and less than 200 MB; full (default): up to a minute and 2 GB",
    )
    options = parser.parse_args()
    started = time.perf_counter()
    try:
        example(options.size == "full")
    except WrongError as error:
        print(f"WRONG: {error}", file=sys.stderr)
        return 1
    say("Done", f"in {time.perf_counter() - started:.1f} s")
    return 0
