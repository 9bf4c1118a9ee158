"""Numbers, of bytes and of other things, as people write and read them."""

from __future__ import annotations

import operator
import re
from typing import SupportsIndex

__all__ = ["THRESHOLD_BYTES", "counted", "human_bytes", "parse_bytes"]

THRESHOLD_BYTES = 64 * 1024
"""Smaller arrays are left to NumPy, if nobody says otherwise: every array of ours takes whole
pages, and a page is the least that is merged."""

_UNITS = {"": 1, "b": 1}
for _power, _prefix in enumerate("kmgt", start=1):
    _UNITS[f"{_prefix}b"] = 1000**_power
    _UNITS[_prefix] = _UNITS[f"{_prefix}ib"] = 1024**_power


def human_bytes(n_bytes: float) -> str:
    """A number of bytes as a person would say it: 1,536 -> '1.5 KiB'; the sign stays."""
    sign = "-" if n_bytes < 0 else ""
    size = abs(float(n_bytes))
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{sign}{size:.0f} {unit}" if unit == "B" else f"{sign}{size:.1f} {unit}"
        size /= 1024
    return f"{sign}{size:.1f} TiB"


def parse_bytes(size: SupportsIndex | float | str) -> int:
    """A number of bytes: 4096, 1e6, "64k" and "64 KiB" (of 1,024), "50 MB" (of millions).

    Raises:
        ValueError: anything else.
    """
    if isinstance(size, float) and size.is_integer():
        size = int(size)
    if isinstance(size, SupportsIndex) and not isinstance(size, bool) and operator.index(size) >= 0:
        return operator.index(size)
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(size).lower())
    if not isinstance(size, str) or found is None or found[2] not in _UNITS:
        raise ValueError(
            f"a size is a number of bytes, or text like '50 MB' or '1.5 GiB', not {size!r}"
        )
    return int(float(found[1]) * _UNITS[found[2]])


def counted(count: int, what: str, plural: str = "s") -> str:
    """A count and what of: '1 page', '2,000 pages'."""
    return f"{count:,} {what}{'' if count == 1 else plural}"
