"""Memory to merge, and the bytes in it."""

from __future__ import annotations

import mmap

import numpy as np

PAGE = mmap.PAGESIZE
PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS


def private_memory(n_pages: int) -> mmap.mmap:
    """Plain private anonymous memory, n pages of zeros: what any engine takes."""
    return mmap.mmap(-1, n_pages * PAGE, flags=PRIVATE)


def random_pages(seed: int | np.random.Generator, n_pages: int) -> np.ndarray:
    """Pages without a zero page and without two equal ones; others for each seed, and each time
    from a generator."""
    return np.random.default_rng(seed).integers(1, 256, n_pages * PAGE, dtype=np.uint8)


def octets(buffer: object) -> np.ndarray:
    """The bytes of a buffer as an array on the same memory."""
    if isinstance(buffer, np.ndarray):
        return (buffer if buffer.flags.c_contiguous else buffer.T).reshape(-1).view(np.uint8)
    return np.frombuffer(buffer, np.uint8)


def fill(buffer: object, value: int = 0xA5) -> bytes:
    """Equal pages that are not zero; returns the bytes."""
    octets(buffer)[:] = value
    return bytes(octets(buffer))


def address(array: np.ndarray) -> int:
    """Where an array begins."""
    return array.__array_interface__["data"][0]


def extent(array: np.ndarray) -> tuple[int, int]:
    """The addresses [start, end) of an array."""
    return address(array), address(array) + array.nbytes
