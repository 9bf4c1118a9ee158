"""What a notebook shows of snapshots, reports, regions and engines.

Called by their `_repr_html_` methods. Puts the pieces of `html` together.
"""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from ksmcore._engine.region import PageState, Region
from ksmcore._engine.stats import Estimate, MemoryInfo, PassReport, RegionStats, Stats
from ksmcore._kernel.syscalls import page_bytes
from ksmcore._show.charts import savings_points
from ksmcore._show.page_maps import PageMap
from ksmcore._show.pieces import (
    QUIET,
    bar,
    legend,
    memory_parts,
    page_map_figure,
    savings_figure,
    size,
    state_parts,
    stats_parts,
    table,
)
from ksmcore.sizes import counted

if TYPE_CHECKING:
    from ksmcore._engine.engine import Engine

__all__ = ["shown", "shown_engine"]

BOX = "font:13px/1.5 system-ui,sans-serif;max-width:46em;margin:.3em 0"


def shown(what: object) -> str:
    """The HTML of a snapshot, a report, a region or an engine."""
    if isinstance(what, Stats):
        head, rest = _stats(what)
    elif isinstance(what, RegionStats):
        head, rest = _region_stats(what)
    elif isinstance(what, PassReport):
        head, rest = _pass_report(what)
    elif isinstance(what, Estimate):
        head, rest = _estimate(what)
    elif isinstance(what, MemoryInfo):
        head, rest = _memory_info(what)
    elif isinstance(what, Region):
        head, rest = _region(what)
    else:
        raise TypeError(f"there is no picture of {type(what).__name__}")
    return _box(type(what).__name__, head, rest)


def shown_engine(engine: Engine) -> str:
    """The HTML of an engine."""
    if engine.closed:
        return _box("Engine", "closed", "")
    stats = engine.stats()
    head, rest = _stats(stats, with_table=False)
    scanner = "scanner running" if engine.scanning else "scanner not running"
    chart = savings_figure(savings_points(engine))
    head = f"{head}; {counted(stats.regions, 'region')}, {scanner}"
    return _box("Engine", head, rest + chart + table(engine.settings.as_dict(), "settings"))


def _box(name: str, head: str, rest: str) -> str:
    return f'<div style="{BOX}"><div><b>ksmcore.{escape(name)}</b> &nbsp;{head}</div>{rest}</div>'


def _stats(stats: Stats, with_table: bool = True) -> tuple[str, str]:
    parts = stats_parts(stats)
    head = f"<b>{size(stats.bytes_saved)}</b> saved"
    if stats.scanner_error is not None:
        head += f"; the scanner ended by {escape(stats.scanner_error)}"
    numbers = table(stats.as_dict(), "all numbers") if with_table else ""
    return head, bar(parts) + legend(parts) + numbers


def _region_stats(stats: RegionStats) -> tuple[str, str]:
    counts = {
        PageState.SHARED: stats.pages_merged,
        PageState.ZERO: stats.ksm_zero_pages,
        PageState.UNIQUE: stats.pages_unshared,
        PageState.VOLATILE: stats.pages_volatile,
    }
    counts[PageState.NOT_PRESENT] = max(stats.pages - sum(counts.values()), 0)
    parts = state_parts(counts, page_bytes())
    named = [
        part._replace(label="no record", meaning="No pass has met it")
        if part.label == "not present"
        else part
        for part in parts
    ]
    saved, registered = round(stats.pages_saved * page_bytes()), stats.pages * page_bytes()
    head = f"its share of what is saved: <b>{size(saved)}</b> of {size(registered)}"
    return head, bar(named) + legend(named) + table(stats.as_dict(), "all numbers")


def _pass_report(report: PassReport) -> tuple[str, str]:
    verb = "saved" if report.bytes_saved >= 0 else "more in use than before"
    head = f"<b>{size(abs(report.bytes_saved))}</b> {verb}, in {report.seconds:.3f} s"
    facts = (
        ("passed", report.pages_scanned),
        ("read", report.pages_hashed),
        ("merged", report.pages_merged),
        ("zero, given back", report.pages_zeroed),
        ("written since they were shared", report.cow_breaks),
        ("left out", report.pages_skipped),
    )
    told = ", ".join(f"<b>{count:,}</b> {what}" for what, count in facts if count)
    skipped = {reason: count for reason, count in report.skipped.items() if count}
    left_out = table(skipped, "left out, by reason") if skipped else ""
    return head, f"<div>Pages: {told or 'none'}</div>{left_out}"


def _estimate(estimate: Estimate) -> tuple[str, str]:
    counts = {
        PageState.SHARED: estimate.pages_duplicate,
        PageState.ZERO: estimate.pages_zero,
        PageState.UNIQUE: estimate.pages_distinct,
        PageState.NOT_PRESENT: estimate.pages - estimate.pages_present,
    }
    names = {
        "shared": ("duplicate", "Its bytes were met before: could be given back"),
        "zero": ("zero", "Holds only zeros: could be given back"),
        "unique": ("distinct", "The first page with its bytes: would remain"),
    }
    parts = []
    for part in state_parts(counts, estimate.page_bytes):
        label, meaning = names.get(part.label, (part.label, part.meaning))
        parts.append(part._replace(label=label, meaning=meaning))
    present = estimate.pages_present * estimate.page_bytes
    head = f"<b>{size(estimate.bytes_saved)}</b> of {size(present)} could be saved"
    return head, bar(parts) + legend(parts)


def _memory_info(info: MemoryInfo) -> tuple[str, str]:
    parts = memory_parts(info)
    head = f"PSS <b>{size(info.pss)}</b>, RSS {size(info.rss)}, saved <b>{size(info.saved)}</b>"
    note = "RSS counts a shared page once for each mapping: merging lowers PSS, not RSS."
    return head, bar(parts) + legend(parts) + f'<div style="{QUIET};font-size:.9em">{note}</div>'


def _region(region: Region) -> tuple[str, str]:
    head = f"{counted(region.n_pages, 'page')} at <code>{region.addr:#x}</code>, "
    try:
        states = region.page_map()
    except ValueError:
        return f"{head}not registered", ""
    the_map = PageMap("", states, region._engine.page_bytes)
    parts = state_parts(the_map.counts(), the_map.page_bytes)
    return head + size(the_map.nbytes), page_map_figure(the_map) + legend(parts)
