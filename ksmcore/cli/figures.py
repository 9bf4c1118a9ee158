"""The numbers of a process that runs under `ksmcore run`, as plain data and as a summary."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import ksmcore
from ksmcore._arrays import arena
from ksmcore._engine.counters import SKIPPED
from ksmcore._engine.stats import RegionStats
from ksmcore.cli.untouched import DISABLED
from ksmcore.cli.whose_memory import Whose, past_malloc
from ksmcore.sizes import counted, human_bytes

if TYPE_CHECKING:
    from ksmcore._engine.engine import Engine

__all__ = ["SCHEMA", "Source", "blocks_of", "elsewhere_lines", "summary"]

SCHEMA = 1
"""Of what `run --json` and `estimate --json` write: names and meanings stay, as long as this number
does; more may be added."""

# What the interpreter itself takes in large blocks, and is not worth more than a line.
LITTLE_BYTES = 2 << 20
# Elsewhere equal pages are told of from here on.
WORTH_BYTES = 4 << 20

# The largest regions, in a snapshot.
MOST_REGIONS = 16
# The children that a summary names, those that saved most.
MOST_NAMED = 8


class Source:
    """Where the numbers of this process come from: an engine, and what runs over it."""

    def __init__(
        self,
        engine: Engine,
        command: Sequence[str],
        threshold_bytes: int,
        *,
        whose_memory: Whose = "numpy",
        wants_scans: bool = True,
    ) -> None:
        self._engine = engine
        self._whose_memory = whose_memory
        self._wants_scans = wants_scans
        self._command = list(command)
        self._threshold_bytes = threshold_bytes
        self._began = time.monotonic()

    def snapshot(self) -> dict[str, Any]:
        """All numbers of this moment, ready for json. Any thread may ask."""
        engine = self._engine
        stats = engine.stats()
        return {
            "schema": SCHEMA,
            "ksmcore": ksmcore.__version__,
            "python": platform.python_version(),
            "pid": os.getpid(),
            "command": self._command,
            "seconds": time.monotonic() - self._began,
            "cpu_seconds": time.process_time(),
            "threshold_bytes": self._threshold_bytes,
            "whose_memory": self._whose_memory,
            "past_malloc": past_malloc(),
            "wants_scans": self._wants_scans,
            "scanning": engine.scanning,
            "disabled": engine._disabled,
            "bytes_saved": stats.bytes_saved,
            "peak_bytes_saved": engine.peak_bytes_saved,
            "memory": ksmcore.memory_info().as_dict(),
            "stats": stats.as_dict(),
            "settings": engine.settings.as_dict(),
            "regions_ever": engine._core.n_enlisted,
            "allocator": arena.numbers(),
            "regions": self._largest_regions(),
        }

    def _largest_regions(self) -> list[dict[str, Any]]:
        largest = sorted(self._engine._core.regions(), key=lambda region: -region[2])
        names = {region._id: region.name for region in self._engine.regions}
        found = []
        for region_id, addr, _ in largest[:MOST_REGIONS]:
            numbers = RegionStats(**self._engine._core.tally(region_id, addr)).as_dict()
            found.append({"addr": addr, "name": names.get(region_id), **numbers})
        return found


def summary(figures: Mapping[str, Any]) -> list[str]:
    """What a run has saved and what it took, in lines for a person."""
    stats, memory = figures["stats"], figures["memory"]
    peak, saved = figures["peak_bytes_saved"], figures["bytes_saved"]
    n_refused = figures["allocator"]["refused"]
    lines_elsewhere = elsewhere_lines(figures)
    if peak == 0 and n_refused == 0 and _has_little(figures) and not figures.get("children"):
        # A short program, or one that wants nothing of this: no more than a line.
        return [f"ksmcore: Nothing was saved: {_why_nothing(figures)}", *lines_elsewhere]
    if peak > 0:
        lines = [f"{human_bytes(peak)} saved at most, {human_bytes(saved)} at the end"]
    else:
        here = " in this process" if figures.get("children") else ""
        lines = [f"Nothing was saved{here}: {_why_nothing(figures)}"]
    lines.append(
        f"Memory   PSS {human_bytes(memory['pss'])}, RSS {human_bytes(memory['rss'])}"
        + (" (RSS counts a shared page once for each place that maps it)" if saved > 0 else "")
    )
    lines.append(
        f"Scanner  {counted(stats['full_scans'], 'pass', 'es')} in {figures['seconds']:.1f} s; "
        f"{counted(stats['pages_merged'], 'page')} merged, {stats['pages_zeroed']:,} of zeros "
        f"given back, {stats['cow_breaks']:,} copied again by writes"
    )
    lines.append(
        f"Time     {stats['scanner_seconds']:.2f} s of the {figures['cpu_seconds']:.2f} s of "
        "processor time were the scanner's"
    )
    if n_refused:
        lines.append(
            f"Refused  {counted(n_refused, 'time')} memory for arrays, which were left to "
            f"{_others(figures)}; `ksmcore doctor` tells the limits"
        )
    lines += _of_mappings(stats)
    lines += [f"Skipped  {text}" for text in _skipped(stats)]
    if stats["scanner_error"] is not None and peak > 0:
        lines.append(f"Scanner  ended early: {stats['scanner_error']}")
    if "children" in figures:
        lines += _of_children(figures["children"])
    return [f"ksmcore: {lines[0]}", *(f"  {line}" for line in lines[1:]), *lines_elsewhere]


def elsewhere_lines(figures: Mapping[str, Any]) -> list[str]:
    """What of the memory was not reached, where that is worth a word."""
    found, past = figures.get("elsewhere"), figures.get("past_malloc", ())
    lines = []
    if found is not None and found["saveable_bytes"] >= WORTH_BYTES:
        sizes = [human_bytes(found[name]) for name in ("saveable_bytes", "bytes")]
        lines.append(
            f"  Besides  {sizes[0]} of {sizes[1]} {'' if found['is_all'] else '(and more) '}that "
            "were not reached are equal; `ksmcore estimate --whole` tells where"
        )
    if past:
        lines.append(
            f"  Besides  memory of {' and '.join(past)} comes past malloc, and is not reached"
        )
    return lines


def _has_little(figures: Mapping[str, Any]) -> bool:
    handed_out = figures["allocator"].get("peak_bytes", LITTLE_BYTES)
    return figures["regions_ever"] == 0 or bool(handed_out < LITTLE_BYTES)


def blocks_of(whose_memory: Whose, threshold_bytes: int) -> str:
    """What is reached, in words."""
    what = "block of memory" if whose_memory == "all" else "NumPy array"
    return f"{what} of {human_bytes(threshold_bytes)} or more"


def _others(figures: Mapping[str, Any]) -> str:
    return "the C library" if figures.get("whose_memory") == "all" else "NumPy"


def _of_children(children: Sequence[Mapping[str, Any]]) -> list[str]:
    """What they saved, for a summary."""
    failed = [child["failed"] for child in children if "failed" in child]
    begun = [child for child in children if "failed" not in child]
    begun.sort(key=lambda child: -child["peak_bytes_saved"])
    total = human_bytes(sum(child["peak_bytes_saved"] for child in begun))
    lines = [f"Children {counted(len(begun), 'process', 'es')}; {total} saved at most in them"]
    for child in begun[:MOST_NAMED]:
        lines.append(
            f"         {child['pid']}: {human_bytes(child['peak_bytes_saved'])}, "
            f"{counted(child['stats']['full_scans'], 'pass', 'es')}, PSS "
            f"{human_bytes(child['memory']['pss'])} at the end"
        )
    if len(begun) > MOST_NAMED:
        lines.append(f"         and {len(begun) - MOST_NAMED} more")
    for why in dict.fromkeys(failed):
        lines.append(f"         {counted(failed.count(why), 'process', 'es')} without: {why}")
    return lines


def _of_mappings(stats: Mapping[str, Any]) -> list[str]:
    """What more of them would bring, where there are too few."""
    n_left = stats.get("pages_left_out", 0)
    if n_left == 0:
        return []
    return [
        f"Mappings {stats['maps_used']:,} of {stats['maps_allowed']:,} in use, for "
        f"{human_bytes(stats['bytes_saved_per_map'])} saved each; up to "
        f"{human_bytes(n_left * stats['page_bytes'])} more with a higher vm.max_map_count, or with "
        "equal data in the same order"
    ]


def _skipped(stats: Mapping[str, Any]) -> list[str]:
    """The reasons, the most frequent first. Each pass counts a page anew: so no sum is made. To be
    young passes, and is no loss; and what `_of_mappings` tells is not told twice."""
    passing = {"young", "map_budget"} if stats.get("pages_left_out", 0) else {"young"}
    counts = sorted(stats["skipped"].items(), key=lambda item: -item[1])
    return [
        f"{counted(count, 'time')} a page that {SKIPPED[reason].page}"
        for reason, count in counts
        if count > 0 and reason not in passing
    ]


def _why_nothing(figures: Mapping[str, Any]) -> str:
    stats = figures["stats"]
    if figures["disabled"]:
        return f"{DISABLED}."
    if stats["scanner_error"] is not None:
        return f"the scanner ended by an error: {stats['scanner_error']}."
    if stats["full_scans"] == 0 and not figures["wants_scans"]:
        return "with --no-scan nothing looks for equal pages unless the program itself does."
    if figures["regions_ever"] == 0 and figures["allocator"]["refused"]:
        return (
            f"the kernel refused the memory for its arrays, which were left to {_others(figures)}."
        )
    if figures["regions_ever"] == 0:
        made = blocks_of(figures.get("whose_memory", "numpy"), figures["threshold_bytes"])
        return f"the program made no {made} (see --threshold)."
    if stats["pages_merged"] + stats["pages_zeroed"] > 0:
        return "what was merged was written or freed again before a pass had ended."
    if stats["full_scans"] < 2:
        return (
            f"the program ended after {counted(stats['full_scans'], 'pass', 'es')} of the scanner. "
            "Pages are merged once they held still from one pass to the next, so it takes two (see "
            "--interval; `ksmcore estimate` tells what there is to save)."
        )
    if stats["pages_scanned"] == 0:
        return "no page was in memory while the scanner looked."
    if stats["skipped"].get("young", 0) > 0 and stats["pages_hashed"] == 0:
        return (
            "its arrays lived for less than a second, and are left alone for so long (see "
            "--interval)."
        )
    if stats["pages_volatile"] > stats["pages_unshared"]:
        return "most pages changed from pass to pass, and such pages are left alone."
    if _of_mappings(stats) or _skipped(stats):
        return "what could have been merged had to be left, for the reasons below."
    return (
        f"no two pages of its arrays held the same bytes ({stats['pages_unshared']:,} different "
        "ones at the end)."
    )
