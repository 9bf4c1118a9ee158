"""Variants of one set of weights, each of which changes a little of it, kept and evaluated."""

import copy

import numpy as np

rng = np.random.default_rng(0)
weights = [rng.standard_normal((512, 1024)) for _ in range(6)]
variants = []
for i in range(12):
    variant = copy.deepcopy(weights)
    variant[i % 6][: 512 // 16] += 0.01
    variants.append(variant)
x = rng.standard_normal(1024)
total = 0.0
for _ in range(300):
    for variant in variants:
        total += float(sum(np.abs(layer @ x).sum() for layer in variant))
print(f"{total:.3f}")
