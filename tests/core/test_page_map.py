"""Region.page_map: what each page is, as the kernel and the engine know it."""

import mmap

import numpy as np
import pytest

import ksmcore
from helpers.memory import PAGE
from ksmcore import PageState


@pytest.fixture
def region(engine, private_buffer, rng):
    """Ten pages: four unique, two equal, two zero, two never touched."""
    memory = private_buffer(10)
    rows = np.frombuffer(memory, np.uint8).reshape(10, PAGE)
    rows[:4] = rng.integers(0, 256, (4, PAGE), dtype=np.uint8)
    rows[4:6] = 9
    rows[6:8] = 1
    rows[6:8] = 0
    return engine.register(memory)


def names(region):
    return "".join(PageState(state).name[0] for state in region.page_map())


@pytest.mark.skipif(
    ksmcore.features()["pagemap"] is not None, reason="private copies cannot be told here"
)
def test_states(engine, region):
    rows = np.frombuffer(region._view(), np.uint8).reshape(10, PAGE)
    assert names(region) == "V" * 8 + "NN"
    engine.scan()
    assert names(region) == "V" * 8 + "NN"
    engine.scan()
    assert names(region) == "UUUUSSZZNN"
    rows[4, 0] = 1
    rows[6, 0] = 1
    rows[1, 0] ^= 1
    rows[9, 0] = 1
    assert names(region) == "UUUUBSBZNV"
    engine.scan()
    assert names(region) == "UVUUVSVZNV"
    tally = region.stats()
    counted = np.bincount(region.page_map(), minlength=6)
    assert counted[PageState.UNIQUE] == tally.pages_unshared
    assert counted[PageState.SHARED] == tally.pages_merged
    assert counted[PageState.ZERO] == tally.ksm_zero_pages
    assert counted[PageState.VOLATILE] == tally.pages_volatile


def test_more_pages_than_are_asked_about_at_once(engine, private_buffer):
    memory = private_buffer(1500)
    rows = np.frombuffer(memory, np.uint8).reshape(1500, PAGE)
    rows[:1200] = 3
    memory.madvise(mmap.MADV_DONTNEED, 1200 * PAGE)  # where a huge page came, they are there
    region = engine.register(memory)
    engine.dedup()
    states = region.page_map()
    assert states.dtype == np.uint8
    assert (states[:1200] == PageState.SHARED).all()
    assert (states[1200:] == PageState.NOT_PRESENT).all()


def test_closed(region):
    region.close()
    with pytest.raises(ValueError, match="not registered"):
        region.page_map()
