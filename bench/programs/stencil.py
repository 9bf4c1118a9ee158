"""Heat on a grid, with temporaries of 18 MB: nothing to save."""

import numpy as np

N = 1500
grid = np.random.default_rng(0).random((N, N))
for _ in range(60):
    around = grid[:-2, 1:-1] + grid[2:, 1:-1] + grid[1:-1, :-2] + grid[1:-1, 2:]
    grid[1:-1, 1:-1] = 0.25 * around + 0.01 * np.sqrt(grid[1:-1, 1:-1])
    cooled = grid * 1.0001
    grid = cooled - cooled.mean() * 1e-5
print(float(grid.sum()))
