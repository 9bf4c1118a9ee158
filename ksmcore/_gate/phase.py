"""Phase: where within a page a buffer begins, and the warning when that keeps pages apart."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

from ksmcore._gate.caller import caller

if TYPE_CHECKING:
    from ksmcore._gate.buffers import Export

__all__ = ["PhaseWarning", "Phases", "phase_advice"]

# Buffers of fewer pages are not worth a warning.
LEAST_PAGES = 16


class PhaseWarning(UserWarning):
    """Two buffers of one size begin at different offsets within a page, so cannot share pages."""


# Of memory that comes from the C library, and is not NumPy's.
_FROM_MALLOC = (
    "put where the C library has room. With MALLOC_MMAP_THRESHOLD_=65536 in the environment in "
    "which the program is started, all large ones begin at one offset"
)
# What helps, by whose memory it is.
_ADVICE = {
    "": "Page-aligned arrays always match: make them with ksmcore.empty, zeros, full or array, or "
    "under ksmcore.allocator(); copy what exists with ksmcore.array. "
    "For frames and records ksmcore.rows(n, row_shape, dtype) begins every row on a page.",
    "torch": f"Tensors are {_FROM_MALLOC}. Or make them of page-aligned memory: "
    "torch.from_numpy(ksmcore.empty(shape, dtype)), and ksmcore.array for a copy of what exists.",
    "jax": f"JAX's arrays are {_FROM_MALLOC}.",
    "pyarrow": "pyarrow's own pools put buffers anywhere. With the one of the system "
    "(ARROW_DEFAULT_MEMORY_POOL=system in the environment in which the program is started, or "
    f"pyarrow.set_memory_pool(pyarrow.system_memory_pool())) they are {_FROM_MALLOC}.",
    "polars": "polars has an allocator of its own, which puts buffers anywhere.",
}


def phase_advice(len_bytes: int, phase: int, other_phase: int, library: str = "") -> str:
    """Text of a `PhaseWarning` for a new buffer of `len_bytes` bytes, of one of a library's.

    `phase` and `other_phase` are the offsets in bytes within a page at which the new buffer and a
    registered one of the same size begin.
    """
    return (
        f"this buffer of {len_bytes:,} bytes begins {phase} bytes into a page, a registered buffer "
        f"of the same size {other_phase} bytes. Equal arrays share pages only if they begin at the "
        "same offset; so these two will share next to nothing. "
    ) + _ADVICE.get(library, _ADVICE[""])


class Phases:
    """The phases of the buffers that are registered, by their length. Callers see to it that one
    thread at a time uses it."""

    def __init__(self) -> None:
        self._counts: dict[int, Counter[int]] = {}
        self._told: set[int] = set()

    def add(self, buffer: Export) -> None:
        if buffer.n_pages >= LEAST_PAGES:
            self._counts.setdefault(buffer.len_bytes, Counter())[buffer.phase] += 1

    def remove(self, buffer: Export) -> None:
        counts = self._counts.get(buffer.len_bytes)
        if counts is not None and counts[buffer.phase] > 0:
            counts[buffer.phase] -= 1

    def warn(self, new: Iterable[Export]) -> None:
        """Warn when one of these buffers has another phase than one of its length, registered or
        new: once in a call, and once for each length."""
        first: dict[int, int] = {}
        for buffer in new:
            if buffer.n_pages < LEAST_PAGES or buffer.len_bytes in self._told:
                continue
            others = {phase for phase, n in self._counts.get(buffer.len_bytes, {}).items() if n > 0}
            others.add(first.setdefault(buffer.len_bytes, buffer.phase))
            others.discard(buffer.phase)
            if others:
                text = phase_advice(buffer.len_bytes, buffer.phase, min(others), buffer.library)
                warnings.warn(text, PhaseWarning, stacklevel=caller()[1])
                self._told.add(buffer.len_bytes)  # not where the warning is an error
                return
