"""What is moved keeps its bytes: merged memory that changes places behind the engine's back.

After each move the engine is given every reason to release and to hand out again what it may: the
others that shared the moved pages are written, passes are made, and new contents come that want
slots.
"""

import mmap
import os
import threading

import numpy as np
import pytest

import ksmcore
from helpers.loose import MREMAP_DONTUNMAP, Loose, call, map_at, move, rotate, under_a_gap
from helpers.memory import PAGE
from ksmcore._testing import faults

N = 64


@pytest.fixture
def guard(each_guard):
    return each_guard


def contents(rng, n, n_pages=N):
    return [rng.integers(1, 256, (n_pages, PAGE), dtype=np.uint8) for _ in range(n)]


def pairs(engine, sources, addr=0):
    """Two loose buffers with each of these contents, merged; the second ones one after the other
    from `addr` on, if it is not 0."""
    made = [
        (Loose(source), Loose(source, addr and addr + n * source.nbytes))
        for n, source in enumerate(sources)
    ]
    regions = [engine.register(one.pages) for both in made for one in both]
    report = engine.dedup()
    assert report.pages_merged == 2 * sum(len(source) for source in sources)
    return made, regions


def want_slots(engine, rng, expected, passes=2):
    """Passes, and new contents that are merged; all that is in `expected` keeps its bytes."""
    for _ in range(passes):
        engine.scan()
        engine._core.check()
        (new,) = contents(rng, 1)
        twins = [engine.array(new), engine.array(new)]
        assert engine.dedup(*twins).pages_merged == 2 * N
        for pages, source in expected:
            assert np.array_equal(pages, source)
        assert all(np.array_equal(twin, new) for twin in twins)


def give_up(engine, made, regions):
    """Everything is taken back, with its bytes."""
    buffers = [one for both in made for one in both]
    before = [one.pages.copy() for one in buffers]
    for region in regions:
        region.close()
    for one, kept in zip(buffers, before, strict=True):
        assert np.array_equal(one.pages, kept)
        one.unmap()
    engine._core.check()


@pytest.mark.parametrize("n_moved", [2, 3])
@pytest.mark.parametrize("pages", [slice(0, N), slice(10, 20), slice(0, 1), slice(N - 1, N)])
def test_merged_buffers_change_places(engine, rng, n_moved, pages):
    sources = contents(rng, n_moved)
    made, regions = pairs(engine, sources)
    seconds = [second for _, second in made]
    rotate(*seconds, pages=pages)
    expected = [source.copy() for source in sources]
    for n in range(n_moved):
        expected[n][pages] = sources[n - 1][pages]
    shown = list(zip([one.pages for one in seconds], expected, strict=True))
    assert all(np.array_equal(one, wanted) for one, wanted in shown)
    for first, _ in made:
        first.pages[:] = 1
    want_slots(engine, rng, shown)
    seconds[0].pages[:] = 2
    want_slots(engine, rng, shown[1:])
    give_up(engine, made, regions)


def test_what_changed_places_is_released_once_it_is_written(engine, rng):
    """All mappings are accounted for: nothing is kept for ever."""
    made, regions = pairs(engine, contents(rng, 3))
    rotate(*(second for _, second in made))
    engine.scan()
    for one in (one for both in made for one in both):
        one.pages[:] = rng.integers(1, 256, one.pages.shape, dtype=np.uint8)
        engine.scan()
    assert engine.stats().store_pages == 0
    assert os.fstat(engine._core.store_fd).st_blocks == 0
    give_up(engine, made, regions)


@pytest.mark.parametrize("first", ["scan", "dedup", "close", "unmerge"])
def test_whatever_looks_first(engine, rng, first):
    sources = contents(rng, 2)
    made, regions = pairs(engine, sources)
    (a, moved_a), (b, moved_b) = made
    rotate(moved_a, moved_b)
    a.pages[:] = 1
    moved_a.pages[:] = 2
    if first == "close":
        regions[0].close()
        regions[1].close()
    else:
        getattr(engine, first)()
    want_slots(engine, rng, [(moved_b.pages, sources[0]), (b.pages, sources[1])])
    assert (a.pages == 1).all()
    assert (moved_a.pages == 2).all()
    give_up(engine, made, regions)


def test_copies_of_what_changed_places(engine, rng):
    sources = contents(rng, 2)
    made, regions = pairs(engine, sources)
    rotate(made[0][1], made[1][1])
    made[1][1].pages[5] = 9
    copies = [engine.copy(one.pages) for _, one in made]
    assert np.array_equal(copies[0], sources[1])
    assert np.array_equal(np.delete(copies[1], 5, 0), np.delete(sources[0], 5, 0))
    assert (copies[1][5] == 9).all()
    for both in made:
        for one in both:
            one.pages[:] = 3
    want_slots(engine, rng, [(copies[0], sources[1])])
    give_up(engine, made, regions)


