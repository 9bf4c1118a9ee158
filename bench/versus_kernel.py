"""ksmcore against the kernel's own KSM, on the same machine in the same run, in turns.

    python -m bench.versus_kernel [--mib 1024] [--rounds 3] [--cases worst,join] [--huge]
                                  [--threads 1] [--growth] [--json FILE] [--markdown FILE]
                                  [--picture FILE]

Prints the machine, the settings of both, and for each case the least, median and greatest time of
either side with the ratio of the medians. Needs root for the kernel's half, and says so without.
All settings of the kernel's KSM are put back. See README.md for how to read it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import statistics
from pathlib import Path
from typing import Any

import ksmcore
from bench import conftest, kernel_ksm, limit, versus_cases, versus_picture
from bench.corpora import PAGE
from bench.versus_cases import CASES, Case
from ksmcore._kernel import procfs

GROWTH_MIB = (256, 512, 1024, 2048, 4096, 8192)

# ---- the run -----------------------------------------------------------------------------------


def available_mib() -> int:
    return procfs.sizes_of("/proc/meminfo")["MemAvailable"] >> 20


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.versus_kernel", description=__doc__)
    parser.add_argument("--mib", type=int, default=1024, help="mebibytes of one copy")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cases", default=",".join(CASES), help="names, with commas between")
    parser.add_argument("--threads", default="auto", help="of ksmcore; the kernel's KSM has one")
    parser.add_argument("--huge", action="store_true", help="memory in huge pages, where it may")
    parser.add_argument("--growth", action="store_true", help="also from 256 MiB to 8 GiB in all")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--markdown", type=Path, help="write the table to this file")
    parser.add_argument("--picture", type=Path, help="draw free memory against time to this file")
    given = parser.parse_args()
    unknown = set(given.cases.split(",")) - set(CASES)
    if unknown or given.mib < 8 or given.rounds < 1:
        parser.error(f"cases are {', '.join(CASES)}; --mib at least 8, --rounds at least 1")
    return given


def run_case(case: Case, sides: list[bool], n_rounds: int) -> None:
    for _ in range(n_rounds):
        for kernel in sides:
            (case.kernel if kernel else case.ours).add(case.work(case, kernel))
        if case.name in versus_cases.FILLS and limit.library() is not None:
            case.limit.add(versus_cases.at_limit(case))
    print(
        f"{case.name:<10}{case.kernel!s}  {case.ours!s}{ratio_of(case):>8}  {cpu_of(case):<14}"
        f"{limit_of(case):<14}{case.goal:<17} {found_by(case)}",
        flush=True,
    )


def cpu_of(case: Case) -> str:
    """Processor time of the kernel's thread, and of all of ours."""
    sides = [statistics.median(side.cpu_seconds or [math.nan]) for side in (case.kernel, case.ours)]
    return "" if math.isnan(sides[1]) else " / ".join(f"{seconds:.2f}" for seconds in sides)


def limit_of(case: Case) -> str:
    """What cannot be left out, and how many times as long ksmcore takes."""
    if case.times_limit is None:
        return ""
    return f"{statistics.median(case.limit.seconds):.3f} x{case.times_limit:.2f}"


def ratio_of(case: Case) -> str:
    return "" if case.ratio is None else f"{case.ratio:.1f}x"


def found_by(case: Case) -> str:
    """What both sides found; of cases that use merged memory, against the same without merging."""
    sides = [side for side in (case.kernel, case.ours) if side.found]
    if case.counts != "ns":
        return " / ".join(f"{statistics.median(side.found):,.0f}" for side in sides) + (
            f" pages {case.counts}"
        )
    plain = statistics.median(count for side in sides for count in side.found)
    times = [statistics.median(side.seconds) / case.n_pages * 1e9 for side in sides]
    return f"plain {plain:,.0f} ns/page, x " + " / ".join(f"{plain / time:.2f}" for time in times)


