"""What a page of a region is."""

from __future__ import annotations

import enum

__all__ = ["PageState"]


class PageState(enum.IntEnum):
    """What a page of a region is (see `Region.page_map`)."""

    NOT_PRESENT = 0
    """Never touched, given up, or swapped out."""
    VOLATILE = 1
    """Changed since the last pass, or not seen often enough to tell."""
    UNIQUE = 2
    """Did not change, and equals no other."""
    SHARED = 3
    """Maps a shared page."""
    ZERO = 4
    """Was all zero and given back."""
    BROKEN = 5
    """Was shared or zero, and has been written since; the next pass will notice."""
