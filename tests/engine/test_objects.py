"""Any object in one call: registered, merged, held, estimated, given back, and what is left out."""

import gc
import mmap

import numpy as np
import pytest

import ksmcore
from helpers.kernels_view import is_plain, store_bytes
from helpers.memory import PAGE, extent, private_memory, random_pages

N_PAGES = 24


def pages(engine, seed=1, n_pages=N_PAGES):
    """Random pages at the beginning of a page, not registered."""
    memory = np.frombuffer(private_memory(n_pages), np.uint8)
    memory[:] = random_pages(seed, n_pages)
    return memory


@pytest.fixture
def model(engine):
    """Two equal arrays, and one more, in an object."""
    return {"a": pages(engine), "rest": [pages(engine), {"c": pages(engine, 2)}], "name": "x"}


def arrays_of(model):
    return [model["a"], model["rest"][0], model["rest"][1]["c"]]


# --- in and out -----------------------------------------------------------------------------------


def test_register_gives_an_area(engine, model):
    before = [array.tobytes() for array in arrays_of(model)]
    area = engine.register(model)
    assert isinstance(area, ksmcore.Area)
    assert {(r.addr, r.addr + r.nbytes) for r in area.regions} == set(map(extent, arrays_of(model)))
    assert area.unreached == {}
    report = engine.dedup()
    assert report.pages_merged == 2 * N_PAGES
    assert store_bytes(*extent(model["a"])) == N_PAGES * PAGE
    area.close()
    assert engine.regions == ()
    assert all(is_plain(*extent(array)) for array in arrays_of(model))
    assert [array.tobytes() for array in arrays_of(model)] == before


def test_it_stays_registered_without_the_area(engine, model):
    engine.register(model)
    gc.collect()
    assert engine.stats().regions == 3


def test_with_registers_for_a_block(engine, model):
    with engine.register(model) as area:
        assert engine.stats().regions == 3
    assert area.closed
    assert engine.stats().regions == 0


def test_unregister_by_object_area_and_part(engine, model):
    area = engine.register(model)
    engine.unregister(model["rest"])
    assert engine.stats().regions == 1
    assert len(area.regions) == 1
    engine.unregister(area)
    assert engine.stats().regions == 0
    with pytest.raises(ValueError, match="nothing of this"):
        engine.unregister(model)
    engine.dedup(model)
    engine.unregister(model)
    assert engine.stats().regions == 0


def test_of_another_engine(engine, model):
    other = ksmcore.Engine()
    try:
        area = other.register(model["rest"])
        with pytest.raises(ValueError, match="another engine"):
            engine.unregister(area)
        mine = engine.register(model)
        assert len(mine.regions) == 1
        assert mine.unreached == {"ndarray: registered with another engine": 2}
        assert engine.dedup(model).unreached == {"ndarray: registered with another engine": 2}
        ksmcore.unregister(area)
        assert other.stats().regions == 0
    finally:
        other.close()


def test_twice_is_an_error_and_more_is_not(engine, model):
    engine.register(model)
    with pytest.raises(ValueError, match="registered already"):
        engine.register(model)
    model["new"] = pages(engine, 3)
    assert [r.addr for r in engine.register(model).regions] == [extent(model["new"])[0]]


def test_what_is_registered_in_part_is_registered_as_a_whole(engine):
    values = pages(engine)
    engine.register(values[8 * PAGE : 12 * PAGE])
    area = engine.register([values])
    assert [r.n_pages for r in area.regions] == [8, 12]
    assert engine.dedup([values]).pages_scanned == N_PAGES
    engine._core.check()
    engine.unregister([values])
    assert engine.stats().regions == 0


