"""Page maps as pictures: which memory, how it is made to fit, and colours that differ."""

import io
import itertools

import numpy as np
import pytest

import ksmcore
from ksmcore import PageState
from ksmcore._show.names import LEAVES_NO_TRACE
from ksmcore._show.page_maps import (
    LOOKS,
    N_STATES,
    OUTSIDE,
    Cells,
    engine_maps,
    png,
    png_uri,
    reduced,
    region_map,
    rgb,
)

PAGE = 4096


def luminance(colour):
    channels = np.array(rgb(colour)) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


# ---- colours ------------------------------------------------------------------------------------


def test_every_state_has_a_look():
    assert set(LOOKS) == set(PageState)
    assert sorted(PageState) == list(range(N_STATES))


def test_colours_differ_in_lightness_alone():
    """So they can be told in a grey print, and by readers who see no colours."""
    lightness = sorted(116 * np.cbrt(luminance(look.colour)) - 16 for look in LOOKS.values())
    assert min(after - before for before, after in itertools.pairwise(lightness)) >= 6.5


@pytest.mark.parametrize("ground", ["#ffffff", "#14171b"])
def test_shared_pages_stand_out_from_light_and_dark(ground):
    low, high = sorted((luminance(LOOKS[PageState.SHARED].colour), luminance(ground)))
    assert (high + 0.05) / (low + 0.05) >= 3


# ---- making it fit ------------------------------------------------------------------------------


def test_what_fits_is_left_as_it_is(rng):
    states = rng.integers(0, N_STATES, 100).astype(np.uint8)
    cells = reduced(states, 100)
    assert cells.pages_per_cell == 1
    assert np.array_equal(cells.states, states)
    assert cells.caption(PAGE) == "one cell is one page (4.0 KiB)"


@pytest.mark.parametrize("n_pages", [101, 4097, 65_537, 10_000_000])
def test_a_cell_shows_what_is_there_in_the_right_shares(n_pages, rng):
    states = rng.choice(
        [PageState.SHARED, PageState.UNIQUE, PageState.BROKEN], n_pages, p=[0.62, 0.35, 0.03]
    ).astype(np.uint8)
    states[: n_pages // 2] = PageState.ZERO
    cells = reduced(states, 4096 if n_pages > 4096 else 100)
    per_cell = cells.pages_per_cell
    assert per_cell & (per_cell - 1) == 0
    n_cells = len(cells.states)
    assert n_cells == -(-n_pages // per_cell)
    assert n_cells <= 4096
    for cell in range(0, n_cells, max(n_cells // 100, 1)):
        assert cells.states[cell] in states[cell * per_cell : (cell + 1) * per_cell]
    drawn = np.bincount(cells.states, minlength=N_STATES) * per_cell
    there = np.bincount(states, minlength=N_STATES)
    # Rounding, and what stands in a cell that is mixed of two halves.
    assert np.abs(drawn - there).max() <= 3 * per_cell
    assert cells.caption(PAGE).startswith(f"one cell is {per_cell:,} pages (")


def test_one_odd_page_among_many_does_not_hide_the_others():
    states = np.full(64, PageState.UNIQUE, np.uint8)
    states[5] = PageState.BROKEN
    assert list(reduced(states, 4).states) == [PageState.UNIQUE] * 4


@pytest.mark.parametrize("n_cells", [1, 2, 7, 100, 1000, 4096])
def test_grid(n_cells):
    states = np.arange(n_cells).astype(np.uint8) % N_STATES
    grid = Cells(states, 1).grid(128)
    rows, columns = grid.shape
    assert columns <= min(n_cells, 128)
    assert np.array_equal(grid.ravel()[:n_cells], states)
    assert (grid.ravel()[n_cells:] == OUTSIDE).all()
    assert rows * columns - n_cells < columns


def test_png():
    image = pytest.importorskip("PIL.Image")
    grid = np.array([[*range(N_STATES)], [OUTSIDE] * 5 + [3]], np.uint8)
    pixels = np.array(image.open(io.BytesIO(png(grid))).convert("RGBA"))
    for row, column in np.ndindex(grid.shape):
        red, green, blue, alpha = pixels[row, column].tolist()
        if grid[row, column] == OUTSIDE:
            assert alpha == 0
        elif grid[row, column] == PageState.NOT_PRESENT:
            assert 0 < alpha < 128
        else:
            assert alpha == 255
            assert (red, green, blue) == rgb(LOOKS[grid[row, column]].colour)
    assert png_uri(grid).startswith("data:image/png;base64,iVBORw0KGgo")


# ---- which memory -------------------------------------------------------------------------------


def test_a_region(engine, private_buffer):
    memory = private_buffer(8)
    memory[: 4 * engine.page_bytes] = b"a" * (4 * engine.page_bytes)
    region = engine.register(memory)
    engine.dedup()
    only = region_map(region)
    assert np.array_equal(only.states, region.page_map())
    assert only.nbytes == region.nbytes
    assert only.counts()[PageState.SHARED] == 4
    told = f"{only.title}, {only.place}"
    assert ("memory in test_a_region()" in told) is LEAVES_NO_TRACE
    assert f"egion at {region.addr:#x}, registered at test_page_maps.py:" in told
    region.close()
    with pytest.raises(ValueError, match="not registered"):
        region_map(region)


def test_all_memory_of_an_engine(engine, private_buffer):
    region = engine.register(private_buffer(50))
    arrays = [engine.zeros((n, engine.page_bytes), np.uint8) for n in range(1, 10)]
    for n, array in enumerate(arrays):
        array[:] = n + 1
    engine.dedup()
    maps = engine_maps(engine, 3)
    assert [len(one.states) for one in maps] == [50, 9, 8, 7 * 8 // 2]
    assert [one.n_regions for one in maps] == [1, 1, 1, 7]
    assert maps[0].title == f"Region at {region.addr:#x}"
    if LEAVES_NO_TRACE:
        assert maps[1].title == "arrays[8] in test_all_memory_of_an_engine()"
    assert "emory of an array at 0x" in maps[1].title + maps[1].place
    assert maps[3].title == "7 smaller regions, end to end"
    smaller = sorted(arrays[:7], key=lambda array: array.ctypes.data)
    expected = np.concatenate(
        [np.full(len(array), 2 if len(array) == 1 else 3, np.uint8) for array in smaller]
    )
    assert np.array_equal(maps[3].states, expected)
    # A single one more is not worth a sum.
    assert [one.n_regions for one in engine_maps(engine, 9)] == [1] * 10
    assert [one.n_regions for one in engine_maps(engine, 0)] == [10]
    engine.close()
    with pytest.raises(ValueError, match="closed"):
        engine_maps(engine, 3)


def test_nothing_registered(engine):
    assert engine_maps(engine, 3) == []


def test_the_allocators_memory_is_named():
    with ksmcore.allocator():
        kept = np.ones(1 << 20, np.uint8)
    maps = engine_maps(ksmcore.default_engine(), 100)
    own = [one for one in maps if "rrays of the allocator at 0x" in one.title + one.place]
    assert own
    named = any("kept in test_the_allocators_memory_is_named()" in one.title for one in own)
    assert named is LEAVES_NO_TRACE
    assert kept.all()
    del kept
    ksmcore.uninstall_allocator()  # gives its pages back: later tests merge what the engine has
