"""What an engine reports: frozen snapshots, each with a one-line repr.

Holds numbers only; `memory_info` asks the kernel for its own.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from ksmcore._kernel import smaps
from ksmcore.sizes import human_bytes

__all__ = ["Estimate", "MemoryInfo", "PassReport", "RegionStats", "Stats", "memory_info"]


def _refuse(*_: object, **__: object) -> NoReturn:
    raise TypeError("a snapshot cannot be changed: make a dict of it first")


class FrozenCounts(dict[str, Any]):
    """Counts by name that stay what they are; a dict, so that json, pickle and copies of
    dataclasses know what to do with them."""

    __slots__ = ()

    __setitem__ = __delitem__ = __ior__ = _refuse
    clear = pop = popitem = setdefault = update = _refuse

    def __reduce__(self) -> tuple[type[FrozenCounts], tuple[dict[str, Any]]]:
        return type(self), (dict(self),)


class _Numbers:
    """What the frozen snapshots share."""

    __slots__ = ()

    def __post_init__(self) -> None:
        for name in self._own_names():
            value = getattr(self, name)
            if isinstance(value, Mapping) and not isinstance(value, FrozenCounts):
                object.__setattr__(self, name, FrozenCounts(value))

    def as_dict(self) -> dict[str, Any]:
        """All fields, and the derived numbers, as plain Python values (ready for json)."""
        return {
            name: dict(value) if isinstance(value, Mapping) else value
            for name, value in ((name, getattr(self, name)) for name in self._names())
        }

    @classmethod
    def _own_names(cls) -> Iterable[str]:
        own: Mapping[str, Any] = cls.__dataclass_fields__  # type: ignore[attr-defined]
        return own

    @classmethod
    def _names(cls) -> list[str]:
        derived = [name for name, value in vars(cls).items() if isinstance(value, property)]
        return [*cls._own_names(), *derived]


@dataclass(frozen=True, repr=False)
class Stats(_Numbers):
    """The state of an engine at one moment, under the names of /sys/kernel/mm/ksm where it has
    them."""

    page_bytes: int
    """Size of a page in bytes."""
    regions: int
    """Registered regions."""
    pages_shared: int
    """Shared pages in use: pages of the store that at least one virtual page maps."""
    pages_sharing: int
    """Mappings of shared pages beyond the first of each: pages saved."""
    pages_unshared: int
    """Pages that did not change and equal no other."""
    pages_quiet: int
    """Those of them that are not read again until the kernel says that they were written."""
    pages_volatile: int
    """Pages that changed since the last pass, or were not seen often enough to tell."""
    ksm_zero_pages: int
    """Pages that were all zero and given back."""
    full_scans: int
    """Completed passes over everything registered."""
    pages_scanned: int
    """Present pages passed, over all passes."""
    pages_hashed: int
    """Checksums computed, over all passes."""
    pages_merged: int
    """Mappings of shared pages made, over all passes."""
    pages_reshared: int
    """Those of them that only dropped a private copy which had become equal again."""
    pages_zeroed: int
    """Zero pages given back, over all passes."""
    cow_breaks: int
    """Shared pages that were found copied by a write."""
    page_compares: int
    """Whole pages compared while searching the trees."""
    guard_waits: int
    """Writes of this process that had to wait for a merge, under any engine."""
    store_pages: int
    """Pages that the store holds, copies in blocks without a sharer included."""
    store_pages_frozen: int
    """Those of them that another process may still map because of a fork."""
    metadata_bytes: int
    """Memory of the engine's own records: rmap items, rmap hash, tree nodes, regions."""
    maps_used: int
    """Memory mappings that the engine is taken to use, of `maps_allowed`."""
    maps_allowed: int
    """Memory mappings that the engine may use."""
    skipped: Mapping[str, int]
    """Pages that could have been merged and were not, or were not looked at, by reason, over all
    passes."""
    seconds: Mapping[str, float]
    """Time spent on each stage of a page's path, over all passes: "pagemap" (which pages need a
    look), "checksum", "trees" (searching), "store" (new shared pages), "guard" (mapping)."""
    run: int
    """The setting of that name: 1 while the background scanner is wanted."""
    scanner_error: str | None
    """What the scanner ended by, until `stop` raises it."""
    guard: str
    """The guard in use."""
    dirty: str
    """What tells changed pages: "pagemap" (the kernel, of pages that are quiet), or "checksum"."""
    presence: str
    """What tells present and shared pages: "pagemap", or "mincore" with byte compares, which takes
    a private copy with unchanged bytes for still shared."""

    @property
    def bytes_saved(self) -> int:
        """(pages_sharing + ksm_zero_pages) x page."""
        return (self.pages_sharing + self.ksm_zero_pages) * self.page_bytes

    @property
    def general_profit(self) -> int:
        """bytes_saved less all metadata, in bytes."""
        return self.bytes_saved - self.metadata_bytes

    @property
    def pages_tracked(self) -> int:
        """Present pages of which a record is kept, zero-merged ones aside."""
        return self.pages_shared + self.pages_sharing + self.pages_unshared + self.pages_volatile

    @property
    def pages_skipped(self) -> int:
        """Sum of `skipped`."""
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


