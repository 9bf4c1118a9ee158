"""Bootstrap over tables that share most of their columns, each kept as an array of its own."""

import numpy as np

rng = np.random.default_rng(0)
columns = [rng.standard_normal(262_144) for _ in range(16)]
tables = []
for i in range(10):
    chosen = [column.copy() for column in columns]
    chosen[i] = chosen[i][rng.permutation(chosen[i].size)]
    tables.append(chosen)
total = 0.0
for _ in range(300):
    total += sum(float(np.dot(table[0], table[k])) for table in tables for k in range(16))
print(f"{total:.3f}")
