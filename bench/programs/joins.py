"""Joins and group-bys of data frames: nothing to save."""

import sys

import numpy as np

try:
    import pandas as pd
except ImportError:
    sys.exit(77)

N = 300_000
rng = np.random.default_rng(0)
total = 0.0
for _ in range(40):
    left = pd.DataFrame({"k": rng.integers(0, 50_000, N), "x": rng.random(N), "y": rng.random(N)})
    right = pd.DataFrame({"k": np.arange(50_000), "z": rng.random(50_000)})
    joined = left.merge(right, on="k")
    means = joined.groupby("k")[["x", "y", "z"]].agg(["mean", "sum"])
    total += float(means.to_numpy().sum()) + float(joined.sort_values("x")["y"].iloc[1000])
print(f"{total:.6f}")
