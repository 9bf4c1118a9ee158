"""Small regions apart from each other: watched where mappings are to spare, and else read."""

import pytest

import ksmcore
from helpers.mappings import used_by_others
from helpers.memory import PAGE, octets, random_pages
from helpers.watched import watched_from
from ksmcore._kernel import smaps

N_REGIONS, N_PAGES = 24, 6
# One part in so many of the budget is spared for what saves no memory, see budget.pyx.
SPARE_SHARE = 4

pytestmark = pytest.mark.skipif(
    ksmcore.features()["tracking"] is not None, reason="this kernel tracks no writes"
)


@pytest.fixture(autouse=True)
def watched_as_by_default():
    with watched_from(4):
        yield


@pytest.fixture
def of_others():
    return used_by_others()


@pytest.fixture
def apart(rng, private_buffer):
    """Parts of one mapping, of different pages; between two of them a page of nobody's."""
    stride = N_PAGES + 1
    everything = octets(private_buffer(N_REGIONS * stride))
    everything[:] = random_pages(rng, N_REGIONS * stride)
    return [everything[i * stride * PAGE :][: N_PAGES * PAGE] for i in range(N_REGIONS)]


def n_watched(parts):
    """How many of them are watched: asked of the kernel."""
    return sum(
        "uw" in smaps.vmas_in(part.ctypes.data, part.ctypes.data + PAGE)[0].flags for part in parts
    )


def become_quiet(engine, parts):
    for part in parts:
        engine.register(part)
    for _ in range(3):
        engine.scan()


def test_they_are_watched_and_not_read_again(engine, apart):
    become_quiet(engine, apart)
    assert n_watched(apart) == N_REGIONS
    assert engine.scan().pages_hashed == 0
    apart[3][PAGE] += 1
    assert engine.scan().pages_hashed == 1


def test_smaller_ones_are_read(engine, apart):
    become_quiet(engine, [part[: 3 * PAGE] for part in apart])
    assert n_watched(apart) == 0
    assert engine.scan().pages_hashed == 3 * N_REGIONS


def test_they_take_a_part_of_the_budget_only(of_others, apart):
    spared = 2 * (N_REGIONS // 2)
    with ksmcore.Engine(map_budget=SPARE_SHARE * (of_others + spared)) as engine:
        become_quiet(engine, apart)
        assert n_watched(apart) == spared // 2
        assert engine.scan().pages_hashed == (N_REGIONS - spared // 2) * N_PAGES
        # The rest is there for what saves memory: each becomes the copy of one before it.
        for even, odd in zip(apart[::2], apart[1::2], strict=True):
            odd[:] = even
        engine.dedup()
        assert engine.stats().pages_sharing == N_REGIONS // 2 * N_PAGES
        engine._core.check(are_filed=True)


def test_a_large_one_has_more_of_it(of_others, rng, private_buffer):
    array = octets(private_buffer(300))
    array[:] = random_pages(rng, 300)
    # A quarter of this is one mapping, of the two that it takes to watch the array.
    with ksmcore.Engine(map_budget=of_others + SPARE_SHARE) as engine:
        become_quiet(engine, [array])
        assert n_watched([array]) == 1
