"""What a notebook shows of snapshots, reports, regions and engines: a function for each kind, which
puts `pieces` together."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from ksmcore._engine.page_state import PageState
from ksmcore._kernel.syscalls import page_bytes
from ksmcore._show.charts import history_points, savings_points
from ksmcore._show.page_maps import region_map
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
    from ksmcore._engine.area import Area
    from ksmcore._engine.counters import Stats
    from ksmcore._engine.engine import Engine
    from ksmcore._engine.features import Features
    from ksmcore._engine.history import History
    from ksmcore._engine.region import Region
    from ksmcore._engine.settings import Settings
    from ksmcore._engine.stats import Estimate, MemoryInfo, PassReport, RegionStats

__all__ = [
    "of_area",
    "of_engine",
    "of_estimate",
    "of_features",
    "of_history",
    "of_memory_info",
    "of_pass_report",
    "of_region",
    "of_region_stats",
    "of_settings",
    "of_stats",
]

BOX = "font:13px/1.5 system-ui,sans-serif;max-width:46em;margin:.3em 0"


def of_engine(engine: Engine) -> str:
    if engine.closed:
        return _box(engine, "closed", "")
    stats = engine.stats()
    scanner = "scanner running" if engine.scanning else "scanner not running"
    head = f"{_saved(stats)}; {counted(stats.regions, 'region')}, {scanner}"
    chart = savings_figure(savings_points(engine))
    parts = stats_parts(stats)
    settings = table(engine.settings.as_dict(), "settings")
    return _box(engine, head, bar(parts) + legend(parts) + chart + settings)


def of_stats(stats: Stats) -> str:
    parts = stats_parts(stats)
    numbers = table(stats.as_dict(), "all numbers")
    return _box(stats, _saved(stats), bar(parts) + legend(parts) + numbers)


def of_region_stats(stats: RegionStats) -> str:
    return _box(stats, *_region_numbers(stats))


def of_area(area: Area) -> str:
    if area.closed:
        return _box(area, "closed", "")
    stats = area.stats()
    head, rest = _region_numbers(stats)
    regions = {
        f"{one.addr:#x}" if one.name is None else f"{one.name} at {one.addr:#x}": counted(
            one.n_pages, "page"
        )
        for one in area.regions
    }
    listed = table(regions, "regions") if regions else ""
    unreached = table(area.unreached, "not reached, by class and reason") if area.unreached else ""
    return _box(area, f"{counted(len(regions), 'region')}; {head}", rest + listed + unreached)


def of_history(history: History) -> str:
    samples = list(history)
    head = counted(len(samples), "sample")
    if samples:
        head += f", to {samples[-1].seconds:,.1f} s; <b>{size(samples[-1].bytes_saved)}</b> saved"
    return _box(history, head, savings_figure(history_points(samples)))


def of_settings(settings: Settings) -> str:
    defaults = type(settings)().as_dict()
    values = settings.as_dict()
    other = {name: value for name, value in values.items() if value != defaults[name]}
    told = ", ".join(f"<b>{escape(name)}</b> {escape(str(value))}" for name, value in other.items())
    return _box(settings, told or "all as by default", table(values, "all settings"))


def of_features(features: Features) -> str:
    lines = "".join(
        f"<li><b>{escape(name)}</b>: {'there' if reason is None else escape(reason)}</li>"
        for name, reason in features.items()
    )
    n_there = sum(reason is None for reason in features.values())
    head = f"{n_there} of {len(features)} can be used here"
    return _box(features, head, f'<ul style="margin:.2em 0;padding-left:1.4em">{lines}</ul>')


def _region_numbers(stats: RegionStats) -> tuple[str, str]:
    """In a line, and in full."""
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
    numbers = table(stats.as_dict(), "all numbers")
    return head, bar(named) + legend(named) + numbers


def of_pass_report(report: PassReport) -> str:
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
    left_out += _unreached(report)
    return _box(report, head, f"<div>Pages: {told or 'none'}</div>{left_out}")


def of_estimate(estimate: Estimate) -> str:
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
    return _box(estimate, head, bar(parts) + legend(parts) + _unreached(estimate))


def _unreached(report: PassReport | Estimate) -> str:
    found = dict(report.unreached)
    return table(found, "not reached, by class and reason") if found else ""


def of_memory_info(info: MemoryInfo) -> str:
    parts = memory_parts(info)
    head = f"PSS <b>{size(info.pss)}</b>, RSS {size(info.rss)}, saved <b>{size(info.saved)}</b>"
    note = "RSS counts a shared page once for each mapping: merging lowers PSS, not RSS."
    told = f'<div style="{QUIET};font-size:.9em">{note}</div>'
    return _box(info, head, bar(parts) + legend(parts) + told)


def of_region(region: Region) -> str:
    try:
        the_map = region_map(region)
    except ValueError:
        head = f"{counted(region.n_pages, 'page')} at <code>{region.addr:#x}</code>, not registered"
        return _box(region, head, "")
    parts = state_parts(the_map.counts(), the_map.page_bytes)
    called = escape(the_map.title.removeprefix("Region "))
    head = f"{called}, {counted(region.n_pages, 'page')}, "
    place = f'<div style="{QUIET};font-size:.9em">{escape(the_map.place)}</div>'
    rest = page_map_figure(the_map) + legend(parts)
    return _box(region, head + size(the_map.nbytes), (place if the_map.place else "") + rest)


def _saved(stats: Stats) -> str:
    head = f"<b>{size(stats.bytes_saved)}</b> saved"
    if stats.scanner_error is not None:
        head += f"; the scanner ended by {escape(stats.scanner_error)}"
    return head


def _box(what: object, head: str, rest: str) -> str:
    name = escape(type(what).__name__)
    return f'<div style="{BOX}"><div><b>ksmcore.{name}</b> &nbsp;{head}</div>{rest}</div>'