@dataclass(frozen=True, repr=False)
class RegionStats(_Numbers):
    """What the pages of a region, or of all regions of an area, are at one moment."""

    pages: int = 0
    """Registered pages."""
    pages_merged: int = 0
    """Those of them that map a shared page."""
    ksm_zero_pages: int = 0
    """Pages that were all zero and given back."""
    pages_unshared: int = 0
    """Pages that did not change and equal no other."""
    pages_quiet: int = 0
    """Those of them that are not read again until the kernel says that they were written."""
    pages_volatile: int = 0
    """Pages that changed since the last pass, or were not seen often enough to tell."""
    pages_saved: float = 0.0
    """Its share of what is saved: of n pages that map one shared page each saves (n - 1) / n."""
    cow_breaks: int = 0
    """Shared pages found copied by a write."""

    @classmethod
    def sum(cls, parts: Iterable[RegionStats]) -> RegionStats:
        """All of them together."""
        each = list(parts)
        names = cls.__dataclass_fields__
        return cls(**{name: sum(getattr(part, name) for part in each) for name in names})

    def __repr__(self) -> str:
        return (
            f"<ksmcore.RegionStats: {self.pages_merged} merged, {self.ksm_zero_pages} zero, "
            f"{self.pages_unshared} unshared, {self.pages_volatile} volatile of {self.pages} pages>"
        )

    def _repr_html_(self) -> str:
        from ksmcore._show import notebook

        return notebook.of_region_stats(self)


@dataclass(frozen=True, repr=False)
class PassReport(_Numbers):
    """What one `scan` or `dedup` did."""

    bytes_saved: int
    """By how much `Stats.bytes_saved` grew (negative when more sharing was broken than made)."""
    pages_scanned: int
    """Present pages passed."""
    pages_hashed: int
    """Pages that were read, for their checksum."""
    pages_merged: int
    """Pages mapped to a shared page."""
    pages_zeroed: int
    """Zero pages given back."""
    cow_breaks: int
    """Shared pages found copied by a write."""
    skipped: Mapping[str, int]
    """Pages that could have been merged and were not, by reason."""
    seconds: float
    """How long it took."""

    @property
    def pages_skipped(self) -> int:
        """Sum of `skipped`."""
        return sum(self.skipped.values())

    def __repr__(self) -> str:
        return (
            f"<ksmcore.PassReport: {human_bytes(self.bytes_saved)} saved, "
            f"{self.pages_merged} merged, {self.pages_zeroed} zero, {self.pages_skipped} skipped "
            f"of {self.pages_scanned} pages in {self.seconds:.3f} s>"
        )

    def _repr_html_(self) -> str:
        from ksmcore._show import notebook

        return notebook.of_pass_report(self)


@dataclass(frozen=True, repr=False)
class Estimate(_Numbers):
    """What merging some buffers would save at most. See `ksmcore.estimate`."""

    page_bytes: int
    """Size of a page in bytes."""
    pages: int
    """Whole pages inside the buffers."""
    pages_present: int
    """Those of them that have memory."""
    pages_zero: int
    """Present pages that hold only zeros."""
    pages_distinct: int
    """Different contents among the others: pages that would remain."""

    @property
    def pages_duplicate(self) -> int:
        """Present pages, not zero, whose content was met before: they could be given back."""
        return self.pages_present - self.pages_zero - self.pages_distinct

    @property
    def bytes_saved(self) -> int:
        """Memory that could be given back, counted from every present page having its own."""
        return (self.pages_duplicate + self.pages_zero) * self.page_bytes

    def __repr__(self) -> str:
        return (
            f"<ksmcore.Estimate: {human_bytes(self.bytes_saved)} of "
            f"{human_bytes(self.pages_present * self.page_bytes)} could be saved: "
            f"{self.pages_duplicate} duplicate, {self.pages_zero} zero pages>"
        )

    def _repr_html_(self) -> str:
        from ksmcore._show import notebook

        return notebook.of_estimate(self)


@dataclass(frozen=True, repr=False)
class MemoryInfo(_Numbers):
    """This process's memory as the kernel accounts it, in bytes."""

    rss: int
    """Resident set size. Counts a shared page once for every mapping: merging does not lower it."""
    pss: int
    """Proportional set size. Counts a shared page once in all: the figure that merging lowers."""
    saved: int
    """What the pages mapping a store would take more if each had its own memory: mapped pages, less
    private copies made by writes, less the memory that the stores hold."""

    def __repr__(self) -> str:
        return (
            f"<ksmcore.MemoryInfo: pss {human_bytes(self.pss)}, rss {human_bytes(self.rss)}, "
            f"saved {human_bytes(self.saved)}>"
        )

    def _repr_html_(self) -> str:
        from ksmcore._show import notebook

        return notebook.of_memory_info(self)


STORE_PATH = "/memfd:ksmcore-store"


def memory_info(store_fds: Iterable[int] = ()) -> MemoryInfo:
    """Ask the kernel for this process's memory; `store_fds` are the memory files of its engines.

    Nothing here comes from ksmcore's own counters: the figures are those of /proc/self/smaps and of
    the memory files' blocks. Zero pages that were given back do not show in `saved`, only in `pss`.
    """
    totals = smaps.smaps_rollup()
    unsharing = 0
    for vma in smaps.Snapshot().vmas_in(0, 1 << 64):
        # The engine's own views of the store are read-only.
        if vma.path.startswith(STORE_PATH) and vma.writable:
            unsharing += (vma.end - vma.start) - vma.anonymous - vma.swap
    held = sum(os.fstat(fd).st_blocks * 512 for fd in store_fds)
    return MemoryInfo(rss=totals["Rss"], pss=totals["Pss"], saved=unsharing - held)


def frozen_counts(counts: Mapping[str, int]) -> Mapping[str, int]:
    return FrozenCounts(counts)
