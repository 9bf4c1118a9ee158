"""smart_scan: pages that find no partner are looked at less often, and yet all equal pages meet."""

import numpy as np
import pytest

import ksmcore
from helpers.memory import PAGE


@pytest.fixture
def smart():
    """By checksums, since pages that the kernel watches are not read anyway."""
    with ksmcore.Engine(smart_scan=True, dirty="checksum") as engine:
        yield engine
        engine._core.check()


def unique(engine, rng, n=32):
    array = engine.empty((n, PAGE), np.uint8)
    array[:] = rng.integers(0, 256, array.shape, dtype=np.uint8)
    return array


def looks(engine, n_passes):
    """Pages read in each of so many passes."""
    return [engine.scan().pages_hashed for _ in range(n_passes)]


def test_how_often_a_page_is_looked_at(smart, rng):
    """Three times in vain (after the pass that first saw it), then in every second, fourth and
    eighth pass; passes are counted by full_scans."""
    array = unique(smart, rng)
    read = looks(smart, 41)
    assert [n for n, count in enumerate(read) if count] == [0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 40]
    assert set(read) == {0, len(array)}
    skipped = smart.stats().skipped["smart_scan"]
    assert skipped == len(array) * read.count(0)
    assert smart.stats().pages_unshared == len(array)


def test_off_nothing_is_skipped(rng):
    with ksmcore.Engine(dirty="checksum") as engine:
        array = unique(engine, rng)
        assert looks(engine, 20) == [len(array)] * 20
        assert engine.stats().skipped["smart_scan"] == 0


def test_it_can_be_switched_while_running(smart, rng):
    array = unique(smart, rng)
    looks(smart, 18)
    smart.configure(smart_scan=False)
    assert looks(smart, 3) == [len(array)] * 3
    smart.configure(smart_scan=True)
    assert looks(smart, 3) == [0] * 3


def test_a_change_makes_young_again(smart, rng):
    array = unique(smart, rng)
    looks(smart, 25)
    array[5] = 77
    read = looks(smart, 8)  # it is seen when its turn comes, with the others
    assert read == [0] * 7 + [len(array)]
    read = looks(smart, 6)
    assert read == [1, 1, 1, 1, 0, 1]


def test_a_merge_makes_young_again(smart, rng):
    array = unique(smart, rng, 1)
    looks(smart, 30)
    twin = smart.array(array)
    looks(smart, 12)
    assert smart.stats().pages_sharing == 1
    twin[0, 0] += 1
    # Broken, changed, and then looked at in every pass for as long as a new page.
    assert looks(smart, 4) == [1, 1, 1, 1]
    assert array.any()


@pytest.mark.parametrize("gap", range(24))
def test_equal_pages_of_any_ages_meet(smart, rng, gap):
    """Within two rounds of the longest period, also where nothing is shared yet."""
    array = unique(smart, rng, 4)
    looks(smart, 20 + gap % 3)
    twins = []
    for _ in range(gap):
        smart.scan()
    twins.append(smart.array(array))
    looks(smart, 18)
    assert smart.stats().pages_sharing == 4
    assert np.array_equal(array, twins[0])


def test_dedup_leaves_nothing_out(smart, rng):
    array = unique(smart, rng)
    looks(smart, 30)
    twin = smart.array(array)
    assert smart.dedup().pages_merged == 2 * len(array)
    assert np.array_equal(array, twin)
