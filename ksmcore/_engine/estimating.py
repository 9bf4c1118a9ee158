"""Estimates: how much merging some memory would save at most.

The caller holds the memory meanwhile.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from ksmcore._core.estimate import Tally
from ksmcore._engine.progress import Progress, reporting
from ksmcore._engine.stats import Estimate
from ksmcore._gate.ranges import disjoint

# Pages between two looks at signals.
BATCH_PAGES = 4096


def tally(
    ranges: list[tuple[int, int]],
    page_bytes: int,
    checksum: Literal["jhash", "mmh3"],
    progress: Progress,
    unreached: Mapping[str, int],
) -> Estimate:
    """Count the equal pages in `ranges` of whole pages (address, end), each address once.
    `unreached`: what there was no way to, to be told."""
    counts = Tally(checksum)
    ranges = disjoint(ranges)
    n_pages = sum(end - start for start, end in ranges) // page_bytes
    with reporting(progress, "ksmcore estimate", n_pages) as tell:
        for start, end in ranges:
            addr = counts.pass_hole(start, end)
            while addr < end:
                n = min((end - addr) // page_bytes, BATCH_PAGES)
                counts.add(addr, n)
                tell(counts.n_pages)
                addr = counts.pass_hole(addr + n * page_bytes, end)
            tell(counts.n_pages)
    return Estimate(
        page_bytes=page_bytes,
        pages=counts.n_pages,
        pages_present=counts.n_present,
        pages_zero=counts.n_zero,
        pages_distinct=counts.distinct(),
        unreached=unreached,
    )
