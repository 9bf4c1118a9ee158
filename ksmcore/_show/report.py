"""The HTML report: one page about one engine, for people who were not there.

Everything is in the page itself: no scripts, nothing to load. It is put together from `pieces`; the
look is `report_style`.
"""

from __future__ import annotations

import os
import platform
import shlex
from collections.abc import Mapping, Sequence
from datetime import datetime
from html import escape
from importlib import metadata
from typing import TYPE_CHECKING, Any

import numpy as np

from ksmcore._engine.all_engines import process_memory_info
from ksmcore._engine.counters import COST, NOW, NUMBERS, SKIPPED, STAGES, WORK, Stats
from ksmcore._engine.features import features
from ksmcore._engine.page_state import PageState
from ksmcore._engine.stats import MemoryInfo
from ksmcore._kernel import procfs
from ksmcore._show.charts import savings_points
from ksmcore._show.page_maps import LOOKS, MIXED_NOTE, PageMap, engine_maps
from ksmcore._show.pieces import (
    ABSENT,
    bar,
    legend,
    memory_parts,
    page_map_figure,
    savings_figure,
    size,
    state_parts,
    stats_parts,
    swatch,
)
from ksmcore._show.report_style import STYLE
from ksmcore.sizes import counted, human_bytes

if TYPE_CHECKING:
    from ksmcore._engine.engine import Engine

__all__ = ["html_report"]

# Regions whose page maps are shown one by one.
MOST_REGIONS = 12

# Longer values may be broken into lines.
LONGEST_NUMBER = 24

RSS_NOTE = (
    "RSS counts a shared page once for every place that maps it, so merging does not lower it; PSS "
    "counts it once in all, which is what the process really takes and a container is charged for."
)
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def html_report(
    engine: Engine,
    *,
    title: str = "ksmcore",
    command: str | Sequence[str] | None = None,
    exit_status: int | None = None,
) -> str:
    """See `ksmcore.html_report`."""
    points = savings_points(engine)
    stats = engine.stats()
    peak = engine.peak_bytes_saved
    maps = [] if engine.closed else engine_maps(engine, MOST_REGIONS)
    sections = (
        ("Memory", _memory(stats, process_memory_info(), peak)),
        ("Savings over time", savings_figure(points) or "<p>No pass has ended yet.</p>"),
        ("Page maps", _page_maps(maps)),
        ("Left out", _left_out(stats)),
        ("Counters", _counters(stats)),
        ("Settings and environment", _around(stats, engine.settings.as_dict())),
    )
    body = "".join(
        f'<section aria-labelledby="s{number}"><h2 id="s{number}">{name}</h2>{text}</section>\n'
        for number, (name, text) in enumerate(sections)
    )
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f"<title>{escape(title)}: {human_bytes(stats.bytes_saved)} saved</title>\n"
        f"<style>{STYLE}</style></head>\n<body><main>\n"
        f"{_head(title, command, exit_status, stats.scanner_error)}\n{body}"
        f"<footer>ksmcore {metadata.version('ksmcore')} keeps memory pages with identical bytes "
        "once, copy-on-write, inside one process.</footer>\n</main></body></html>\n"
    )
    # An argument of the command may be a file's name, and that no text: it is written out.
    return page.encode(errors="backslashreplace").decode()


def _head(
    title: str,
    command: str | Sequence[str] | None,
    exit_status: int | None,
    scanner_error: str | None,
) -> str:
    facts = []
    if command is not None:
        said = command if isinstance(command, str) else shlex.join(command)
        facts.append(f"<code>{escape(said)}</code>")
    if exit_status is not None:
        kind = "good" if exit_status == 0 else "bad"
        facts.append(f'<span class="status {kind}">exit status {exit_status:d}</span>')
    now = datetime.now().astimezone()
    facts.append(f'<time datetime="{now.isoformat()}">{escape(f"{now:%Y-%m-%d %H:%M %Z}")}</time>')
    warning = (
        ""
        if scanner_error is None
        else '<p class="warning">The background scanner ended by an error: '
        f"<code>{escape(scanner_error)}</code></p>"
    )
    listed = "".join(f"<span>{fact}</span>" for fact in facts)
    return f'<header><h1>{escape(title)}</h1><p class="facts">{listed}</p>{warning}</header>'


# ---- sections -----------------------------------------------------------------------------------


def _memory(stats: Stats, info: MemoryInfo, peak: int) -> str:
    figures = (
        ("Saved now", stats.bytes_saved, "shared and zero pages", "main"),
        ("Saved at most", peak, "at the end of a pass", ""),
        ("PSS", info.pss, "memory that the process takes", ""),
        ("RSS", info.rss, "counts shared pages repeatedly", ""),
    )
    cards = "".join(
        f'<div class="card {kind}"><dt>{name}</dt><dd>{size(n_bytes)}'
        f"<small>{note}</small></dd></div>"
        for name, n_bytes, note, kind in figures
    )
    seen, states = memory_parts(info), stats_parts(stats)
    without = (
        '<p class="note">With memory of its own for each shared page it would take '
        f"{size(info.pss + info.saved)}; zero pages that were given back are not in this.</p>"
    )
    return (
        f'<dl class="cards">{cards}</dl><p class="note">{RSS_NOTE}</p>'
        f"<h3>The whole process, as the kernel accounts it</h3>{bar(seen)}{legend(seen)}"
        f"{without if info.saved > 0 else ''}"
        "<h3>Registered pages, by the records of the engine</h3>"
        f"{bar(states)}{legend(states)}"
        '<p class="note">Of all shared pages with the same bytes one is kept, of zero pages none. '
        "Pages that no pass has met yet are missing here.</p>"
    )


