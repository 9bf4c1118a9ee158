"""What has been let in, by address: so that smaps need not be read for its neighbours.

All pages of one mapping are alike: permissions, advice, locks, protection key, NUMA policy and
userfaultfd are its, and the kernel makes one mapping of two neighbours only if they agree in all of
them. A buffer that was let in, and is held since, is still what it was. So a new buffer in the same
mapping is as good, unless the program has changed both since; that is looked at before a page is
merged.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from typing import TYPE_CHECKING

from ksmcore._kernel import maps, smaps

if TYPE_CHECKING:
    from ksmcore._gate.buffers import Admission, Export
    from ksmcore._gate.mapping_rules import MappingTraits

__all__ = ["Admitted"]


class Admitted:
    """Buffers that were let in. Callers see to it that one thread at a time uses it. A signal
    handler that comes to it in the middle of a call costs a buffer's being known, at worst."""

    def __init__(self) -> None:
        # (address, number, admission), sorted. Numbers keep admissions from being compared. Those
        # that were let go meanwhile are dropped when they are met, or when there are so many.
        self._all: list[tuple[int, int, Admission]] = []
        self._n_added = 0
        self._most_kept = 64

    def add(self, admission: Admission) -> None:
        """Remember a buffer, if all its pages lie in one mapping, and are what they were."""
        if not admission.in_one_mapping or admission.traits.must_privatize:
            return
        self._n_added += 1
        insort(self._all, (admission.export.addr, self._n_added, admission))
        if len(self._all) > self._most_kept:
            self._all = [one for one in self._all if one[2].export.is_held]
            self._most_kept = 2 * len(self._all) + 64

    def traits_of(self, exports: Iterable[Export]) -> dict[Export, MappingTraits]:
        """What is known of these buffers, sorted by address, without reading smaps: of those that
        share their mapping with one that was let in."""
        known: dict[Export, MappingTraits] = {}
        end_of_mapping = 0
        traits: MappingTraits | None = None
        for export in exports if self._all else ():
            if export.addr >= end_of_mapping:
                mapping = maps.plain_mapping_at(export.addr)
                start, end_of_mapping = mapping or (export.addr, export.end)
                traits = self._traits_within(start, end_of_mapping) if mapping else None
            if traits is not None and export.end <= end_of_mapping:
                known[export] = traits
        # The one thing that a program is likely to do to all of its memory later on.
        return {} if known and smaps.locked_bytes() != 0 else known

    def _traits_within(self, start: int, end: int) -> MappingTraits | None:
        """Of a buffer that lies in a mapping as a whole: where the mapping was cut through it, one
        of the pieces has changed."""
        first = at = bisect_left(self._all, (start,))
        try:
            while not self._all[at][2].export.is_held and self._all[at][0] < end:
                at += 1
            found = self._all[at][2]
        except IndexError:
            return None
        finally:
            del self._all[first:at]
        return found.traits if found.export.end <= end else None
