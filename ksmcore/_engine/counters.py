"""All that an engine counts, in one table: the numbers of `Stats`, reasons to skip a page, stages.

Whatever is told of them is told from here: by `help(ksmcore.Stats)`, the HTML report, Prometheus,
the command line and the tables of the docs. Sentences are for people who do not know KSM.

The names are those of the compiled code's fields, in `core_numbers` (_core/numbers.pxd) and in
`scan_counters`, `skip_counters` and `stage_times` (_pass/batch.pxd). To add one: a field there,
counted where it happens, and an entry here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple, TypeVar

from ksmcore._engine.stats import Snapshot
from ksmcore.sizes import human_bytes

__all__ = ["NUMBERS", "SKIPPED", "STAGES", "Meaning", "Reason", "Stats"]

# Groups. What is in WORK only grows; what is in STATE is no number.
NOW = "At this moment"
WORK = "Work since the engine was made"
COST = "What it takes"
STATE = "What is in use"

Getter = TypeVar("Getter", bound=Callable[[Any], object])


class Meaning(NamedTuple):
    """What a number is."""

    group: str
    unit: str
    sentence: str
    by: str = ""
    """What it is counted by, if it is a mapping."""

    @property
    def kind(self) -> str:
        return {WORK: "counter", STATE: "text"}.get(self.group, "gauge")


def means(group: str, unit: str, sentence: str, by: str = "") -> Any:
    """A field of this meaning. It has no default, though type checkers think so."""
    return field(metadata={"meaning": Meaning(group, unit, sentence, by)})


def derived(group: str, unit: str) -> Callable[[Getter], Getter]:
    """Of a property, whose docstring is the sentence."""

    def mark(getter: Getter) -> Getter:
        getter.__dict__["meaning"] = Meaning(group, unit, getter.__doc__ or "")
        return getter

    return mark


@dataclass(frozen=True, repr=False)
class Stats(Snapshot):
    """The state of an engine at one moment, under the names of /sys/kernel/mm/ksm where it has
    them."""

    page_bytes: int = means(NOW, "bytes", "Size of a page.")
    regions: int = means(NOW, "regions", "Registered regions, arrays of the engine included.")
    pages_shared: int = means(
        NOW, "pages", "Shared pages in use. Each holds bytes that several pages have in common."
    )
    pages_sharing: int = means(
        NOW, "pages", "Pages that map a shared page, less one for each of these: pages saved."
    )
    pages_unshared: int = means(NOW, "pages", "Pages that did not change and equal no other.")
    pages_quiet: int = means(
        NOW, "pages", "Unshared pages that are not read again until the kernel reports a write."
    )
    pages_volatile: int = means(
        NOW,
        "pages",
        "Pages that changed since the last pass, or were not seen often enough to tell.",
    )
    pages_left_out: int = means(
        NOW,
        "pages",
        "Pages that equal another and were not merged, for want of memory mappings, when they were "
        "looked at last.",
    )
    ksm_zero_pages: int = means(
        NOW, "pages", "Pages that held only zeros and were given back: saved too."
    )
    full_scans: int = means(WORK, "passes", "Completed passes over everything registered.")
    pages_scanned: int = means(WORK, "pages", "Pages passed that had memory.")
    pages_hashed: int = means(WORK, "pages", "Pages that were read, for their checksum.")
    pages_merged: int = means(WORK, "pages", "Times that a page was mapped to a shared page.")
    pages_reshared: int = means(
        WORK,
        "pages",
        "Merged pages that needed no new mapping: they were equal again to what lay under them.",
    )
    pages_zeroed: int = means(WORK, "pages", "Times that a zero page was given back.")
    cow_breaks: int = means(
        WORK, "pages", "Shared pages that the kernel copied back because they were written."
    )
    page_compares: int = means(
        WORK, "pages", "Whole pages compared while searching for equal ones."
    )
    guard_waits: int = means(
        WORK, "waits", "Times that a thread had to wait for a merge, under any engine."
    )
    store_pages: int = means(
        COST,
        "pages",
        "Pages that the store of shared pages holds, copies without a sharer included.",
    )
    store_pages_frozen: int = means(
        COST, "pages", "Pages of the store that another process may map because of a fork."
    )
    metadata_bytes: int = means(COST, "bytes", "Records, trees and tables of the engine.")
    maps_used: int = means(COST, "mappings", "Memory mappings that the engine is taken to use.")
    maps_allowed: int = means(COST, "mappings", "Memory mappings that the engine may use.")
    skipped: Mapping[str, int] = means(
        WORK,
        "pages",
        "Pages that could have been merged and were not, or were not looked at.",
        by="reason",
    )
    seconds: Mapping[str, float] = means(
        WORK, "seconds", "Time spent on each stage of a page's path.", by="stage"
    )
    passes_put_off: int = means(
        WORK,
        "times",
        "Times that the background scanner had to wait because there was no file descriptor or no "
        "memory for it, or because the kernel did not tell what is mapped.",
    )
    scanner_seconds: float = means(
        WORK, "seconds", "Processor time of the background scanner, up to its last batch."
    )
    run: int = means(NOW, "", "The setting of that name: 1 while the background scanner is wanted.")
    scanner_error: str | None = means(
        STATE, "", "What the scanner ended by, until stop() raises it."
    )
    guard: str = means(STATE, "", "What keeps writers out of a merge.")
    dirty: str = means(
        STATE, "", 'What tells changed pages: "pagemap" (the kernel, of quiet pages) or "checksum".'
    )
    presence: str = means(
        STATE,
        "",
        'What tells present and shared pages: "pagemap", or "mincore" with byte compares, '
        "which takes a private copy with unchanged bytes for still shared.",
    )

    @property
    @derived(NOW, "bytes")
    def bytes_saved(self) -> int:
        """Memory given back: (pages_sharing + ksm_zero_pages) pages."""
        return (self.pages_sharing + self.ksm_zero_pages) * self.page_bytes

    @property
    @derived(NOW, "bytes")
    def general_profit(self) -> int:
        """bytes_saved less metadata_bytes."""
        return self.bytes_saved - self.metadata_bytes

    @property
    @derived(COST, "bytes")
    def bytes_saved_per_map(self) -> int:
        """bytes_saved by maps_used, rounded down."""
        return self.bytes_saved // max(self.maps_used, 1)

    @property
    @derived(NOW, "pages")
    def pages_tracked(self) -> int:
        """Shared, sharing, unshared and volatile pages: all that have a record, but zero pages."""
        return self.pages_shared + self.pages_sharing + self.pages_unshared + self.pages_volatile

    @property
    @derived(WORK, "pages")
    def pages_skipped(self) -> int:
        """Sum of skipped."""
        return sum(self.skipped.values())

    def __repr__(self) -> str:
        return (
            f"<ksmcore.Stats: {human_bytes(self.bytes_saved)} saved, {self.pages_shared} shared, "
            f"{self.pages_sharing} sharing, {self.pages_unshared} unshared, "
            f"{self.pages_volatile} volatile, {self.ksm_zero_pages} zero pages>"
        )

    def _repr_html_(self) -> str:
        from ksmcore._show import notebook

        return notebook.of_stats(self)


def _meanings() -> dict[str, Meaning]:
    found = {
        name: value.fget.__dict__["meaning"]
        for name, value in vars(Stats).items()
        if isinstance(value, property)
    }
    return found | {one.name: one.metadata["meaning"] for one in fields(Stats)}


# By name, what is derived from others first.
NUMBERS = _meanings()
Stats.__doc__ = f"{Stats.__doc__}\n\n" + "\n".join(
    f"    {name}: {meaning.sentence}" for name, meaning in NUMBERS.items()
)


class Reason(NamedTuple):
    """Why a page that could have been merged was not, or was not looked at."""

    page: str
    """What it did or was; goes on from "the page", or from "a page that"."""
    remedy: str
    """What can be done."""


# Of `Stats.skipped`.
SKIPPED = {
    "changed": Reason(
        "was written while it was being looked at",
        "Nothing. A page that is written all the time gains nothing by merging.",
    ),
    "refused": Reason(
        "could not be protected or mapped: the kernel refused",
        "See whether memory or vm.max_map_count is used up, or another userfaultfd watches that "
        "memory; ask `ksmcore doctor`.",
    ),
    "map_budget": Reason(
        "stood too alone: merging it would have taken mappings that the process may need",
        "Raise vm.max_map_count (sysctl, as root) or the setting map_budget, or lay equal data "
        "out in the same order.",
    ),
    "store": Reason(
        "found no room: the store could not be grown or written",
        "Give the process more memory or more descriptors, or raise its control group's limit.",
    ),
    "file_size": Reason(
        "found no room: files of this process may not become larger (RLIMIT_FSIZE)",
        "Raise the limit on the size of files (ulimit -f), which holds for the memory files of "
        "shared pages too.",
    ),
    "max_shared_pages": Reason(
        "met the limit max_shared_pages",
        "Raise that setting, or set it to None.",
    ),
    "partner": Reason(
        "had a partner that could not be merged",
        "Nothing. Both are met again in the next pass.",
    ),
    "away": Reason(
        "was swapped out, or was being moved by the kernel",
        "Nothing, unless there are many: then the machine has too little memory.",
    ),
    "pinned": Reason(
        "may have been written by a device at that time, or was shared with a child by a fork",
        "Nothing, of a program that forks. Of others: end direct input and output, or leave such "
        "buffers unregistered.",
    ),
    "in_call": Reason(
        "was being written into by a call of the C library (read, recv, ...), or could be at any "
        "moment",
        "Nothing. It is met again in the next pass; a call that waits for its input keeps its "
        "pages as they are until it returns.",
    ),
    "sigsegv_blocked": Reason(
        "was not merged because a thread of the process blocks SIGSEGV, or /proc does not tell, "
        "and the guard is mprotect",
        "Have no thread block SIGSEGV, or use a guard of userfaultfd; `ksmcore.doctor.examine()` "
        "names the threads.",
    ),
    "altered": Reason(
        "lies in memory that the program has since unmapped, moved, protected or locked, or in "
        "any, where all new memory is locked (mlockall with MCL_FUTURE)",
        "Undo that, or close the region and register the memory anew.",
    ),
    "held": Reason(
        "lies in a region that was held",
        "Leave hold() as soon as the system call has returned.",
    ),
    "smart_scan": Reason(
        "found no equal page before, and was not looked at this time",
        "Turn the setting smart_scan off to look at every page in every pass.",
    ),
    "young": Reason(
        "belongs to an array of the allocator that was made a moment ago",
        "Nothing: the background scanner looks at it when it has lived for fifty of its rests, a "
        "second at most. scan() and dedup() look at once.",
    ),
    "max_page_sharing": Reason(
        "found its shared page full, and no partner to make another with",
        'Raise the setting max_page_sharing, or set it to "auto".',
    ),
}

# Stages of a page's path, of `Stats.seconds`.
STAGES = {
    "pagemap": "asking the kernel which pages are there and which were written",
    "checksum": "reading pages",
    "trees": "searching for equal pages",
    "store": "making shared pages",
    "guard": "comparing and mapping, with writers kept out",
}
