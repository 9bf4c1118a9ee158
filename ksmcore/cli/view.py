"""A process's numbers as a picture for a terminal, drawn with rich.

It takes the snapshots of `figures.Source`, or what `kernel_view` finds out about a process that
serves none.
"""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Group, OverflowMethod, RenderableType
from rich.table import Table
from rich.text import Text

from ksmcore._kernel import procfs, smaps
from ksmcore.sizes import human_bytes

__all__ = ["kernel_view", "picture"]

BAR_CELLS = 20
# Of a bar's parts, in their order, and of what is missing to the whole. There may be no colour.
MARKS, ASCII_MARKS = "█▓▒░·", "#=-~."
# Parts of a region's bar: number, name, style.
PARTS = (
    ("pages_merged", "merged", "green"),
    ("ksm_zero_pages", "zero", "cyan"),
    ("pages_unshared", "unshared", "blue"),
    ("pages_volatile", "volatile", "yellow"),
)


def picture(
    figures: Mapping[str, Any], *, max_regions: int = 8, ascii_only: bool = False
) -> RenderableType:
    """All of it; with few regions it is about ten lines high. `ascii_only`: for terminals that have
    no other letters."""
    marks = ASCII_MARKS if ascii_only else MARKS
    overflow: OverflowMethod = "crop" if ascii_only else "ellipsis"
    rows = Table.grid(padding=(0, 2))
    named = _memory_rows(figures, marks) + _engine_rows(figures)
    # On a narrow terminal the values are cut off, not their names.
    rows.add_column(
        style="bold", overflow=overflow, no_wrap=True, min_width=max(len(name) for name, _ in named)
    )
    rows.add_column(overflow=overflow, no_wrap=True)
    for name, value in named:
        # Text, so that brackets in it are no markup.
        rows.add_row(name, Text(value) if isinstance(value, str) else value)
    parts: list[RenderableType] = [_title(figures, overflow), rows]
    regions = figures.get("regions", [])
    if max_regions > 0 and regions:
        parts.append(_regions(regions[:max_regions], figures, marks, overflow))
    return Group(*parts)


def _title(figures: Mapping[str, Any], overflow: OverflowMethod) -> Text:
    title = Text(f"ksmcore  pid {figures['pid']}", style="bold", no_wrap=True, overflow=overflow)
    if "seconds" in figures:
        title.append(f"  {_duration(figures['seconds'])}")
    # The command is the program's: control characters in it are none of the terminal's.
    command = shlex.join(figures["command"]).encode("unicode_escape").decode()
    return title.append(f"  {command}", style="not bold")


def _memory_rows(figures: Mapping[str, Any], marks: str) -> list[tuple[str, RenderableType]]:
    memory = figures["memory"]
    text = "  ".join(
        f"{label} {human_bytes(memory[name])}"
        for name, label in (("pss", "PSS"), ("rss", "RSS"), ("swap", "swap"))
        if memory.get(name) is not None
    )
    text = text or "none: a thread of the kernel, or a process that has ended"
    rows: list[tuple[str, RenderableType]] = [("Memory", text)]
    if "bytes_saved" in figures:
        saved, peak = figures["bytes_saved"], figures["peak_bytes_saved"]
        stats = figures["stats"]
        tracked = (stats["pages_tracked"] + stats["ksm_zero_pages"]) * stats["page_bytes"]
        bar = _bar([(saved, "green")], max(tracked, 1), marks)
        bar.append(
            f"  {human_bytes(saved)} of {human_bytes(tracked)} "
            f"({saved / max(tracked, 1):.0%}), peak {human_bytes(peak)}"
        )
        rows.append(("Saved", bar))
    return rows


def _engine_rows(figures: Mapping[str, Any]) -> list[tuple[str, RenderableType]]:
    if "stats" not in figures:
        return [(name, text) for name, text in figures.get("notes", [])]
    stats = figures["stats"]
    pages = Text()
    for name, label, style in (
        ("pages_shared", "shared", "green"),
        ("pages_sharing", "sharing", "green"),
        ("ksm_zero_pages", "zero", "cyan"),
        ("pages_unshared", "unshared", "blue"),
        ("pages_volatile", "volatile", "yellow"),
    ):
        pages.append(f"{label} {stats[name]:,}  ", style=style)
    state = "running" if figures["scanning"] else "not running"
    if stats["scanner_error"] is not None:
        state = f"ended: {stats['scanner_error']}"
    scanner = (
        f"{state}  passes {stats['full_scans']:,}  merged {stats['pages_merged']:,}  "
        f"copied by writes {stats['cow_breaks']:,}"
    )
    engine = (
        f"guard {stats['guard']}  regions {stats['regions']:,}  "
        f"mappings {stats['maps_used']:,} of {stats['maps_allowed']:,}  "
        f"records {human_bytes(stats['metadata_bytes'])}"
    )
    rows: list[tuple[str, RenderableType]] = [
        ("Pages", pages),
        ("Scanner", Text(scanner)),
        ("Engine", engine),
    ]
    skipped = sorted(stats["skipped"].items(), key=lambda item: -item[1])
    text = "  ".join(f"{reason} {count:,}" for reason, count in skipped if count > 0)
    rows.append(("Skipped", text or "-"))
    return rows


