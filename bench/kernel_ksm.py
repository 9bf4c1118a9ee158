"""The kernel's own KSM at full speed, as the peer of the benchmarks; every setting is put back.

Called by versus_kernel. Needs root and a kernel with KSM; `why_not` tells what is missing.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

KSM = Path("/sys/kernel/mm/ksm")
MADV_MERGEABLE = 12
# As fast as it goes. The order matters: max_page_sharing and the like change only when nothing is
# merged, and the advisor must not change pages_to_scan meanwhile.
FULL_SPEED = {
    "advisor_mode": "none",
    "pages_to_scan": "100000",
    "sleep_millisecs": "0",
    "smart_scan": "0",
    "use_zero_pages": "1",
}
POLL_SECONDS = 0.002

_threads: list[Path] = []


def why_not() -> str | None:
    """None when the kernel's KSM can be switched on here, else what is missing."""
    if not KSM.is_dir():
        return "this kernel has no KSM (/sys/kernel/mm/ksm is missing)"
    if not os.access(KSM / "run", os.W_OK):
        return "the kernel's KSM can only be switched on by root"
    return None


def read(name: str) -> str:
    text = (KSM / name).read_text(encoding="ascii").strip()
    # Of a choice, "[none] scan-time", the chosen word.
    return text.partition("[")[2].partition("]")[0] if "[" in text else text


def number(name: str) -> int:
    return int(read(name))


def write(name: str, value: str) -> None:
    (KSM / name).write_text(value, encoding="ascii")


def spent_seconds() -> float:
    """Processor time of the kernel's thread that merges; NaN where it is not to be seen."""
    if not _threads:
        for path in Path("/proc").glob("[0-9]*/comm"):
            with contextlib.suppress(OSError):
                if path.read_text(encoding="ascii", errors="replace") == "ksmd\n":
                    _threads.append(path.with_name("stat"))
    if not _threads:
        return math.nan
    words = _threads[0].read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def settings() -> dict[str, str]:
    """All settings that this kernel has of those that are changed here, and `run`."""
    return {name: read(name) for name in ("run", *FULL_SPEED) if (KSM / name).exists()}


@contextlib.contextmanager
def at_full_speed() -> Iterator[dict[str, str]]:
    """KSM ready at full speed, not running yet; gives its settings. What was set before is set
    again afterwards, also when a signal ends the program."""
    before = settings()

    def end(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    handlers = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        write("run", "2")
        for name, value in FULL_SPEED.items():
            if name in before:
                write(name, value)
        yield settings()
    finally:
        # What is merged would stay so with run = 0, and not be the way it was.
        if before["run"] != "1":
            write("run", "2")
        for name, value in before.items():
            if name != "run":
                write(name, value)
        write("run", before["run"])
        for number, handler in handlers.items():
            signal.signal(number, handler)


def start_empty() -> None:
    """Unmerge everything, so that both trees are empty, and stop."""
    write("run", "2")
    write("run", "0")


def run() -> None:
    write("run", "1")


def stop() -> None:
    write("run", "0")


def n_saved() -> int:
    """Pages that merging saves in the whole system now, zero pages included."""
    zero = number("ksm_zero_pages") if (KSM / "ksm_zero_pages").exists() else 0
    return number("pages_sharing") + zero


def wait_until_saved(n_pages: int, limit_seconds: float) -> bool:
    """Wait until so many pages are saved; False when the time is over."""
    until = time.monotonic() + limit_seconds
    while n_saved() < n_pages:
        if time.monotonic() > until:
            return False
        time.sleep(POLL_SECONDS)
    return True


def wait_scans(n_scans: int) -> float:
    """Seconds that so many whole scans take, from the end of one scan on."""
    first = number("full_scans")
    while number("full_scans") == first:
        time.sleep(POLL_SECONDS)
    begun = time.perf_counter()
    first = number("full_scans")
    while number("full_scans") < first + n_scans:
        time.sleep(POLL_SECONDS)
    return time.perf_counter() - begun
