"""Decompositions, transforms and sorts of middling size: nothing to save."""

import numpy as np

rng = np.random.default_rng(0)
total = 0.0
for _ in range(100):
    matrix = rng.random((300, 300))
    q, r = np.linalg.qr(matrix)
    total += float((q @ r)[0, 0]) + float(np.linalg.inv(matrix + np.eye(300) * 300)[0, 0])
    spectrum = np.fft.fft2(rng.random((512, 512)))
    total += float(np.abs(np.fft.ifft2(spectrum * np.conj(spectrum))).sum()) * 1e-9
    values = rng.random(200_000)
    total += float(np.sort(values)[1000]) + float(np.unique((values * 1000).astype(int)).size)
print(f"{total:.6f}")
