"""The limit of versus_kernel: limit.c, compiled and loaded, and what it is asked for in each case.

It does what no merging through a memory file can leave out, and nothing else, in one thread. "How
far from the limit" is how many times as long ksmcore takes.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Sequence

from bench import corpora
from bench.corpora import PAGE, Pages
from bench.measure import load_c

READ, WRITE, MAP, SCATTERED, REPEAT, ZERO = range(6)
BLOCK_PAGES = 256

# (kind, pages, and from which page of the file on)
Part = tuple[int, Pages, int]


class _Part(ctypes.Structure):
    _fields_ = (
        ("addr", ctypes.c_void_p),
        ("kind", ctypes.c_uint64),
        ("n_pages", ctypes.c_uint64),
        ("offset", ctypes.c_uint64),
    )


@functools.cache
def library() -> ctypes.CDLL | None:
    """None without a compiler."""
    return load_c("limit.c", "-O3")


class Limit:
    """One memory file, and what is written to it."""

    def __init__(self) -> None:
        self._fd = os.memfd_create("bench-limit", os.MFD_CLOEXEC)
        self._end = ctypes.c_uint64(0)

    def merge(self, parts: Sequence[Part]) -> None:
        loaded = library()
        assert loaded is not None
        given = (_Part * len(parts))(
            *(_Part(pages.ctypes.data, kind, len(pages), offset) for kind, pages, offset in parts)
        )
        refused = loaded.limit_merge(
            given,
            ctypes.c_uint64(len(parts)),
            self._fd,
            ctypes.c_uint64(PAGE),
            ctypes.c_uint64(BLOCK_PAGES),
            ctypes.byref(self._end),
        )
        if refused:
            raise SystemExit("the kernel refuses what the limit is measured by")

    def close(self) -> None:
        os.close(self._fd)


# ---- what is asked for: before, and meanwhile ---------------------------------------------------


def worst(arrays: Sequence[Pages]) -> tuple[list[Part], list[Part]]:
    first, second = arrays
    return [], [(WRITE, first, 0), (MAP, second, 0)]


def join(arrays: Sequence[Pages]) -> tuple[list[Part], list[Part]]:
    _, merged = worst(arrays[:2])
    return merged, [(MAP, pages, 0) for pages in arrays[2:]]


def best(arrays: Sequence[Pages]) -> tuple[list[Part], list[Part]]:
    first, second = arrays
    return [], [
        (WRITE, first[:BLOCK_PAGES], 0),
        (REPEAT, first[BLOCK_PAGES:], 0),
        (REPEAT, second, 0),
    ]


def mixture(arrays: Sequence[Pages]) -> tuple[list[Part], list[Part]]:
    (pages,) = arrays
    census = corpora.mixture_census(len(pages))
    parts: list[Part] = []
    start = 0

    def add(kind: int, n_pages: int, offset: int = 0) -> None:
        nonlocal start
        parts.append((kind, pages[start : start + n_pages], offset))
        start += n_pages

    add(READ, census.n_unique)
    add(WRITE, census.n_paired // 2)
    add(MAP, census.n_paired // 2)
    add(WRITE, census.n_shuffled // 2)
    add(SCATTERED, census.n_shuffled // 2, census.n_paired // 2)
    add(ZERO, census.n_zero)
    return [], parts
