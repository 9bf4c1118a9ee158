"""What the benchmarks merge: named sets of pages, the same in every run.

Called by the benchmarks. Pages are rows of bytes, written into memory that the caller brings.
"""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Pages = NDArray[np.uint8]

PAGE = mmap.PAGESIZE
SEED = 20090331


def n_pages_asked() -> int:
    """Pages of one copy: KSMCORE_BENCH_MIB mebibytes of them, 256 by default."""
    text = os.environ.get("KSMCORE_BENCH_MIB", "256")
    if not text.isdecimal() or not 8 <= int(text) <= 1 << 20:
        raise ValueError(f"KSMCORE_BENCH_MIB is a whole number of 8 or more, not {text!r}")
    return (int(text) << 20) // PAGE


def fill_random(pages: Pages, seed: int = SEED) -> None:
    """Pages of random bytes; none equals another."""
    source = np.random.Generator(np.random.SFC64(seed))
    words = pages.view(np.uint64)
    for start in range(0, len(words), 4096):
        some = words[start : start + 4096]
        some[...] = source.integers(0, 2**64, some.shape, np.uint64)


def fill_tails(pages: Pages, seed: int = SEED) -> None:
    """Pages that differ from each other only in their last 8 bytes: the original's worst case.

    Every comparison of two of them reads both to the end, and the tree is as deep as it can be.
    """
    one = np.random.Generator(np.random.SFC64(seed)).integers(0, 256, PAGE, np.uint8)
    pages[...] = one
    pages.view(np.uint64)[:, -1] = np.arange(1, len(pages) + 1)


def fill_repeated(pages: Pages, seed: int = SEED) -> None:
    """One random page, over and over: the best case."""
    pages[...] = np.random.Generator(np.random.SFC64(seed)).integers(0, 256, PAGE, np.uint8)


@dataclass(frozen=True)
class Census:
    """How many pages of each kind a mixture holds."""

    n_unique: int
    n_paired: int
    n_shuffled: int
    n_zero: int

    @property
    def n_spare(self) -> int:
        """Pages that could be given back: one of each pair, and all of zeros."""
        return self.n_paired // 2 + self.n_shuffled // 2 + self.n_zero


def mixture_census(n_pages: int) -> Census:
    """Of so many pages of a mixture; they lie in this order."""
    paired, shuffled, zero = n_pages * 15 // 100, n_pages * 5 // 100, n_pages // 10
    unique = n_pages - 2 * paired - 2 * shuffled - zero
    return Census(unique, 2 * paired, 2 * shuffled, zero)


def fill_mixture(pages: Pages, seed: int = SEED) -> Census:
    """Half unique; 30 % pairs, whose twins come in the same order; 10 % pairs, whose twins come in
    random order, each needing a mapping of its own; 10 % zero."""
    n = len(pages)
    census = mixture_census(n)
    paired, shuffled, zero = census.n_paired // 2, census.n_shuffled // 2, census.n_zero
    fill_random(pages[: n - zero], seed)
    start = census.n_unique
    pages[start + paired : start + 2 * paired] = pages[start : start + paired]
    start += 2 * paired
    order = np.random.Generator(np.random.SFC64(seed + 1)).permutation(shuffled)
    pages[start + shuffled : start + 2 * shuffled] = pages[start : start + shuffled][order]
    pages[n - zero :] = 0
    return census
