"""Savings over time: the points to draw, ticks with units, and a chart as inline SVG.

Needs nothing but the samples.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from ksmcore._engine.page_state import PageState
from ksmcore._kernel.syscalls import page_bytes
from ksmcore._show.page_maps import LOOKS
from ksmcore.sizes import human_bytes

if TYPE_CHECKING:
    from ksmcore._engine.engine import Engine
    from ksmcore._engine.history import Sample

__all__ = [
    "SAVED_COLOUR",
    "USED_COLOUR",
    "Point",
    "byte_ticks",
    "history_points",
    "savings_points",
    "savings_svg",
    "time_ticks",
]

USED_COLOUR = LOOKS[PageState.UNIQUE].colour
SAVED_COLOUR = LOOKS[PageState.SHARED].colour

# Columns of a chart that can be told apart: of more points the outermost of each are drawn.
MOST_COLUMNS = 400

# As clocks have it; whole numbers of milliseconds only below a second.
KINDS_OF_TIME = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"), (0.001, "ms"))
TIME_STEPS = (
    *(digit * 10.0**power for power in range(-4, 1) for digit in (1, 2, 5)),
    *(10, 15, 30, 60, 120, 300, 600, 900, 1800),
    *(3600 * hours for hours in (1, 2, 4, 6, 12)),
    *(86400 * digit * 10**power for power in range(5) for digit in (1, 2, 5)),
)


class Point(NamedTuple):
    """What the pages with a record took at one moment, and what they would have taken beyond."""

    seconds: float
    used_bytes: int
    saved_bytes: int


def savings_points(engine: Engine) -> list[Point]:
    """The engine's history and this moment, as `history_points`. Empty before the first pass."""
    samples = list(engine.history)
    if samples:
        samples.append(engine._sample())
    return history_points(samples)


def history_points(samples: Sequence[Sample]) -> list[Point]:
    """Samples, few enough to draw: of each column the first point, the last, and those with the
    least and the most saved."""
    page = page_bytes()
    points = [Point(s.seconds, s.pages_used * page, s.pages_saved * page) for s in samples]
    if len(points) <= MOST_COLUMNS:
        return points
    columns: dict[int, list[Point]] = {}
    for point in points:
        column = int(point.seconds / points[-1].seconds * (MOST_COLUMNS - 1))
        columns.setdefault(column, []).append(point)
    kept: list[Point] = []
    for within in columns.values():
        by_saved = sorted(within, key=lambda point: point.saved_bytes)
        kept += sorted({within[0], by_saved[0], by_saved[-1], within[-1]})
    return kept


# ---- ticks --------------------------------------------------------------------------------------


def byte_ticks(most: float, n_ticks: int = 4) -> list[tuple[float, str]]:
    """(bytes, text) from 0 on: round numbers of one unit, about so many of them up to `most`."""
    names = ("B", "KiB", "MiB", "GiB", "TiB")
    power_of_unit = next((n for n in range(len(names)) if most < 1024 ** (n + 1)), len(names) - 1)
    unit, name = 1024**power_of_unit, names[power_of_unit]
    power = 1
    while True:
        for digit in (1, 2, 5):
            step = digit * power
            if most / unit <= step * n_ticks:
                return [
                    (n * step * unit, f"{n * step:,} {name}" if n else "0")
                    for n in range(int(most / unit / step) + 1)
                ]
        power *= 10


def time_ticks(most_seconds: float, n_ticks: int = 5) -> list[tuple[float, str]]:
    """(seconds, text) from 0 on: times that clocks show, at most so many beyond 0."""
    step = next((step for step in TIME_STEPS if most_seconds <= step * n_ticks), TIME_STEPS[-1])
    least = min(step, 1) if most_seconds < 1 else max(step, 1)
    unit, name = next((kind for kind in KINDS_OF_TIME if least >= kind[0]), KINDS_OF_TIME[-1])
    return [
        (n * step, f"{n * step / unit:g} {name}" if n else "0")
        for n in range(int(most_seconds / step) + 1)
    ]


# ---- the chart ----------------------------------------------------------------------------------


def savings_svg(points: Sequence[Point]) -> str:
    """The chart as an SVG element: memory in use, and what is saved stacked upon it.

    Its areas take the width that there is, while text keeps its size; the labels of the axes stand
    outside of the element, and need 5 em at the left, 1 at the right, and 3 below.
    """
    end = max(points[-1].seconds, 1e-4)
    most = max(max(point.used_bytes + point.saved_bytes for point in points), 1)
    ticks = byte_ticks(most)
    top = most * 1.04
    last = points[-1]
    text = (
        f"{human_bytes(last.saved_bytes)} saved and {human_bytes(last.used_bytes)} in use at the "
        f"end, after {_duration(last.seconds)}; at most "
        f"{human_bytes(max(point.saved_bytes for point in points))} saved."
    )
    parts = [
        '<svg class="ksm-chart" role="img" width="100%" height="15em" style="overflow:visible;'
        'display:block" font-size="12" fill="currentColor">',
        f"<title>Memory of registered pages over time</title><desc>{html.escape(text)}</desc>",
    ]
    for value, label in ticks:
        y = f"{100 - value / top * 100:.2f}%"
        parts.append(
            f'<line x1="0" x2="100%" y1="{y}" y2="{y}" stroke="currentColor" '
            f'stroke-opacity="{0.6 if value == 0 else 0.15}"/>'
            f'<text x="0" y="{y}" dx="-8" dy="4" text-anchor="end">{label}</text>'
        )
    for seconds, label in time_ticks(end):
        x = f"{seconds / end * 100:.2f}%"
        parts.append(
            f'<svg x="{x}" y="100%" overflow="visible"><line y2="5" stroke="currentColor" '
            f'stroke-opacity="0.6"/><text y="20" text-anchor="middle">{label}</text></svg>'
        )
    used = [(point.seconds / end, point.used_bytes / top) for point in points]
    both = [(point.seconds / end, (point.used_bytes + point.saved_bytes) / top) for point in points]
    ground = [(used[-1][0], 0.0), (used[0][0], 0.0)]
    parts.append(
        '<svg width="100%" height="100%" viewBox="0 0 1000 1000" preserveAspectRatio="none">'
        f"{_polygon(used + ground, USED_COLOUR)}{_polygon(both + used[::-1], SAVED_COLOUR)}</svg>"
    )
    if used[-1][0] - used[0][0] < 0.005:
        # One moment has no area.
        x, low, high = (
            f"{100 * part:.2f}%" for part in (used[-1][0], 1 - used[-1][1], 1 - both[-1][1])
        )
        for y1, y2, colour in (("100%", low, USED_COLOUR), (low, high, SAVED_COLOUR)):
            parts.append(
                f'<line x1="{x}" x2="{x}" y1="{y1}" y2="{y2}" stroke="{colour}" stroke-width="8"/>'
            )
    parts.append(
        '<svg x="50%" y="100%" overflow="visible"><text y="38" text-anchor="middle" '
        'opacity="0.75">time since the engine was made</text></svg></svg>'
    )
    return "".join(parts)


def _polygon(corners: Sequence[tuple[float, float]], colour: str) -> str:
    listed = " ".join(f"{x * 1000:.1f},{1000 - y * 1000:.1f}" for x, y in corners)
    return f'<polygon points="{listed}" fill="{colour}"/>'


def _duration(seconds: float) -> str:
    unit, name = next((kind for kind in KINDS_OF_TIME if seconds >= kind[0]), KINDS_OF_TIME[-1])
    return f"{seconds / unit:.1f} {name}"
