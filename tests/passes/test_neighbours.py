"""Regions that touch are watched together, and passed over together."""

import numpy as np
import pytest

import ksmcore
from helpers.mappings import counted_anew, used_by_others
from helpers.memory import PAGE, octets, random_pages
from helpers.watched import watched_from
from ksmcore._kernel import smaps

N_REGIONS, N_PAGES = 40, 10

pytestmark = pytest.mark.skipif(
    ksmcore.features()["tracking"] is not None, reason="this kernel tracks no writes"
)


@pytest.fixture(autouse=True)
def watched_from_256_pages():
    with watched_from(256):
        yield


_of_others = 0


@pytest.fixture(autouse=True)
def of_others():
    global _of_others
    _of_others = used_by_others()


@pytest.fixture
def parts(engine, rng, private_buffer):
    """Arrays side by side, of different pages, all of them quiet."""
    everything = octets(private_buffer(N_REGIONS * N_PAGES))
    everything[:] = random_pages(rng, N_REGIONS * N_PAGES)
    parts = [part.reshape(N_PAGES, PAGE) for part in np.split(everything, N_REGIONS)]
    for part in parts:
        engine.register(part)
    for _ in range(3):
        engine.scan()
    return parts


def watched(parts):
    """How many mappings are watched: asked of the kernel."""
    addr = parts[0].ctypes.data
    vmas = smaps.vmas_in(addr, addr + N_REGIONS * N_PAGES * PAGE)
    return sum("uw" in vma.flags for vma in vmas)


def hashed_by(engine):
    return engine.scan().pages_hashed


def maps_used(engine):
    """As the engine goes on from what it did, and as it counts them anew: the same."""
    used = engine.stats().maps_used
    assert counted_anew(engine) == used
    return used - _of_others


def test_they_are_one_mapping_and_are_not_read_again(engine, parts):
    assert engine.stats().pages_quiet == N_REGIONS * N_PAGES
    assert watched(parts) == 1
    assert maps_used(engine) == 2
    report = engine.scan()
    assert (report.pages_hashed, report.pages_scanned) == (0, N_REGIONS * N_PAGES)
    engine._core.check()


@pytest.mark.parametrize("which", [[0], [17], [39], [0, 39], [3, 4, 20], list(range(40))])
def test_what_is_written_is_seen(engine, parts, which):
    for n in which:
        parts[n][n % N_PAGES, 5] ^= 1
    # Changed; unchanged; protected and read once more.
    assert [hashed_by(engine) for _ in range(4)] == [len(which)] * 3 + [0]
    assert engine.stats().pages_quiet == N_REGIONS * N_PAGES


def test_what_was_written_in_one_is_merged_with_another(engine, parts):
    parts[30][:] = parts[7]
    for _ in range(2):
        engine.scan()
    assert engine.stats().pages_sharing == N_PAGES
    assert np.array_equal(parts[30], parts[7])
    parts[30][2, 2] ^= 1
    engine.scan()
    assert engine.stats().pages_sharing == N_PAGES - 1
    assert not np.array_equal(parts[30], parts[7])
    engine._core.check()


def test_one_that_is_held_is_told_of(engine, parts):
    with engine.hold(parts[20]):
        parts[20][0, 0] ^= 1
        report = engine.scan()
        assert report.skipped["held"] == N_PAGES
        assert report.pages_scanned == (N_REGIONS - 1) * N_PAGES
    assert hashed_by(engine) == 1


def test_one_that_goes_leaves_two_groups(engine, parts):
    engine.unregister(parts[20])
    assert watched(parts) == 2
    assert maps_used(engine) == 4
    parts[20][:] ^= 1
    assert hashed_by(engine) == 0
    # The end of a group, and the whole of what was between two.
    for n in (0, 39, 19, 21, 22):
        engine.unregister(parts[n])
    assert watched(parts) == 2
    assert maps_used(engine) == 4
    for n in range(23, 39):
        engine.unregister(parts[n])
    assert watched(parts) == 1
    assert maps_used(engine) == 2
    # Another comes back: it is no neighbour of anybody, and too small to be watched alone.
    engine.register(parts[30])
    for _ in range(4):
        engine.scan()
    assert watched(parts) == 1
    assert maps_used(engine) == 2
    # One that fills a gap is watched along.
    engine.register(parts[19])
    for _ in range(4):
        engine.scan()
    assert hashed_by(engine) <= N_PAGES  # the one that is alone
    assert watched(parts) == 1
    assert maps_used(engine) == 2


def test_so_few_pages_are_not_watched(engine, rng, private_buffer):
    everything = octets(private_buffer(20 * N_PAGES))
    everything[:] = random_pages(rng, 20 * N_PAGES)
    for part in np.split(everything, 20):
        engine.register(part)
    for _ in range(4):
        engine.scan()
    assert engine.stats().pages_quiet == 0
    assert maps_used(engine) == 0


def test_a_random_walk_counts_as_the_kernel_does(engine, parts, rng):
    registered = set(range(N_REGIONS))
    for _ in range(60):
        n = int(rng.integers(N_REGIONS))
        if n in registered:
            engine.unregister(parts[n])
        else:
            engine.register(parts[n])
        registered ^= {n}
        parts[n][:, 0] ^= 1
        engine.scan()
        assert maps_used(engine) == 2 * watched(parts)
    engine._core.check()