def _regions(
    regions: list[Mapping[str, Any]],
    figures: Mapping[str, Any],
    marks: str,
    overflow: OverflowMethod,
) -> RenderableType:
    page_bytes = figures["stats"]["page_bytes"]
    table = Table.grid(padding=(0, 2))
    for _ in range(3):
        table.add_column(overflow=overflow, no_wrap=True)
    n_all = figures["stats"]["regions"]
    legend = Text()
    for mark, (_, name, style) in zip(marks, PARTS, strict=False):
        legend.append(f"{mark} {name}  ", style=style)
    table.add_row(Text(f"Regions {n_all:,}", style="bold"), "size", legend)
    for region in regions:
        n_pages = max(region["pages"], 1)
        bar = _bar([(region[number], style) for number, _, style in PARTS], n_pages, marks)
        merged = region["pages_merged"] + region["ksm_zero_pages"]
        tracked = sum(region[number] for number, _, _ in PARTS)
        bar.append(
            f"  {merged / max(tracked, 1):.0%} of {human_bytes(tracked * page_bytes)} "
            "merged or zero"
        )
        name = region.get("name") or f"{region['addr']:#x}"
        table.add_row(Text(name), human_bytes(n_pages * page_bytes), bar)
    return table


def _bar(parts: list[tuple[float, str]], whole: float, marks: str) -> Text:
    """So much of a bar with each mark and style; what is missing to the whole stays empty."""
    bar = Text(no_wrap=True)
    reached, drawn = 0.0, 0
    for mark, (amount, style) in zip(marks, parts, strict=False):
        reached += max(amount, 0)
        n_cells = min(round(reached / whole * BAR_CELLS), BAR_CELLS) - drawn
        bar.append(mark * n_cells, style=style)
        drawn += n_cells
    return bar.append(marks[-1] * (BAR_CELLS - drawn), style="bright_black")


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


# ---- processes that serve nothing ----------------------------------------------------------------


def kernel_view(pid: int, proc: Path = Path("/proc")) -> dict[str, Any]:
    """What the kernel tells of a process, in the form of a snapshot.

    Raises:
        ProcessLookupError: there is none of that number.
    """
    here = proc / str(pid)
    try:
        raw = (here / "cmdline").read_bytes()
        name = (here / "comm").read_text(errors="replace").strip()
        if procfs.words(here / "status").get("State", "").startswith(("Z", "X")):
            raise ProcessLookupError
    except (FileNotFoundError, ProcessLookupError):
        raise ProcessLookupError(f"there is no process {pid}") from None
    command = raw.rstrip(b"\0").decode(errors="replace").split("\0") if raw else [f"[{name}]"]
    memory, notes = _memory_of(here)
    served = "no numbers: not under `ksmcore run`, or another user's"
    return {
        "pid": pid,
        "command": command,
        "memory": memory,
        "notes": [("ksmcore", served), *notes],
    }


def _memory_of(here: Path) -> tuple[dict[str, int | None], list[tuple[str, str]]]:
    """Bytes of a process, and what else there is to say of its memory."""
    memory: dict[str, int | None]
    notes = []
    try:
        totals = smaps.smaps_rollup(here)
        memory = {"pss": totals["Pss"], "rss": totals["Rss"], "swap": totals.get("Swap")}
    except (OSError, KeyError) as error:
        status = procfs.sizes_of(here / "status")
        memory = {"pss": None, "rss": status.get("VmRSS"), "swap": status.get("VmSwap")}
        if memory["rss"] is None:
            return memory, []
        if isinstance(error, PermissionError):
            notes.append(("PSS", "not shown: this process is another's"))
    with contextlib.suppress(OSError):
        notes.append(("Mappings", f"{smaps.count_maps(here):,}"))
    merging = procfs.number(here / "ksm_merging_pages")
    if merging is not None:
        notes.append(("Kernel's KSM", f"{merging:,} pages merged"))
    return memory, notes
