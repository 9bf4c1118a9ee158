"""Defensive copies of tables: every function of a pipeline copies its frame before it changes a
column, and every frame is kept.

That is good style, and costs the whole table each time. Under `ksmcore.allocator()` the arrays of
all frames are page-aligned memory that ksmcore knows; what the copies have in common is found and
kept once. No line of the pipeline knows of it.

    python examples/pandas_copies.py [--size small|full]
"""

from __future__ import annotations

import sys

import numpy as np
import pandas as pd
from common import SEED, check, mib, pss, run, say, say_saved, timed

import ksmcore

N_SENSORS = 12


def measured(n_rows: int) -> pd.DataFrame:
    """Readings of a plant: a time, a place, sensors that drift, and alarms that are mostly off."""
    rng = np.random.default_rng(SEED)
    columns: dict[str, object] = {
        "time": np.arange(n_rows).astype("datetime64[s]"),
        "machine": rng.integers(0, 40, n_rows, dtype=np.int32),
        "batch": np.repeat(np.arange(n_rows // 1000 + 1), 1000)[:n_rows],
    }
    for i in range(N_SENSORS):
        columns[f"sensor_{i}"] = rng.normal(0, 0.02, n_rows).cumsum() + 20 + i
    for i in range(3):
        columns[f"alarm_{i}"] = np.zeros(n_rows)
    return pd.DataFrame(columns)


# ---- the pipeline: nobody changes what it was given ----------------------------------------------


def without_spikes(given: pd.DataFrame, sensor: str) -> pd.DataFrame:
    frame = given.copy(deep=True)
    frame[sensor] = frame[sensor].clip(frame[sensor].quantile(0.01), frame[sensor].quantile(0.99))
    return frame


def smoothed(given: pd.DataFrame, sensor: str) -> pd.DataFrame:
    frame = given.copy(deep=True)
    frame[sensor] = frame[sensor].rolling(5, min_periods=1).mean()
    return frame


def alarmed(given: pd.DataFrame, alarm: str, sensor: str) -> pd.DataFrame:
    frame = given.copy(deep=True)
    frame[alarm] = (frame[sensor] > frame[sensor].mean() + 2 * frame[sensor].std()).astype(float)
    return frame


def normalised(given: pd.DataFrame, sensor: str) -> pd.DataFrame:
    frame = given.copy(deep=True)
    frame[sensor] = (frame[sensor] - frame[sensor].mean()) / frame[sensor].std()
    return frame


def all_stages(first: pd.DataFrame) -> list[pd.DataFrame]:
    """Every intermediate result, kept for the report at the end of the day."""
    frames = [first]
    for i in range(4):
        frames.append(without_spikes(frames[-1], f"sensor_{i}"))
        frames.append(smoothed(frames[-1], f"sensor_{i}"))
    for i in range(3):
        frames.append(alarmed(frames[-1], f"alarm_{i}", f"sensor_{i + 4}"))
    for i in range(4):
        frames.append(normalised(frames[-1], f"sensor_{i + 4}"))
    return frames


# ---- what became of it ---------------------------------------------------------------------------


def n_bytes_of(frames: list[pd.DataFrame]) -> int:
    return sum(int(frame.memory_usage(index=False).sum()) for frame in frames)


def fingerprint(frame: pd.DataFrame) -> list[int]:
    """One number for each column, of all its values."""
    return [int(pd.util.hash_pandas_object(frame[name], index=False).sum()) for name in frame]


def counter_examples(n_rows: int) -> None:
    """Only counted, not merged."""
    with ksmcore.allocator():
        rng = np.random.default_rng(SEED)
        rows = pd.DataFrame({f"x{i}": rng.random(n_rows) for i in range(4)})
        before = ksmcore.estimate().bytes_saved
        kept = [rows.sort_values(f"x{i}", ignore_index=True) for i in range(4)]
        more = ksmcore.estimate().bytes_saved - before
    text = f"{mib(max(more, 0))} of {mib(n_bytes_of(kept))} could be saved"
    say("Not so", f"the same rows sorted in four ways: {text}")
    names = pd.DataFrame({"name": pd.Series(["pump", "valve"] * (n_rows // 2), dtype=object)})
    text = f"{mib(n_bytes_of([names]))} of references"
    say("Not so", f"columns of Python objects: {text}, of which no page may be shared")
    say("Not so", "pandas 3 shares unchanged columns by itself, unless a deep copy is asked for")


def example(full: bool) -> None:
    n_rows = 400_000 if full else 40_000
    with ksmcore.allocator(), timed("the pipeline"):
        frames = all_stages(measured(n_rows))
    n_bytes = n_bytes_of(frames)
    say("Frames", f"{len(frames)} of {n_rows:,} rows, {mib(n_bytes)}")

    wanted = [fingerprint(frame) for frame in frames]
    before = pss()
    with timed("merging"):
        report = ksmcore.dedup()
    say("Merged", f"{report.pages_merged:,} pages, {report.pages_zeroed:,} of zeros given back")
    check([fingerprint(frame) for frame in frames] == wanted, "a value is not what it was")
    say("Check", "every column of every frame: the same values")
    say_saved(before, pss(), at_least=n_bytes // 3)

    frames[0]["sensor_0"] = 0.0
    frames[5].loc[10, "batch"] = -1
    check([fingerprint(frame) for frame in frames[6:]] == wanted[6:], "a write went astray")
    check(fingerprint(frames[1]) == wanted[1], "a write went astray")
    say("Go on", "two frames were changed: the others are what they were")
    counter_examples(n_rows)


if __name__ == "__main__":
    sys.exit(run(example, __doc__))