def as_dict(case: Case) -> dict[str, Any]:
    return {
        "what": case.what,
        "counts": case.counts,
        "pages_per_copy": case.n_pages,
        "kernel_seconds": case.kernel.seconds,
        "kernel_cpu_seconds": case.kernel.cpu_seconds,
        "kernel_found": case.kernel.found,
        "ksmcore_seconds": case.ours.seconds,
        "ksmcore_cpu_seconds": case.ours.cpu_seconds,
        "ksmcore_found": case.ours.found,
        "ratio": case.ratio,
        "limit_seconds": case.limit.seconds,
        "goal": case.goal,
    }


def main() -> None:
    given = arguments()
    missing = kernel_ksm.why_not()
    names = given.cases.split(",")
    most = available_mib() * 3 // 4
    mib = min(given.mib, most // max(CASES[name][4] for name in names))
    kind = "huge pages where it may" if given.huge else f"pages of {PAGE} bytes"
    os.environ["KSMCORE_THREADS"] = given.threads
    with ksmcore.Engine() as engine:
        threads = f"{engine.settings.threads} of {procfs.processors()} processors"
    header = [*conftest.pytest_report_header()[:-1], f"one copy: {mib} MiB, {kind}"]
    header.append(f"ksmcore's threads: {threads}")
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
        print(
            f"\n{'':<10}{'kernel: least, median, most':^26}  {'ksmcore':^26}{'ratio':>8}  "
            f"{'processor':<14}{'limit':<14}asked for"
        )
        sides = [True, False] if missing is None else [False]
        cases = []
        for name in names:
            what, goal, counts, work, _ = CASES[name]
            cases.append(Case(name, what, goal, counts, (mib << 20) // PAGE, work, given.huge))
            run_case(cases[-1], sides, given.rounds)
        if given.picture:
            versus_picture.draw(given.picture, (mib << 20) // PAGE, sides)
    growth = run_growth(most) if given.growth else []
    if given.json:
        result = {
            "machine": header,
            "cases": {case.name: as_dict(case) for case in cases},
            "growth": growth,
        }
        given.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if given.markdown:
        given.markdown.write_text(as_markdown(header, cases, growth), encoding="utf-8")


def run_growth(most_mib: int) -> list[dict[str, float]]:
    """ksmcore alone, over more and more memory; the records it needs, too."""
    rows = []
    for mib in (mib for mib in GROWTH_MIB if mib <= most_mib):
        case = Case("growth", "", "", "", (mib << 20) // PAGE, versus_cases.growth)
        result = case.work(case, False)
        row = {
            "mib": mib,
            "us_per_page": result.seconds / case.n_pages * 1e6,
            "metadata_bytes_per_page": result.found / case.n_pages,
        }
        rows.append(row)
        print(
            f"{mib:>6} MiB in all: {row['us_per_page']:.2f} us and "
            f"{row['metadata_bytes_per_page']:.1f} bytes of records per page",
            flush=True,
        )
    return rows


def as_markdown(header: list[str], cases: list[Case], growth: list[dict[str, float]]) -> str:
    lines = [f"- {line}" for line in header]
    lines += [
        "",
        "| case | kernel, s | ksmcore, s | ratio | processor, s: kernel / ksmcore | limit, s | "
        "asked for | found: kernel / ksmcore |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in cases:
        medians = [
            f"{statistics.median(side.seconds):.4f}" if side.seconds else "-"
            for side in (case.kernel, case.ours)
        ]
        times = [*medians, ratio_of(case), cpu_of(case), limit_of(case)]
        cells = [f"{case.name}: {case.what}", *times, case.goal, found_by(case)]
        lines.append("| " + " | ".join(cells) + " |")
    if growth:
        lines += ["", "| memory in all, MiB | us per page | bytes of records per page |"]
        lines += ["|---|---|---|"]
    for row in growth:
        lines.append(
            f"| {row['mib']} | {row['us_per_page']:.2f} | {row['metadata_bytes_per_page']:.1f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
