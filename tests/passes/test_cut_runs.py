"""Runs that were cut in pieces, by pages that could not be merged, count as those at once."""

import errno
import itertools

import numpy as np

import ksmcore
from helpers.mappings import counted_anew
from helpers.memory import PAGE, random_pages
from ksmcore._testing import faults

N_PAGES, N_WINDOWS = 512, 8
FIRST_OF_WINDOWS = 4  # or one later: what is mapped before depends on the guard


def test_each_window_in_turn_fails(guard, rng):
    """The kernel has no memory for its mapping."""
    source = random_pages(rng, N_PAGES).reshape(N_PAGES, PAGE)
    n_cut = 0
    for after in itertools.count(FIRST_OF_WINDOWS):
        with ksmcore.Engine(guard=guard) as engine:
            arrays = [engine.array(source) for _ in range(2)]
            faults.inject("mmap", errno.ENOMEM, after=after)
            engine.dedup()
            if faults.clear() != 0:
                break
            n_cut += 0 < engine.stats().pages_sharing < N_PAGES
            told = engine.stats().maps_used
            counted = counted_anew(engine)
            # What lies beside the arrays may make one mapping with them, or not.
            assert counted - 2 <= told <= counted + 8
            assert all(np.array_equal(array, source) for array in arrays)
            engine._core.check(are_filed=True)
    assert n_cut >= N_WINDOWS