def test_dedup_of_the_same_memory_in_many_forms(engine):
    values = pages(engine)
    values[N_PAGES // 2 * PAGE :] = values[: N_PAGES // 2 * PAGE]
    report = engine.dedup(values, [values], {"v": values[100:]}, (memoryview(values), values[::2]))
    assert report.pages_scanned == report.pages_merged == N_PAGES
    assert engine.stats().regions == 1


def test_memory_that_overlaps_in_part_is_one_region(engine):
    memory = private_memory(N_PAGES)
    first, second = memoryview(memory)[: 16 * PAGE], memoryview(memory)[8 * PAGE + 5 :]
    area = engine.register([first, second])
    assert [r.n_pages for r in area.regions] == [N_PAGES]


def test_arrays_of_the_engine_and_of_the_allocator(engine):
    own = engine.array(random_pages(1, N_PAGES))
    rows = engine.rows(10, (PAGE + 100,), np.uint8)
    rows[:] = 7
    with pytest.raises(ValueError, match="registered already"):
        engine.register([own, rows])
    report = engine.dedup([own, rows], pages(engine))
    assert report.pages_scanned == N_PAGES + 20 + N_PAGES
    assert report.unreached == {}
    engine.unregister({"own": own})
    assert is_plain(*extent(own))


def test_an_area_takes_objects(engine, model):
    area = engine.area()
    inner = area.register(model)
    region = area.register(pages(engine, 5))
    assert set(area.regions) == {*inner.regions, region}
    area.close()
    assert engine.stats().regions == 0


def test_areas_where_objects_are_taken(engine, model):
    area = engine.register(model)
    assert engine.dedup(area).pages_merged == 2 * N_PAGES
    with engine.hold(area), pytest.raises(RuntimeError):
        area.close()
    assert engine.estimate(area).pages == 3 * N_PAGES
    with pytest.raises(TypeError, match="Area"):
        engine.register(area)
    with engine.hold([area.regions]), pytest.raises(RuntimeError):
        area.close()


# --- estimate, hold -------------------------------------------------------------------------------


def test_estimate_changes_nothing(engine, model):
    estimate = engine.estimate(model)
    assert (estimate.pages, estimate.pages_duplicate) == (3 * N_PAGES, N_PAGES)
    assert estimate.unreached == {}
    assert engine.stats().regions == 0
    engine.register(model["rest"])
    assert engine.estimate(model, model["a"]).pages == 3 * N_PAGES


def test_hold_holds_all_of_it(engine, model):
    engine.register(model)
    with engine.hold(model):
        assert engine.dedup().pages_merged == 0
        for region in engine.regions:
            with pytest.raises(RuntimeError):
                region.close()
    assert engine.dedup().pages_merged == 2 * N_PAGES
    with pytest.raises(ValueError, match="registered"), engine.hold([pages(engine)]):
        pass


# --- what is left out -----------------------------------------------------------------------------


def test_what_cannot_be_merged_is_named(engine, model):
    model["shared"] = mmap.mmap(-1, N_PAGES * PAGE)
    model["small"] = [np.zeros(8), np.zeros(9)]
    area = engine.register(model)
    assert len(area.regions) == 3
    counts = {text.partition(": ")[0]: n for text, n in area.unreached.items()}
    assert counts == {"mmap": 1, "ndarray": 2}
    assert area.unreached["ndarray: no whole page inside"] == 2
    assert any("shared anonymous memory" in text for text in area.unreached)
    assert sum(engine.dedup(model).unreached.values()) == 3
    estimate = engine.estimate(model)
    assert sum(estimate.unreached.values()) == 3
    assert "3 not reached" in repr(estimate)
    assert "not reached" in estimate._repr_html_()
    assert estimate.as_dict()["unreached"] == dict(estimate.unreached)


def test_shared_memory_in_an_object_is_turned_private(engine):
    shared = mmap.mmap(-1, N_PAGES * PAGE)
    area = engine.register({"x": shared}, privatize=True)
    assert [r.n_pages for r in area.regions] == [N_PAGES]


def test_nothing_reached_is_an_error(engine):
    for call in (engine.register, engine.dedup, engine.estimate):
        with pytest.raises(ValueError, match="MAP_SHARED"):
            call([mmap.mmap(-1, N_PAGES * PAGE)])
        with pytest.raises(ValueError, match="2 x ndarray: no whole page inside"):
            call([np.zeros(3), np.zeros(4)])
        for nothing in ([], {}, [1, "x"], object(), (x for x in "abc")):
            with pytest.raises(TypeError, match=type(nothing).__name__):
                call(nothing)
    assert engine.stats().regions == 0


@pytest.mark.parametrize("thing", [7, 1.5, "text", None, int, len, mmap])
def test_hopeless(engine, thing):
    for call in (engine.register, engine.dedup, engine.estimate, engine.unregister):
        with pytest.raises(TypeError, match="is not a buffer"):
            call(thing)
    with pytest.raises(TypeError, match="is not a buffer"), engine.hold(thing):
        pass


def test_a_buffer_of_its_own_that_is_refused_stops_all(engine, model):
    """What is named in the call itself is not passed over."""
    for call in (engine.dedup, engine.estimate):
        with pytest.raises(ValueError, match="MAP_SHARED"):
            call(model, mmap.mmap(-1, N_PAGES * PAGE))
        with pytest.raises(ValueError, match="nothing of this list"):
            call(model, [np.zeros(3)])
    assert engine.stats().regions == 0


def test_no_memory_in_the_midst_undoes_all(engine, model, monkeypatch):
    add, calls = engine._parts.registrar._add, []

    def fail_at_the_third(admission, *called):
        calls.append(admission)
        if len(calls) == 3:
            admission.release()
            raise MemoryError("no")
        return add(admission, *called)

    monkeypatch.setattr(engine._parts.registrar, "_add", fail_at_the_third)
    for call in (engine.register, engine.dedup):
        calls.clear()
        with pytest.raises(MemoryError):
            call(model)
        assert engine.stats().regions == 0
        assert engine.regions == ()
    monkeypatch.undo()
    assert engine.dedup(model).pages_merged == 2 * N_PAGES


def test_nothing_is_held_after_an_error(engine):
    growing = bytearray(PAGE * 8)
    shared = mmap.mmap(-1, N_PAGES * PAGE)
    with pytest.raises(ValueError, match="MAP_SHARED"):
        engine.dedup([growing], shared)
    growing.append(1)
    with pytest.raises(ValueError, match="MAP_SHARED"):
        engine.register([shared])
    shared.close()


def test_no_proc_is_an_error(engine, model, monkeypatch):
    from ksmcore._kernel import smaps

    def missing(*args):
        raise FileNotFoundError(2, "No such file", "/proc/self/smaps")

    monkeypatch.setattr(smaps, "Snapshot", missing)
    for call in (engine.register, engine.dedup, engine.estimate):
        with pytest.raises(FileNotFoundError):
            call(model)
    monkeypatch.undo()
    assert engine.stats().regions == 0


def test_while_disabled(model, monkeypatch):
    monkeypatch.setenv("KSMCORE_DISABLE", "1")
    engine = ksmcore.Engine()
    with engine.register(model) as area:
        engine.dedup(model)
        assert len(area.regions) == 3
    engine.close()


# --- memory that may not be written ---------------------------------------------------------------


def test_bytes_and_frozen_arrays_are_merged(engine):
    content = random_pages(1, N_PAGES + 2).tobytes()
    frozen = np.frombuffer(private_memory(N_PAGES + 2), np.uint8)
    frozen[:] = np.frombuffer(content, np.uint8)
    start = extent(np.frombuffer(content, np.uint8))[0] % PAGE
    like = private_memory(N_PAGES + 4)
    view = np.frombuffer(like, np.uint8)[start : start + len(content)]
    view[:] = frozen
    before = hash(content)
    view.flags.writeable = False
    report = engine.dedup(content, view)
    assert report.pages_merged >= 2 * (N_PAGES + 1)
    assert bytes(view) == content
    assert hash(bytes(view)) == before
    # Who may write, writes on: the other side does not see it.
    np.frombuffer(like, np.uint8)[:] = 0
    assert content == frozen.tobytes()
    engine.unregister(content)
    engine.unregister(view)


# --- many ---------------------------------------------------------------------------------------


def test_many_objects_with_common_parts(engine):
    """Each piece is registered once, and no time goes by that grows with the square of them."""
    pieces = [pages(engine, n, 2) for n in range(500)]
    objects = [{"own": pieces[n], "common": pieces} for n in range(40)]
    report = engine.dedup(*objects)
    assert engine.stats().regions == 500
    assert report.pages_scanned == 1000
    assert report.unreached == {}
    engine.unregister(objects)
    assert engine.stats().regions == 0


def test_parts_of_one_array_in_several_objects(engine):
    memory = memoryview(private_memory(N_PAGES))
    parts = [memory[: 10 * PAGE], memory[5 * PAGE : 15 * PAGE], memory[14 * PAGE :]]
    report = engine.dedup(*([part] for part in parts), memory[: 2 * PAGE])
    engine._core.check()
    assert engine.stats().regions == 4
    assert sum(region.n_pages for region in engine.regions) == N_PAGES
    assert report.unreached == {}
