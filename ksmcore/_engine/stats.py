"""What is reported: frozen snapshots, each with a one-line repr. That of an engine is in counters.

They hold numbers only, and can be pickled and copied; `memory_info` asks the kernel for its own.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeVar

from ksmcore._kernel import procfs, smaps
from ksmcore.sizes import human_bytes

__all__ = ["Estimate", "MemoryInfo", "PassReport", "RegionStats", "Snapshot", "memory_info"]

Number = TypeVar("Number", bound=float)


class FrozenDict(dict[str, Number]):
    """A dict that stays as it is. Of its own `copy` and `|` make plain ones."""

    def _refuse(self, *args: object, **kwargs: object) -> NoReturn:
        raise TypeError("the numbers of a snapshot cannot be changed; dict(...) makes a copy")

    __setitem__ = __delitem__ = __ior__ = _refuse
    clear = pop = popitem = setdefault = update = _refuse

    def __reduce__(self) -> tuple[type[FrozenDict[Number]], tuple[dict[str, Number]]]:
        return type(self), (dict(self),)


class Snapshot:
    """What the frozen dataclasses of numbers share."""

    __slots__ = ()

    def __post_init__(self) -> None:
        for name, value in list(vars(self).items()):
            if isinstance(value, Mapping):
                object.__setattr__(self, name, FrozenDict(value))

    def as_dict(self) -> dict[str, Any]:
        """All fields, and the derived numbers, as plain Python values (ready for json)."""
        return {
            name: dict(value) if isinstance(value, Mapping) else value
            for name, value in ((name, getattr(self, name)) for name in self._names())
        }

    @classmethod
    def _names(cls) -> list[str]:
        own: Mapping[str, Any] = cls.__dataclass_fields__  # type: ignore[attr-defined]
        derived = [name for name, value in vars(cls).items() if isinstance(value, property)]
        return [*own, *derived]


def _told(unreached: Mapping[str, int]) -> str:
    n_unreached = sum(unreached.values())
    return f"; {n_unreached} not reached" if n_unreached else ""


@dataclass(frozen=True, repr=False)
class RegionStats(Snapshot):
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
class PassReport(Snapshot):
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
    unreached: Mapping[str, int] = field(default_factory=dict)
    """What there was no way to in the objects given to `dedup`: how many, by class and reason."""

    @property
    def pages_skipped(self) -> int:
        """Sum of `skipped`."""
        return sum(self.skipped.values())

    def __repr__(self) -> str:
        return (
            f"<ksmcore.PassReport: {human_bytes(self.bytes_saved)} saved, "
            f"{self.pages_merged} merged, {self.pages_zeroed} zero, {self.pages_skipped} skipped "
            f"of {self.pages_scanned} pages in {self.seconds:.3f} s{_told(self.unreached)}>"
        )

    def _repr_html_(self) -> str:
        from ksmcore._show import notebook

        return notebook.of_pass_report(self)


@dataclass(frozen=True, repr=False)
class Estimate(Snapshot):
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
    unreached: Mapping[str, int] = field(default_factory=dict)
    """What there was no way to in the objects given: how many, by class and reason."""

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
            f"{self.pages_duplicate} duplicate, {self.pages_zero} zero pages"
            f"{_told(self.unreached)}>"
        )

    def _repr_html_(self) -> str:
        from ksmcore._show import notebook

        return notebook.of_estimate(self)


@dataclass(frozen=True, repr=False)
class MemoryInfo(Snapshot):
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
    # A tenth of the time where no store is mapped: of each page table a look is spared.
    is_mapped = STORE_PATH in procfs.read("/proc/self/maps")
    for vma in smaps.Snapshot().vmas_of(STORE_PATH) if is_mapped else ():
        # The engine's own views of the store are read-only.
        if vma.writable:
            unsharing += (vma.end - vma.start) - vma.anonymous - vma.swap
    held = 0
    for fd in store_fds:
        with contextlib.suppress(OSError):  # another thread has closed that engine meanwhile
            held += os.fstat(fd).st_blocks * 512
    return MemoryInfo(rss=totals["Rss"], pss=totals["Pss"], saved=unsharing - held)