def test_memory_that_is_given_back_after_it_changed_places(engine, rng):
    """An array of the engine's own, unmapped by its owner, with another's pages in its place."""
    sources = contents(rng, 2)
    made, regions = pairs(engine, sources[1:])
    array = engine.array(sources[0])
    partner = engine.array(sources[0])
    assert engine.dedup().pages_merged == 2 * N
    inside = Loose.__new__(Loose)
    inside.addr, inside.n_pages = array.ctypes.data, N
    rotate(inside, made[0][1])
    assert np.array_equal(made[0][1].pages, sources[0])
    assert np.array_equal(array, sources[1])
    del array, partner
    shown = [(made[0][1].pages, sources[0]), (made[0][0].pages, sources[1])]
    want_slots(engine, rng, shown)
    give_up(engine, made, regions)


@pytest.mark.parametrize("same", [True, False])
def test_a_part_is_moved_onto_another(engine, rng, same):
    """What was there is gone, and what it leaves is a hole."""
    sources = contents(rng, 2)
    made, regions = pairs(engine, sources)
    (a, moved_a), (b, moved_b) = made
    target = moved_a if same else moved_b
    move(moved_a.at(3), target.at(40), 10)
    expected = sources[0 if same else 1].copy()
    expected[40:50] = sources[0][3:13]
    for one in (a, b):
        one.pages[:] = 1
    want_slots(engine, rng, [] if same else [(target.pages, expected)])
    for page in [*range(3), *range(13, N)]:
        assert np.array_equal(target.pages[page], expected[page])
    for region in (regions[0], regions[2], regions[3]):
        region.close()
    regions[1].close()
    for both in made:
        for one in both:
            one.unmap()


@pytest.mark.parametrize("read", [True, False])
@pytest.mark.parametrize("registered", [True, False])
def test_a_mapping_that_stays_where_it_was_moved_from(engine, rng, read, registered):
    """MREMAP_DONTUNMAP leaves the mapping and takes its pages: two show the slot from then on."""
    sources = contents(rng, 2)
    made, regions = pairs(engine, sources)
    (a, moved_a), (b, moved_b) = made
    if read:
        assert np.array_equal(moved_a.pages, sources[0])
    target = moved_b.addr if registered else map_at(0, N)
    move(moved_a.addr, target, N, MREMAP_DONTUNMAP)
    twin = moved_a.view(target)
    a.pages[:] = 1
    shown = [(twin, sources[0]), (b.pages, sources[1]), (moved_a.pages, sources[0])]
    want_slots(engine, rng, shown)
    moved_a.pages[:] = 2
    want_slots(engine, rng, shown[:2])
    give_up(engine, made, regions)
    if not registered:
        call("munmap", target, N * PAGE)


@pytest.mark.parametrize("then", ["scan", "close", "merge"])
@pytest.mark.parametrize("stays", [True, False])
def test_no_slot_is_handed_out_that_lies_under_what_was_moved_a_moment_ago(
    engine, rng, stays, then
):
    """Private copies over slots that were released: were they given up, the slots would show."""
    (source, other, secret) = contents(rng, 3)
    a, b = Loose(source), Loose(source)
    regions = [engine.register(one.pages) for one in (a, b)]
    assert engine.dedup().pages_merged == 2 * N
    a.pages[:], b.pages[:] = contents(rng, 2)
    regions[0].close()
    engine.scan()
    assert engine.stats().pages_sharing == 0
    target = under_a_gap(N)
    kept = b.pages.copy()
    move(b.addr, target, N, MREMAP_DONTUNMAP if stays else 0)
    if not stays:
        map_at(b.addr, N)
    if then == "scan":
        engine.scan()
    elif then == "close":
        regions[1].close()
    else:
        b.pages[:] = other
        twin = engine.array(other)
        engine.dedup()
        assert np.array_equal(twin, b.pages)
    new = [engine.array(secret), engine.array(secret)]
    assert engine.dedup(*new).pages_merged == 2 * N
    there = b.view(target)
    assert np.array_equal(there, kept)
    call("madvise", target, N * PAGE, mmap.MADV_DONTNEED)
    assert not there.any()
    engine._core.check()
    call("munmap", target, N * PAGE)


@pytest.mark.parametrize("presence", ["pagemap", "mincore"])
@pytest.mark.parametrize("read", [True, False])
def test_equal_buffers_change_places(guard, rng, read, presence):
    """Every page lies over the same slot as before; but others are private copies now."""
    (source,) = contents(rng, 1)
    if presence == "mincore":
        # Of what an engine opens: the mappings, twice, and then the page map.
        faults.inject("open", 13, count=3)
    with ksmcore.Engine(guard=guard) as engine:
        faults.clear()
        assert engine.stats().presence == presence
        made, regions = pairs(engine, [source])
        a, b = made[0]
        a.pages[::2] = 1
        engine.scan()
        rotate(a, b)
        if read:
            assert np.array_equal(a.pages, source)
        b.pages[1::2] = 2
        for _ in range(3):
            engine.scan()
        want_slots(engine, rng, [(a.pages, source)])
        assert (b.pages[::2] == 1).all()
        assert (b.pages[1::2] == 2).all()
        give_up(engine, made, regions)