def _page_maps(maps: Sequence[PageMap]) -> str:
    if not maps:
        return "<p>Nothing is registered now.</p>"
    key = "".join(
        f"<li>{swatch(ABSENT if state is PageState.NOT_PRESENT else look.colour)}"
        f"<b>{look.label}</b>: {look.meaning}</li>"
        for state, look in LOOKS.items()
    )
    n_regions = sum(one.n_regions for one in maps)
    pages = sum(len(one.states) for one in maps)
    said = f"{counted(n_regions, 'region')}, {counted(pages, 'page')}, the largest first."
    if maps[-1].n_regions > 1:
        said += f" The {maps[-1].n_regions:,} smallest are shown together at the end."
    note = f"Memory runs along the lines, from the top left; {MIXED_NOTE}."
    figures = "".join(
        f"<figure><figcaption><b>{escape(one.title)}</b>, {counted(len(one.states), 'page')}, "
        f"{size(one.nbytes)}{_place(one)}</figcaption>{page_map_figure(one, width_px=600)}"
        f"{legend(state_parts(one.counts(), one.page_bytes))}</figure>"
        for one in maps
    )
    return f'<p>{said} {note}</p><ul class="key">{key}</ul><div class="maps">{figures}</div>'


def _place(one: PageMap) -> str:
    return f"<div><small>{escape(one.place)}</small></div>" if one.place else ""


def _left_out(stats: Stats) -> str:
    met = sorted(((n, reason) for reason, n in stats.skipped.items() if n), reverse=True)
    if not met:
        return "<p>No page that could have been merged was left out.</p>"
    rows = "".join(
        f'<tr><th scope="row"><code>{escape(reason)}</code></th><td class="number">{n:,}</td>'
        f"<td>The page {escape(SKIPPED[reason].page)}.</td>"
        f"<td>{escape(SKIPPED[reason].remedy)}</td></tr>"
        for n, reason in met
    )
    return (
        "<p>Pages that could have been merged and were not, or were not looked at, counted anew in "
        "each pass. Most are met again in the next one.</p>"
        '<table class="wide"><thead><tr><th scope="col">Reason</th>'
        '<th scope="col" class="number">Times</th><th scope="col">Why</th>'
        f'<th scope="col">What can be done</th></tr></thead><tbody>{rows}</tbody></table>'
    )


def _counters(stats: Stats) -> str:
    numbers = stats.as_dict()
    tables = []
    for group in (NOW, WORK, COST):
        told = {
            name: meaning.sentence
            for name, meaning in NUMBERS.items()
            if meaning.group == group and not meaning.by
        }
        tables.append(_table(group, "Counter", {name: numbers[name] for name in told}, told))
    seconds = {stage: f"{spent:.3f} s" for stage, spent in stats.seconds.items()}
    tables.append(_table("Time spent by stage", "Stage", seconds, STAGES))
    return f'<div class="tables">{"".join(tables)}</div>'


def _around(stats: Stats, settings: Mapping[str, Any]) -> str:
    return (
        f'<div class="tables">{_table("Settings of the engine", "Setting", settings)}'
        f"{_table('Machine and software', 'What', _environment(stats), as_code=False)}</div>"
    )


def _environment(stats: Stats) -> dict[str, Any]:
    found = {
        "kernel": f"{platform.system()} {platform.release()}",
        "processor": f"{platform.machine()}, {len(os.sched_getaffinity(0))} usable",
        "vm.max_map_count": procfs.max_map_count(),
        "guard": stats.guard,
        "written pages told by": stats.dirty,
        "present pages told by": stats.presence,
        "Python": platform.python_version(),
        "NumPy": np.__version__,
        "ksmcore": metadata.version("ksmcore"),
    }
    for name, reason in features().items():
        found[f"feature {name}"] = "yes" if reason is None else f"no: {reason}"
    return found


def _table(
    caption: str,
    head: str,
    values: Mapping[str, Any],
    meanings: Mapping[str, str] | None = None,
    *,
    as_code: bool = True,
) -> str:
    """Names, with their meanings below, and values."""
    lines = []
    for name, value in values.items():
        said = f"{value:,}" if type(value) is int else str(value)
        text = escape(said)
        if name in NUMBERS and NUMBERS[name].unit == "bytes":
            text = f"{human_bytes(value)}<small>{said} bytes</small>"
        kind = "number" if len(said) <= LONGEST_NUMBER else "text"
        shown_name = f"<code>{escape(name)}</code>" if as_code else escape(name)
        meaning = f"<small>{escape(meanings[name])}</small>" if meanings else ""
        lines.append(
            f'<tr><th scope="row">{shown_name}{meaning}</th><td class="{kind}">{text}</td></tr>'
        )
    return (
        f'<table><caption>{escape(caption)}</caption><thead><tr><th scope="col">{head}</th>'
        f'<th scope="col" class="number">Value</th></tr></thead><tbody>{"".join(lines)}</tbody>'
        "</table>"
    )
