"""Runs that were cut in pieces, by pages that could not be merged, count as those at once."""

import errno

import numpy as np
import pytest

from helpers.mappings import counted_anew
from helpers.memory import PAGE, random_pages
from ksmcore._testing import faults

N_PAGES = 512


@pytest.mark.parametrize("after", range(5, 13))
def test_a_window_in_the_midst_that_fails(engine, rng, after):
    """Each window of the two runs in turn: the kernel has no memory for its mapping."""
    source = random_pages(rng, N_PAGES).reshape(N_PAGES, PAGE)
    arrays = [engine.array(source) for _ in range(2)]
    faults.inject("mmap", errno.ENOMEM, after=after)
    engine.dedup()
    assert faults.clear() == 0
    assert 0 < engine.stats().pages_sharing < N_PAGES
    told = engine.stats().maps_used
    counted = counted_anew(engine)
    assert counted <= told <= counted + 8
    assert all(np.array_equal(array, source) for array in arrays)
    engine._core.check(are_filed=True)
