"""Whole programs as they are, plain and under `ksmcore run`, in turns.

    python -m bench.whole_programs [--rounds 5] [--programs stencil,joins] [--sides run,disabled]

Prints for each program of bench/programs, which know nothing of ksmcore, and for each side the
median processor time (of user and kernel), wall time and page faults, with the ratios to the plain
program, and what was saved at most. The starts of the interpreter and of ksmcore are part of it.
Whoever needs a library that is missing is left out, and named. The outputs must be the same. BLAS
and OpenMP have one thread: theirs spin while they wait, on a busy machine most of the time. What
Python compiles it keeps, as wherever pip has installed it; run it twice where nothing is kept yet.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

PROGRAMS = Path(__file__).parent / "programs"
# What goes before the program's name, and what is added to the environment.
SIDES: dict[str, tuple[list[str], dict[str, str]]] = {
    "plain": ([], {}),
    "run": (["-m", "ksmcore", "run", "--memory", "numpy"], {}),
    "all": (["-m", "ksmcore", "run", "--memory", "all"], {}),
    "disabled": (["-m", "ksmcore", "run"], {"KSMCORE_DISABLE": "1"}),
}
ENVIRON = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
DONT_KEEP = "PYTHONDONTWRITEBYTECODE"
# Status of a program that lacks a library.
LACKING = 77


@dataclass
class Figures:
    """Of one program on one side, an entry for each round."""

    cpu_seconds: list[float] = field(default_factory=list)
    wall_seconds: list[float] = field(default_factory=list)
    faults: list[int] = field(default_factory=list)
    saved_bytes: list[int] = field(default_factory=list)
    outputs: set[bytes] = field(default_factory=set)


def run_once(program: Path, side: str, into: Figures) -> bool:
    """False where a library is missing."""
    before, environ = SIDES[side]
    own = {name: value for name, value in os.environ.items() if name != DONT_KEEP}
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory, "report.json")
        is_asked = before and "KSMCORE_DISABLE" not in environ  # whose numbers nobody wants
        asked = [*before, "--json", str(report)] if is_asked else before
        began = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *asked, str(program)],
            env={**own, **ENVIRON, **environ},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert process.stdout is not None
        output = process.stdout.read()
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode == LACKING:
            return False
        if process.returncode != 0:
            sys.exit(f"{program.stem} ended with status {process.returncode} ({side})")
        saved = json.loads(report.read_text())["peak_bytes_saved"] if report.exists() else 0
    into.cpu_seconds.append(used.ru_utime + used.ru_stime)
    into.wall_seconds.append(seconds)
    into.faults.append(used.ru_minflt)
    into.saved_bytes.append(saved)
    into.outputs.add(output)
    return True


def show(name: str, figures: dict[str, Figures]) -> None:
    plain = figures["plain"]
    for side, found in figures.items():
        cpu, wall = statistics.median(found.cpu_seconds), statistics.median(found.wall_seconds)
        cpu_ratio = cpu / statistics.median(plain.cpu_seconds)
        wall_ratio = wall / statistics.median(plain.wall_seconds)
        print(
            f"{name:<14}{side:<10}{cpu:7.2f} s {cpu_ratio:5.2f}x {wall:7.2f} s {wall_ratio:5.2f}x "
            f"{statistics.median(found.faults):>10,.0f} "
            f"{statistics.median(found.saved_bytes) / 2**20:7.0f} MiB",
            flush=True,
        )
        name = ""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.whole_programs", description=__doc__)
    names = sorted(path.stem for path in PROGRAMS.glob("*.py"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--programs", default=",".join(names), help="names, with commas between")
    parser.add_argument("--sides", default="run,all,disabled", help="beside the plain program")
    given = parser.parse_args()
    programs, sides = given.programs.split(","), ["plain", *given.sides.split(",")]
    if set(programs) - set(names) or set(sides) - set(SIDES) or given.rounds < 1:
        parser.error(f"programs are {', '.join(names)}; sides {', '.join(SIDES)}")
    print(f"{'program':<14}{'side':<10}{'processor':>16} {'wall':>16} {'faults':>10} {'saved':>11}")
    for name in programs:
        figures = {side: Figures() for side in sides}
        is_there = all(
            run_once(PROGRAMS / f"{name}.py", side, found)
            for _ in range(given.rounds)
            for side, found in figures.items()
        )
        if not is_there:
            print(f"{name:<14}left out: a library that it needs is missing")
            continue
        if len(set.union(*(found.outputs for found in figures.values()))) != 1:
            sys.exit(f"{name}: the outputs differ")
        show(name, figures)


if __name__ == "__main__":
    main()
