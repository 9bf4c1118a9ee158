"""How much a number of mappings could save at best: exactly for a few pages, by a bound for many.

    python -m bench.map_oracle [--cases 12] [--pages 7]

Compares the engine with the best way, found by trying all, for a few pages of random contents and
every small map budget.

The model: pages in a row, with plain ones around them. Each is left plain, or laid over a slot of
the store that has its content; a content may have several slots. A mapping ends between two pages
unless both are plain, or lie over slots that follow each other. What is saved: the pages over the
store, less the slots.
"""

from __future__ import annotations

import argparse
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

import ksmcore
from bench.corpora import PAGE, SEED


def at_most(contents: Sequence[int], n_maps: int) -> int:
    """A bound for the pages that can be saved with so many mappings more.

    A slot has one other behind it. So of the pages over it no mapping ends behind those that pages
    of one same content follow, and behind each of the others one does: of a group of n pages that
    are followed by the same content, n - 1 may be saved for nothing (one for the slot), and
    whatever else is saved takes a mapping each, at least.
    """
    followed = Counter(itertools.pairwise(contents))
    counts = Counter(contents)
    in_groups = sum(n - 1 for n in followed.values())
    return min(in_groups + n_maps, sum(n - 1 for n in counts.values()))


# ---- the best of all ---------------------------------------------------------------------------


def _slots(contents: Sequence[int], merged: Sequence[int]) -> Iterator[dict[int, tuple[int, int]]]:
    """All ways to give the merged pages slots of their contents: (content, which of its slots)."""
    by_content: dict[int, list[int]] = {}
    for page in merged:
        by_content.setdefault(contents[page], []).append(page)
    ways = [
        [
            {page: (content, number) for page, number in zip(pages, numbers, strict=True)}
            for numbers in itertools.product(range(len(pages)), repeat=len(pages))
            # Slots are numbered in the order in which they are met: each way once.
            if all(number <= max(numbers[:i], default=-1) + 1 for i, number in enumerate(numbers))
        ]
        for content, pages in by_content.items()
    ]
    for way in itertools.product(*ways):
        yield {page: slot for part in way for page, slot in part.items()}


def _most_joined(wanted: Counter[tuple[object, object]]) -> int:
    """The most pairs of neighbours whose slots can follow each other, each slot having one
    place in the store."""
    best = 0
    pairs = list(wanted)
    for chosen in itertools.product((False, True), repeat=len(pairs)):
        after = {}
        before = set()
        n = 0
        for (first, second), is_chosen in zip(pairs, chosen, strict=True):
            if is_chosen and first not in after and second not in before and first != second:
                after[first] = second
                before.add(second)
                n += wanted[first, second]
            elif is_chosen:
                break
        else:
            if n > best and not _has_circle(after):
                best = n
    return best


def _has_circle(after: dict[object, object]) -> bool:
    for first in after:
        at = after[first]
        while at in after and at != first:
            at = after[at]
        if at == first:
            return True
    return False


def best(contents: Sequence[int]) -> dict[int, int]:
    """The most pages that can be saved, for each number of mappings more that it may take."""
    n_pages = len(contents)
    most: dict[int, int] = {0: 0}
    for n in range(2, n_pages + 1):
        for merged in itertools.combinations(range(n_pages), n):
            over_store = set(merged)
            # Ends of stretches over the store, and ends between two pages of one.
            outer = sum(page - 1 not in over_store for page in merged)
            inner = [page for page in merged if page + 1 in over_store]
            for slots in _slots(contents, merged):
                saved = n - len(set(slots.values()))
                if saved <= most[0]:
                    continue
                wanted = Counter((slots[page], slots[page + 1]) for page in inner)
                cost = 2 * outer + len(inner) - _most_joined(wanted)
                most[cost] = max(most.get(cost, 0), saved)
    return most


def saved_by_engine(contents: Sequence[int], n_maps: int) -> int:
    """In pages, once passes find nothing more to merge."""
    around = [10**6, *(content + 1 for content in contents), 10**6 + 1]
    with ksmcore.Engine(map_budget=n_maps) as engine:
        pages = engine.zeros((len(around), PAGE // 8), np.uint64)
        pages[:, -1] = around
        for _ in range(12):
            engine.scan()
        return engine.stats().bytes_saved // PAGE


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=12)
    parser.add_argument("--pages", type=int, default=7)
    args = parser.parse_args()
    rng = np.random.default_rng(SEED)
    total: Counter[str] = Counter()
    print(f"{'contents':<24}{'mappings':>9}{'saved':>7}{'best':>6}{'bound':>7}")
    for _ in range(args.cases):
        contents = [int(one) for one in rng.integers(0, 3, args.pages)]
        by_cost = best(contents)
        for n_maps in range(2, args.pages + 2):
            could = max(saved for cost, saved in by_cost.items() if cost <= n_maps)
            saved = saved_by_engine(contents, n_maps)
            bound = at_most(contents, n_maps)
            if not saved <= could <= bound:
                raise AssertionError(f"{contents}, {n_maps}: {saved} <= {could} <= {bound}")
            total.update(saved=saved, best=could)
            print(f"{contents!s:<24}{n_maps:>9}{saved:>7}{could:>6}{bound:>7}")
    print(f"all: {total['saved']} of {total['best']} pages, {total['saved'] / total['best']:.0%}")


if __name__ == "__main__":
    main()
