"""ksmcore against the kernel's own KSM, on the same machine in the same run, in turns.

    python -m bench.versus_kernel [--mib 1024] [--rounds 3] [--cases worst,join] [--json FILE]

Prints the machine, the settings of both, and for each case the least, median and greatest time of
either side with the ratio of the medians. Needs root for the kernel's half, and says so without.
All settings of the kernel's KSM are put back. See README.md for how to read it.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import mmap
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import ksmcore
from bench import conftest, corpora, kernel_ksm
from bench.corpora import PAGE, Pages
from bench.measure import digest, read_all

LIMIT_SECONDS = 600.0
SMART_SCANS = 12  # after so many scans smart_scan skips most unchanged pages


@dataclass
class Side:
    """Times of one side, in seconds, and what it found."""

    seconds: list[float] = field(default_factory=list)
    found: list[int] = field(default_factory=list)

    def __str__(self) -> str:
        if not self.seconds:
            return f"{'-':>8}{'-':>9}{'-':>9}"
        times = (min(self.seconds), statistics.median(self.seconds), max(self.seconds))
        return "{:8.4f} {:8.4f} {:8.4f}".format(*times)


@dataclass
class Case:
    """One row: how its memory is filled, what each side does, and what is asked for."""

    name: str
    what: str
    goal: str
    n_pages: int
    work: Callable[[Case, bool], tuple[float, int]]
    kernel: Side = field(default_factory=Side)
    ours: Side = field(default_factory=Side)

    @property
    def ratio(self) -> float | None:
        if not self.kernel.seconds or not self.ours.seconds:
            return None
        return statistics.median(self.kernel.seconds) / statistics.median(self.ours.seconds)


class Memory:
    """Private memory in pages of the usual size, the same kind for both sides."""

    def __init__(self, *fills: Callable[[Pages], object], n_pages: int) -> None:
        self.maps = []
        self.arrays: list[Pages] = []
        for fill in fills:
            memory = mmap.mmap(-1, n_pages * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            memory.madvise(mmap.MADV_NOHUGEPAGE)
            self.maps.append(memory)
            self.arrays.append(np.frombuffer(memory, np.uint8).reshape(n_pages, PAGE))
            fill(self.arrays[-1])
        self.digests = [digest(pages) for pages in self.arrays]

    def mergeable(self, first: int = 0, end: int | None = None) -> None:
        for memory in self.maps[first:end]:
            memory.madvise(kernel_ksm.MADV_MERGEABLE)

    def check(self) -> None:
        for pages, known in zip(self.arrays, self.digests, strict=True):
            if digest(pages) != known:
                raise SystemExit("contents have changed")


@contextlib.contextmanager
def memory_of(*fills: Callable[[Pages], object], n_pages: int) -> Iterator[Memory]:
    """Filled memory; checked at the end, and unmapped."""
    memory = Memory(*fills, n_pages=n_pages)
    yield memory
    memory.check()
    memory.arrays.clear()
    gc.collect()
    for one in memory.maps:
        one.close()


def timed_merge(
    memory: Memory, kernel: bool, n_expected: int, before: int = 0
) -> tuple[float, int]:
    """Merge the arrays from number `before` on, those before them being merged already; seconds,
    and pages saved by it."""
    if not kernel:
        with ksmcore.Engine() as engine:
            if before:
                engine.dedup(*memory.arrays[:before])
            begun = time.perf_counter()
            report = engine.dedup(*memory.arrays[before:])
            seconds = time.perf_counter() - begun
            for pages in memory.arrays:
                read_all(pages)
            return seconds, report.bytes_saved // PAGE
    kernel_ksm.start_empty()
    already = 0
    if before:
        already = (before - 1) * len(memory.arrays[0])
        memory.mergeable(0, before)
        kernel_ksm.run()
        if not kernel_ksm.wait_until_saved(already, LIMIT_SECONDS):
            raise SystemExit("the kernel did not merge the first copies in time")
    begun = time.perf_counter()
    memory.mergeable(before)
    kernel_ksm.run()
    kernel_ksm.wait_until_saved(already + n_expected, LIMIT_SECONDS)
    seconds = time.perf_counter() - begun
    found = kernel_ksm.n_saved() - already
    kernel_ksm.start_empty()
    return seconds, found


# ---- cases -------------------------------------------------------------------------------------


def worst(case: Case, kernel: bool) -> tuple[float, int]:
    with memory_of(*[corpora.fill_tails] * 2, n_pages=case.n_pages) as memory:
        return timed_merge(memory, kernel, case.n_pages)


def join(case: Case, kernel: bool) -> tuple[float, int]:
    with memory_of(*[corpora.fill_tails] * 4, n_pages=case.n_pages) as memory:
        return timed_merge(memory, kernel, 2 * case.n_pages, before=2)


def best(case: Case, kernel: bool) -> tuple[float, int]:
    with memory_of(*[corpora.fill_repeated] * 2, n_pages=case.n_pages) as memory:
        # At most max_page_sharing pages map one copy, ...
        limit = kernel_ksm.number("max_page_sharing") if kernel else 256
        n_copies = -(-2 * case.n_pages // limit)
        return timed_merge(memory, kernel, 2 * case.n_pages - 2 * n_copies)  # ... give or take


def mixture(case: Case, kernel: bool) -> tuple[float, int]:
    census: list[corpora.Census] = []

    def fill(pages: Pages) -> None:
        census[:] = [corpora.fill_mixture(pages)]

    with memory_of(fill, n_pages=case.n_pages) as memory:
        return timed_merge(memory, kernel, census[0].n_spare)


def idle(case: Case, kernel: bool) -> tuple[float, int]:
    return idle_pass(case, kernel, smart=False)


def idle_smart(case: Case, kernel: bool) -> tuple[float, int]:
    return idle_pass(case, kernel, smart=True)


def idle_pass(case: Case, kernel: bool, *, smart: bool) -> tuple[float, int]:
    with memory_of(corpora.fill_random, n_pages=case.n_pages) as memory:
        if not kernel:
            with ksmcore.Engine() as engine:
                engine.register(memory.maps[0])
                for _ in range(3):
                    engine.scan()
                begun = time.perf_counter()
                engine.scan()
                return time.perf_counter() - begun, 0
        kernel_ksm.start_empty()
        kernel_ksm.write("smart_scan", "1" if smart else "0")
        memory.mergeable()
        kernel_ksm.run()
        kernel_ksm.wait_scans(SMART_SCANS if smart else 2)
        seconds = kernel_ksm.wait_scans(1)
        kernel_ksm.write("smart_scan", kernel_ksm.FULL_SPEED["smart_scan"])
        kernel_ksm.start_empty()
        return seconds, 0


CASES: dict[str, tuple[str, str, Callable[[Case, bool], tuple[float, int]], int]] = {
    "worst": ("two copies; pages differ in their last 8 bytes", ">= 10x", worst, 2),
    "join": ("a third and a fourth copy join them", ">= 10x", join, 4),
    "best": ("one repeated page, twice as much", ">= 10x", best, 2),
    "mixture": ("unique, pairs, shuffled pairs, zero", ">= 5x", mixture, 1),
    "idle": ("a pass over unchanged unique pages", "<= 1 ms/GiB", idle, 1),
    "idle_smart": ("the same, smart_scan skipping", "<= 1 ms/GiB", idle_smart, 1),
}


# ---- the run -----------------------------------------------------------------------------------


def available_mib() -> int:
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) >> 10
    raise SystemExit("/proc/meminfo has no MemAvailable")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.versus_kernel", description=__doc__)
    parser.add_argument("--mib", type=int, default=1024, help="mebibytes of one copy")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cases", default=",".join(CASES), help="names, with commas between")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    given = parser.parse_args()
    unknown = set(given.cases.split(",")) - set(CASES)
    if unknown or given.mib < 8 or given.rounds < 1:
        parser.error(f"cases are {', '.join(CASES)}; --mib at least 8, --rounds at least 1")
    return given


def run_case(case: Case, sides: list[bool], n_rounds: int) -> None:
    for _ in range(n_rounds):
        for kernel in sides:
            seconds, found = case.work(case, kernel)
            side = case.kernel if kernel else case.ours
            side.seconds.append(seconds)
            side.found.append(found)
    ratio = "" if case.ratio is None else f"{case.ratio:7.1f}x"
    found = " / ".join(
        f"{statistics.median(side.found):,.0f}" for side in (case.kernel, case.ours) if side.found
    )
    print(
        f"{case.name:<11}{case.n_pages:>9}  {case.kernel!s}  {case.ours!s} {ratio:>9}"
        f"  {case.goal:<12} {found}",
        flush=True,
    )


def as_dict(case: Case) -> dict[str, Any]:
    return {
        "what": case.what,
        "pages_per_copy": case.n_pages,
        "kernel_seconds": case.kernel.seconds,
        "kernel_pages_saved": case.kernel.found,
        "ksmcore_seconds": case.ours.seconds,
        "ksmcore_pages_saved": case.ours.found,
        "ratio": case.ratio,
        "goal": case.goal,
    }


def main() -> None:
    given = arguments()
    missing = kernel_ksm.why_not()
    names = given.cases.split(",")
    most = available_mib() * 3 // 4 // max(CASES[name][3] for name in names)
    mib = min(given.mib, most)
    header = [*conftest.pytest_report_header()[:-1], f"one copy: {mib} MiB"]
    if mib < given.mib:
        header.append(f"({given.mib} MiB asked for, which this machine has no memory for)")
    with contextlib.ExitStack() as stack:
        settings: dict[str, str] = {}
        if missing is None:
            settings = stack.enter_context(kernel_ksm.at_full_speed())
            header.append("kernel's KSM: " + ", ".join(f"{k}={v}" for k, v in settings.items()))
        else:
            header.append(f"only ksmcore runs: {missing}")
        print(*header, sep="\n")
        print(f"\n{'':<20}  {'kernel: least, median, most':^27} {'ksmcore':^27}")
        cases = []
        for name in names:
            what, goal, work, _ = CASES[name]
            cases.append(Case(name, what, goal, (mib << 20) // PAGE, work))
            run_case(cases[-1], [True, False] if missing is None else [False], given.rounds)
    if given.json:
        result = {"machine": header, "cases": {case.name: as_dict(case) for case in cases}}
        given.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
