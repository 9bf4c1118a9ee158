"""Phase: where within a page a buffer begins, and the warning when that keeps pages apart.

Called by the engine before it registers buffers.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ksmcore._gate.buffers import Admission

__all__ = ["PhaseWarning", "phase_advice", "warn_of_phase"]

# Buffers of fewer pages are not worth a warning.
LEAST_PAGES = 16


class PhaseWarning(UserWarning):
    """Two buffers of one size begin at different offsets within a page, so cannot share pages."""


def phase_advice(len_bytes: int, phase: int, other_phase: int) -> str:
    """Text of a `PhaseWarning` for a new buffer of `len_bytes` bytes.

    `phase` and `other_phase` are the offsets in bytes within a page at which the new buffer and a
    registered one of the same size begin.
    """
    return (
        f"this buffer of {len_bytes:,} bytes begins {phase} bytes into a page, a registered buffer "
        f"of the same size {other_phase} bytes. Equal arrays share pages only if they begin at the "
        "same offset; so these two will share next to nothing. Page-aligned arrays always match: "
        "make them with ksmcore.empty, zeros, full or array, or under ksmcore.allocator(); copy "
        "what exists with ksmcore.array. "
        "For frames and records ksmcore.rows(n, row_shape, dtype) begins every row on a page."
    )


def warn_of_phase(new: Sequence[Admission], registered: Sequence[Admission]) -> None:
    """Warn for each new buffer when one of its size, registered or new, has another phase."""
    others = list(registered)
    for buffer in new:
        for other in others:
            if (
                buffer.n_pages >= LEAST_PAGES
                and other.len_bytes == buffer.len_bytes
                and other.phase != buffer.phase
            ):
                text = phase_advice(buffer.len_bytes, buffer.phase, other.phase)
                warnings.warn(text, PhaseWarning, stacklevel=_callers_level())
                break
        others.append(buffer)


def _callers_level() -> int:
    """The stacklevel, for a warning given by the caller of this, of the first frame outside."""
    level = 1
    frame = sys._getframe(1)
    while frame.f_back is not None and (
        frame.f_globals.get("__name__", "").partition(".")[0] == "ksmcore"
    ):
        frame = frame.f_back
        level += 1
    return level
