"""History: what an engine's passes left behind, one after the other, for pictures over time.

Who adds to it holds the pass lock; anybody may read.

What is kept of them:
1. The first sample and the latest are always there.
2. Where nothing changed only the two ends are: idle passes move the second one.
3. Of the others one in each stride of passes. The stride is 1, and doubles whenever the history is
   full: every second sample goes then, over the whole time and not from its beginning.
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
        self._stride = 1
        self._n_added = 0

    def add(self, new: Sample) -> None:
        """The latest sample. One caller at a time; readers may go on meanwhile."""
        samples = self._samples
        # The sample before this one was only kept as the latest, unless a stride ended with it.
        in_stride = (self._n_added - 1) % self._stride
        self._n_added += 1
        if len(samples) > 1 and (in_stride or _rests(samples, new)):
            samples[-1] = new
            return
        samples.append(new)
        if len(samples) > self._most:
            self._samples = [*samples[:-1:2], new]
            self._stride *= 2

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

    def _repr_html_(self) -> str:
        from ksmcore._show import notebook

        return notebook.of_history(self)

    def __repr__(self) -> str:
        samples = tuple(self._samples)
        span = f", {samples[0].seconds:.1f} to {samples[-1].seconds:.1f} s" if samples else ""
        return f"<ksmcore.History: {len(samples)} samples{span}>"


def _rests(samples: Sequence[Sample], new: Sample) -> bool:
    """Has nothing changed since the last sample but one?"""
    before, last = samples[-2:]
    return before[1:] == last[1:] == new[1:]
