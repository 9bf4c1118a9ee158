"""Who has called ksmcore."""

from __future__ import annotations

import sys
from types import FrameType

__all__ = ["caller"]


def caller() -> tuple[FrameType, int]:
    """The innermost frame outside of ksmcore (or the outermost one, if all are inside), and the
    stacklevel with which a warning that is given by the caller of this names it."""
    level = 1
    frame = sys._getframe(1)
    while frame.f_back is not None and (
        str(frame.f_globals.get("__name__")).partition(".")[0] == "ksmcore"
    ):
        frame = frame.f_back
        level += 1
    return frame, level
