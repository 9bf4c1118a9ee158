"""Areas: what is registered with one ends with it, exactly that, in any thread."""

import gc
import threading

import numpy as np
import pytest

import ksmcore


@pytest.fixture
def buffers(private_buffer):
    """Makes n buffers with the same bytes."""

    def make(n, n_pages=4):
        made = [private_buffer(n_pages) for _ in range(n)]
        for buffer in made:
            np.frombuffer(buffer, np.uint8)[:] = np.arange(n_pages).repeat(4096) + 1
        return made

    return make


def test_close_removes_exactly_its_regions(engine, buffers):
    ours, theirs, own = buffers(2), buffers(2), buffers(1)
    first, second = engine.area(), engine.area()
    regions = [first.register(buffer) for buffer in ours]
    others = [second.register(buffer) for buffer in theirs]
    region = engine.register(own[0])
    engine.dedup()
    assert engine.stats().pages_sharing == 16
    assert first.regions == tuple(sorted(regions, key=lambda r: r.addr))
    first.close()
    assert all(region.closed for region in regions)
    assert not any(region.closed for region in [*others, region])
    assert engine.stats().regions == 3
    assert engine.stats().pages_sharing == 8
    assert first.regions == ()
    first.close()
    with pytest.raises(ValueError, match="area is closed"):
        first.register(own[0])
    for buffer in [*ours, *theirs]:
        assert bytes(buffer) == bytes(own[0])


def test_it_gives_no_control():
    names = {name for name in dir(ksmcore.Area) if not name.startswith("_")}
    assert names == {"close", "closed", "register", "regions", "stats", "unreached"}


def test_with(engine, buffers):
    with engine.area() as area:
        region = area.register(buffers(1)[0])
        assert "1 regions" in repr(area)
    assert region.closed
    assert area.closed
    assert "closed" in repr(area)


@pytest.mark.parametrize("in_thread", [False, True])
def test_collected(engine, buffers, in_thread):
    def work():
        area = engine.area()
        for buffer in buffers(3):
            area.register(buffer)
        area.itself = area  # only a collection finds it
        engine.dedup()
        assert engine.stats().pages_sharing == 8
        del area
        gc.collect()

    if in_thread:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    else:
        work()
    assert engine.stats().regions == 0
    assert engine.stats().pages_shared == 0


def test_a_region_may_end_before_its_area(engine, buffers):
    area = engine.area()
    first, second = (area.register(buffer) for buffer in buffers(2))
    first.close()
    assert area.regions == (second,)
    area.close()
    assert second.closed


def test_a_held_region_stays_and_the_others_go(engine, buffers):
    area = engine.area()
    held, other = (area.register(buffer) for buffer in buffers(2))
    engine.dedup()
    with held.hold():
        with pytest.raises(RuntimeError, match="held"):
            area.close()
        assert other.closed
        assert not held.closed
        assert not area.closed
    area.close()
    assert held.closed


def test_stats_add_up(engine, buffers):
    first, second = engine.area(), engine.area()
    for area, n in ((first, 1), (second, 3)):
        for buffer in buffers(n):
            area.register(buffer)
    zeros = engine.area()
    [blank] = buffers(1)
    np.frombuffer(blank, np.uint8)[:] = 0
    zeros.register(blank)
    engine.dedup()
    stats = engine.stats()
    each = [area.stats() for area in (first, second, zeros)]
    assert [one.pages for one in each] == [4, 12, 4]
    assert [one.pages_merged for one in each] == [4, 12, 0]
    assert [one.ksm_zero_pages for one in each] == [0, 0, 4]
    assert each[0].pages_saved == pytest.approx(4 * 3 / 4)
    saved = sum(one.pages_saved for one in each)
    assert saved * stats.page_bytes == pytest.approx(stats.bytes_saved)
    np.frombuffer(blank, np.uint8)[0] = 1
    second.regions[0]._view()[0] = 99
    engine.scan()
    assert second.stats().cow_breaks == second.regions[0].stats().cow_breaks == 1
    assert first.stats().cow_breaks == 0
    assert second.stats().as_dict()["pages_volatile"] == 1
    assert "11 merged" in repr(second.stats())


def test_closed_regions_are_not_kept(engine, buffers):
    [buffer] = buffers(1)
    area = engine.area()
    for _ in range(200):
        area.register(buffer).close()
    assert len(area._regions) < 40
    area.close()


def test_from_many_threads(engine, buffers):
    """Areas come and go while the scanner runs; what they leave is nothing."""
    made = buffers(32, 2)
    failed = []

    def work(mine):
        try:
            for _ in range(10):
                with engine.area() as area:
                    for buffer in mine:
                        area.register(buffer)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(made[k::4],)) for k in range(4)]
    with engine.start(sleep_millisecs=0):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failed
    assert engine.stats().regions == engine.stats().pages_shared == 0


def test_two_engines_never_share(buffers):
    with ksmcore.Engine() as one, ksmcore.Engine() as other:
        first, second = buffers(2)
        one.register(first)
        other.register(second)
        for engine in (one, other, one, other):
            engine.dedup()
            engine.scan()
        assert one.stats().pages_shared == other.stats().pages_shared == 0
