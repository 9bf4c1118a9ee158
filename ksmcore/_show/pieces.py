"""Pieces of HTML: sizes, bars, legends, page maps, a chart, and a table of numbers.

Styles are inline, so that a piece stands alone; text has the colour of its surroundings, light or
dark. Whatever comes from outside is escaped. Nothing is loaded and nothing is run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from ksmcore._engine.counters import Stats
from ksmcore._engine.page_state import PageState
from ksmcore._engine.stats import MemoryInfo
from ksmcore._show.charts import SAVED_COLOUR, USED_COLOUR, Point, savings_svg
from ksmcore._show.page_maps import LOOKS, MIXED_NOTE, PageMap, png_uri, reduced
from ksmcore.sizes import counted, human_bytes

__all__ = [
    "ABSENT",
    "QUIET",
    "Part",
    "bar",
    "legend",
    "memory_parts",
    "page_map_figure",
    "savings_figure",
    "size",
    "state_parts",
    "stats_parts",
    "swatch",
    "table",
]

QUIET = "opacity:.75"
# What is not present: a faint grey on any background, as in the page maps.
ABSENT = "rgba(128,128,128,.22)"


class Part(NamedTuple):
    """A part of a bar, and its line in the legend."""

    label: str
    n_bytes: int
    colour: str
    meaning: str = ""
    n_pages: int | None = None

    @property
    def text(self) -> str:
        pages = "" if self.n_pages is None else f"{counted(self.n_pages, 'page')}, "
        return f"{self.label}: {pages}{self.n_bytes:,} bytes" + (
            self.meaning and f". {self.meaning}"
        )


def size(n_bytes: int) -> str:
    """A size for people, with the exact one in its title."""
    return (
        f'<span title="{n_bytes:,} bytes" style="white-space:nowrap">{human_bytes(n_bytes)}</span>'
    )


def state_parts(counts: Mapping[PageState, int], page_bytes: int) -> list[Part]:
    """Pages by state, in the order of legends."""
    return [
        Part(
            look.label,
            counts.get(state, 0) * page_bytes,
            ABSENT if state is PageState.NOT_PRESENT else look.colour,
            f"{look.meaning[0].upper()}{look.meaning[1:]}",
            counts.get(state, 0),
        )
        for state, look in LOOKS.items()
    ]


def stats_parts(stats: Stats) -> list[Part]:
    """The pages that an engine has records of, by state."""
    counts = {
        PageState.SHARED: stats.pages_shared + stats.pages_sharing,
        PageState.ZERO: stats.ksm_zero_pages,
        PageState.UNIQUE: stats.pages_unshared,
        PageState.VOLATILE: stats.pages_volatile,
    }
    return state_parts(counts, stats.page_bytes)


def memory_parts(info: MemoryInfo) -> list[Part]:
    """What the process takes, and what it would take beyond that."""
    return [
        Part(
            "in use (PSS)",
            info.pss,
            LOOKS[PageState.UNIQUE].colour,
            "Memory that this process takes",
        ),
        Part(
            "saved",
            max(info.saved, 0),
            LOOKS[PageState.SHARED].colour,
            "Memory that shared pages would take more if each had its own",
        ),
    ]


def bar(parts: Iterable[Part]) -> str:
    """One bar, divided; a part that is there at all can be seen."""
    present = [part for part in parts if part.n_bytes > 0] or [Part("nothing", 1, ABSENT)]
    said = "; ".join(part.text for part in parts if part.n_bytes > 0) or "nothing"
    pieces = "".join(
        f'<span title="{escape(part.text)}" style="flex:{part.n_bytes} 1 0;min-width:2px;'
        f'background:{part.colour};print-color-adjust:exact"></span>'
        for part in present
    )
    return (
        f'<div role="img" aria-label="{escape(said)}" style="display:flex;height:1.1em;gap:1px;'
        f'border-radius:3px;overflow:hidden;margin:.3em 0">{pieces}</div>'
    )


def legend(parts: Iterable[Part]) -> str:
    """What the colours are, with pages and sizes; only what there is."""
    items = "".join(
        f'<span title="{escape(part.text)}" style="white-space:nowrap">{swatch(part.colour)}'
        f"{escape(part.label)} "
        + ("" if part.n_pages is None else f"<b>{part.n_pages:,}</b> ")
        + f'<span style="{QUIET}">{human_bytes(part.n_bytes)}</span></span>'
        for part in parts
        if part.n_bytes > 0
    )
    return f'<div style="display:flex;flex-wrap:wrap;gap:.1em 1.2em">{items}</div>'


def swatch(colour: str) -> str:
    return (
        f'<span style="display:inline-block;width:.8em;height:.8em;margin-right:.4em;'
        f'border-radius:2px;background:{colour};print-color-adjust:exact"></span>'
    )


def page_map_figure(
    shown_map: PageMap, most_cells: int = 4096, most_columns: int = 128, width_px: int = 590
) -> str:
    """A page map as an image, with what one cell stands for."""
    cells = reduced(shown_map.states, most_cells)
    grid = cells.grid(most_columns)
    # Whole pixels for each cell, where there is room.
    cell_px = min(max(width_px // grid.shape[1], 1), 12)
    counts = ", ".join(
        f"{count:,} {LOOKS[state].label}" for state, count in shown_map.counts().items() if count
    )
    alt = f"Page map of {counted(len(shown_map.states), 'page')} in {len(grid):,} lines: {counts}"
    return (
        f'<img src="{png_uri(grid)}" alt="{escape(alt)}" width="{grid.shape[1]}" '
        f'height="{grid.shape[0]}" style="display:block;width:{grid.shape[1] * cell_px}px;'
        'max-width:100%;height:auto;image-rendering:pixelated;margin:.4em 0">'
        f'<div style="{QUIET};font-size:.9em" title="{MIXED_NOTE}">'
        f"{cells.caption(shown_map.page_bytes)}</div>"
    )


def savings_figure(points: Sequence[Point]) -> str:
    """Savings over time, with a legend; nothing when there are no points."""
    if not points:
        return ""
    keys = ((USED_COLOUR, "in use"), (SAVED_COLOUR, "saved by merging"))
    return (
        f'<div style="padding:.8em 1.5em 3.6em 5em">{savings_svg(points)}</div>'
        '<div style="display:flex;flex-wrap:wrap;gap:.1em 1.2em">'
        + "".join(f"<span>{swatch(colour)}{name}</span>" for colour, name in keys)
        + f'<span style="{QUIET}">memory of the registered pages that passes have met</span></div>'
    )


def table(rows: Mapping[str, Any], title: str) -> str:
    """Names and values, folded away."""
    lines = "".join(
        f'<tr><th scope="row" style="text-align:left;font-weight:normal;padding:0 1em 0 0">'
        f'{escape(name)}</th><td style="text-align:right">{escape(_said(value))}</td></tr>'
        for name, value in _flat(rows)
    )
    return (
        f'<details><summary style="cursor:pointer;{QUIET}">{escape(title)}</summary>'
        f'<table style="border-collapse:collapse">{lines}</table></details>'
    )


def _flat(rows: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    for name, value in rows.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}: {inner}", number) for inner, number in value.items())
        else:
            yield name, value


def _said(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.6g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
