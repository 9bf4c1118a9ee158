"""One file read four times with pyarrow, by parts of a program that each add to their own."""

import sys

import numpy as np

try:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq
except ImportError:
    sys.exit(77)

N = 1_000_000
rng = np.random.default_rng(0)
columns = {"id": rng.permutation(N), "day": rng.integers(0, 3650, N).astype("datetime64[D]")}
columns |= {f"x{i}": rng.standard_normal(N) for i in range(4)}
columns["name"] = np.char.add("customer-", rng.integers(0, 50_000, N).astype(str)).tolist()
sink = pa.BufferOutputStream()
pq.write_table(pa.table(columns), sink)
del columns
tables = []
for i in range(4):
    table = pq.read_table(pa.BufferReader(sink.getvalue()))
    tables.append(table.append_column("mine", pc.multiply(table["x0"], float(i))))
del table
total = 0.0
for step in range(12):
    for table in tables:
        grouped = table.group_by("name").aggregate([("x1", "mean"), ("mine", "max")])
        total += pc.sum(grouped["x1_mean"]).as_py() + pc.sum(grouped["mine_max"]).as_py()
        total += table.filter(pc.greater(table["x2"], 1.0 + step / 12)).num_rows
print(f"{total:.5f}")
