"""History: what an engine's passes left behind, one after the other, for pictures over time.

Called by the passes, which hold the pass lock when they add to it; read by users and by what draws.

What is kept of them:
1. The first sample and the latest are always there.
2. Where nothing changed only the two ends are: idle passes move the second one.
3. No three samples lie within one gap of time. The gap is 0 until the history is full, and then
   such that about half of the samples go, from the whole time and not from its beginning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, overload

__all__ = ["History", "Sample"]

# Twice what the widest picture has columns for; a few hundred bytes each.
MOST_SAMPLES = 4096


class Sample(NamedTuple):
    """What a pass left behind; the numbers are those of `ksmcore.Stats`."""

    seconds: float
    """Since the engine was made; in a forked child, since the engine began anew there."""
    bytes_saved: int
    pages_shared: int
    pages_sharing: int
    pages_unshared: int
    pages_volatile: int
    ksm_zero_pages: int

    @property
    def pages_used(self) -> int:
        """Pages of memory that the pages with a record take."""
        return self.pages_shared + self.pages_unshared + self.pages_volatile

    @property
    def pages_saved(self) -> int:
        """Pages of memory that they would take beyond that, if nothing were merged."""
        return self.pages_sharing + self.ksm_zero_pages


def sample(seconds: float, numbers: Mapping[str, Any], page_bytes: int) -> Sample:
    """A sample of these counters of the core."""
    counts = {name: numbers[name] for name in Sample._fields[2:]}
    saved = (counts["pages_sharing"] + counts["ksm_zero_pages"]) * page_bytes
    return Sample(seconds, saved, **counts)


class History(Sequence[Sample]):
    """Samples by time, at most so many; see the top of this module for which are kept."""

    def __init__(self, most_samples: int = MOST_SAMPLES) -> None:
        self._samples: list[Sample] = []
        self._most = most_samples
        self._gap_seconds = 0.0

    def add(self, new: Sample) -> None:
        """The latest sample. One caller at a time; readers may go on meanwhile."""
        _put(self._samples, new, self._gap_seconds)
        if len(self._samples) > self._most:
            span = new.seconds - self._samples[0].seconds
            self._gap_seconds = 4 * span / self._most
            thinned: list[Sample] = []
            for one in self._samples:
                _put(thinned, one, self._gap_seconds)
            self._samples = thinned

    def as_dict(self) -> dict[str, list[float]]:
        """Name -> the values of all samples, ready for json."""
        samples = tuple(self._samples)
        return {
            name: [one[position] for one in samples] for position, name in enumerate(Sample._fields)
        }

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | Sequence[Sample]:
        return self._samples[index]

    def __len__(self) -> int:
        return len(self._samples)

    def __repr__(self) -> str:
        samples = tuple(self._samples)
        span = f", {samples[0].seconds:.1f} to {samples[-1].seconds:.1f} s" if samples else ""
        return f"<ksmcore.History: {len(samples)} samples{span}>"


def _put(samples: list[Sample], new: Sample, gap_seconds: float) -> None:
    if len(samples) > 1:
        before, last = samples[-2:]
        if new.seconds - before.seconds <= gap_seconds or before[1:] == last[1:] == new[1:]:
            samples[-1] = new
            return
    samples.append(new)
