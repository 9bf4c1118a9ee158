"""Numbers, of bytes and of other things, as people write and read them. Calls nothing."""

from __future__ import annotations

import re

__all__ = ["counted", "human_bytes", "parse_bytes"]

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


def parse_bytes(size: int | str) -> int:
    """A number of bytes: 4096, "64k" and "64 KiB" (of 1,024), "50 MB" (of millions), "1.5 GiB".

    Raises:
        ValueError: anything else.
    """
    if isinstance(size, int) and not isinstance(size, bool) and size >= 0:
        return size
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(size).lower())
    if not isinstance(size, str) or found is None or found[2] not in _UNITS:
        raise ValueError(
            f"a size is a number of bytes, or text like '50 MB' or '1.5 GiB', not {size!r}"
        )
    return int(float(found[1]) * _UNITS[found[2]])


def counted(count: int, what: str, plural: str = "s") -> str:
    """A count and what of: '1 page', '2,000 pages'."""
    return f"{count:,} {what}{'' if count == 1 else plural}"
