"""What the default limit of memory mappings leaves to be saved, where equal pages lie scattered.

    python -m bench.map_budget [--cases constant,replay] [--how dedup,scan]

Prints for each case how much could be saved, with any number of mappings and with this one (a
bound, see map_oracle), how much is, with how many mappings, and how long it took: after `dedup`, or
once passes find nothing more to merge.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np

import ksmcore
from bench.corpora import PAGE, SEED, Pages, fill_random
from bench.map_oracle import at_most

MIB = 1 << 20


def frames(n_frames: int) -> Pages:
    """So many different frames, of one page each."""
    made = np.empty((n_frames, PAGE), np.uint8)
    fill_random(made)
    return made


def constant(engine: ksmcore.Engine) -> list[object]:
    """Six copies of a table, each column of which has one value: 390 equal pages a column."""
    table = np.repeat(np.arange(1.0, 161.0), 200_000)
    return [engine.array(table) for _ in range(6)]


def random(engine: ksmcore.Engine) -> list[object]:
    """The same, but the columns are random numbers."""
    table = np.random.Generator(np.random.SFC64(SEED)).standard_normal(160 * 200_000)
    return [engine.array(table) for _ in range(6)]


def replay(engine: ksmcore.Engine) -> list[object]:
    """Frames before and after each step, a third of them seen before at a time of no rule."""
    n_steps = 70_000
    rng = np.random.Generator(np.random.SFC64(SEED + 1))
    order = np.arange(n_steps + 1)
    again = rng.random(n_steps + 1) < 1 / 3
    again[0] = False
    order[again] = (rng.random(again.sum()) * np.flatnonzero(again)).astype(np.int64)
    for i in np.flatnonzero(again):
        order[i] = order[order[i]]
    seen = frames(n_steps + 1)[order]
    return [engine.array(seen[:-1]), engine.array(seen[1:])]


def stacked(engine: ksmcore.Engine) -> list[object]:
    """The last four frames before and after each step, as stable-baselines3 keeps them: each frame
    eight times."""
    n_steps = 18_600
    seen = frames(n_steps + 4)
    stacks = np.lib.stride_tricks.sliding_window_view(seen, 4, axis=0).transpose(0, 2, 1)
    return [engine.array(stacks[:n_steps]), engine.array(stacks[1 : n_steps + 1])]


def scattered(engine: ksmcore.Engine) -> list[object]:
    """Two copies of the same pages, the second one in another order."""
    pages = frames(40_000)
    order = np.random.Generator(np.random.SFC64(SEED + 1)).permutation(len(pages))
    return [engine.array(pages), engine.array(pages[order])]


CASES: dict[str, Callable[[ksmcore.Engine], list[object]]] = {
    function.__name__: function for function in (constant, random, replay, stacked, scattered)
}


def contents(arrays: list[object]) -> list[int]:
    """A number for each page, the same for equal ones; between two arrays one that equals none."""
    found = []
    for n, array in enumerate(arrays):
        view = memoryview(array).cast("B")  # type: ignore[arg-type]
        found += [hash(bytes(view[at : at + PAGE])) for at in range(0, view.nbytes, PAGE)]
        found.append(n)
    return found


def scan(engine: ksmcore.Engine) -> None:
    """Passes, as the scanner makes them, until three in turn have merged nothing."""
    n_idle = 0
    while n_idle < 3:
        n_idle = n_idle + 1 if engine.scan().pages_merged == 0 else 0


HOW: dict[str, Callable[[ksmcore.Engine], object]] = {"dedup": lambda e: e.dedup(), "scan": scan}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--how", default=",".join(HOW))
    args = parser.parse_args()
    print(
        f"{'case':<10}{'how':<7}{'could save':>12}{'at most':>12}{'saved':>12}{'':>6}"
        f"{'mappings':>18}{'time':>9}"
    )
    for case in args.cases.split(","):
        for how in args.how.split(","):
            with ksmcore.Engine() as engine:
                kept = CASES[case](engine)
                could = engine.estimate().bytes_saved
                began = time.perf_counter()
                HOW[how](engine)
                seconds = time.perf_counter() - began
                stats = engine.stats()
                bound = min(could, at_most(contents(kept), stats.maps_allowed) * PAGE)
                print(
                    f"{case:<10}{how:<7}{could / MIB:>8.0f} MiB{bound / MIB:>8.0f} MiB"
                    f"{stats.bytes_saved / MIB:>8.0f} MiB{stats.bytes_saved / bound:>6.0%}"
                    f"{stats.maps_used:>9,} of{stats.maps_allowed:>6,}{seconds:>7.2f} s",
                    flush=True,
                )
                del kept


if __name__ == "__main__":
    main()