def test_equal_buffers_change_places_in_the_middle_of_a_pass(engine, rng):
    """A page is seen as a private copy, and then the next one is, because it is the same."""
    (source,) = contents(rng, 1, 8192)
    made, regions = pairs(engine, [source])
    first, second = sorted(made[0], key=lambda one: one.addr)
    first.pages[:64] = 1
    swapped = []

    def swap(done, total):
        # The first buffer has been looked at, the second has not.
        if done >= 8192 and not swapped:
            rotate(first, second)
            swapped.append(done)

    engine.scan(progress=swap)
    assert swapped
    for _ in range(2):
        engine.scan()
    want_slots(engine, rng, [(first.pages, source)])
    assert (second.pages[:64] == 1).all()
    assert np.array_equal(second.pages[64:], source[64:])
    give_up(engine, made, regions)


def test_a_copy_that_the_program_throws_away_shows_nobody_elses_bytes(engine, rng):
    """The slot under it has been released since, and others have come."""
    source, one, other = contents(rng, 3)
    made, regions = pairs(engine, [source])
    a, b = made[0]
    a.pages[:] = one
    b.pages[:] = other
    engine.scan()
    assert engine.stats().store_pages == 0
    want_slots(engine, rng, [(a.pages, one)], passes=1)
    call("madvise", a.addr, N * PAGE, 4)
    assert not a.pages.any()
    want_slots(engine, rng, [(b.pages, other)])
    assert not a.pages.any()
    give_up(engine, made, regions)


def test_a_thread_that_swaps_without_pause(engine, rng):
    """Against passes without pause, in which the others that share give up, and others come. What
    it swaps it reads."""
    sources = contents(rng, 2)
    addr = under_a_gap(3 * N)
    made, regions = pairs(engine, sources, addr)
    (a, moved_a), (b, moved_b) = made
    aside = addr + 2 * N * PAGE
    stop = threading.Event()
    wrong: list[int] = []
    swaps: list[int] = []

    def swap() -> None:
        shown = [sources[1], sources[0]]
        while not stop.is_set():
            for source, target in (
                (moved_a.addr, aside),
                (moved_b.addr, moved_a.addr),
                (aside, moved_b.addr),
            ):
                call("mremap", source, N * PAGE, N * PAGE, 3, target)
            swaps.append(1)
            if not all(
                np.array_equal(one.pages, source)
                for one, source in zip((moved_a, moved_b), shown, strict=True)
            ):
                wrong.append(len(swaps))
                return
            shown.reverse()

    swapper = threading.Thread(target=swap)
    swapper.start()
    try:
        for n in range(60):
            for one in (a, b):
                one.pages[:] = rng.integers(1, 256, one.pages.shape, dtype=np.uint8)
            (engine.scan if n % 2 else engine.dedup)()
            (new,) = contents(rng, 1)
            twins = [engine.array(new), engine.array(new)]
            engine.dedup(*twins)
            if n % 3 == 0:
                a.pages[:], b.pages[:] = sources
                engine.dedup()
            engine._core.check()
    finally:
        stop.set()
        swapper.join()
    assert wrong == []
    assert len(swaps) > 60
    give_up(engine, made, regions)


def store_pages(engine):
    """Pages of memory that the kernel counts for the store."""
    return sum(os.fstat(fd).st_blocks for fd in engine._core.store_fds) * 512 // PAGE


def test_what_the_program_has_replaced_comes_back(engine, rng):
    """New memory in place of merged memory, which counts as new contents of the region."""
    made, regions = pairs(engine, contents(rng, 1))
    for _ in range(20):
        (source,) = contents(rng, 1)
        for one in made[0]:
            map_at(one.addr, N)
            one.pages[:] = source
        engine.dedup()
        assert engine.stats().pages_sharing == N
        engine._core.check()
    engine.scan()
    engine.scan()
    assert store_pages(engine) == engine.stats().store_pages == N
    give_up(engine, made, regions)


@pytest.mark.parametrize("read", [True, False])
def test_what_was_moved_away_comes_back_once_it_is_mapped_nowhere(engine, rng, read):
    (source,) = contents(rng, 1)
    ((a, moved),), regions = pairs(engine, [source])
    target = map_at(0, N)
    move(moved.addr, target, N)
    map_at(moved.addr, N)
    there = moved.view(target)
    a.pages[:] = 1
    expected = [(there, source)] if read else []
    want_slots(engine, rng, expected, passes=4)
    assert np.array_equal(there, source)
    assert store_pages(engine) >= N
    call("munmap", target, N * PAGE)
    a.pages[:] = moved.pages[:] = contents(rng, 1)[0]
    for _ in range(4):
        engine.scan()
    assert store_pages(engine) == engine.stats().store_pages == N
    engine._core.check()
    give_up(engine, [(a, moved)], regions)
