"""`changed`: where a copy differs from its source."""

import threading

import numpy as np
import pytest

import ksmcore
from helpers.waiting import wait_until

PAGE = ksmcore.Engine.page_bytes


def plain(copy, source):
    """By comparing everything."""
    rows = [i for i in range(len(copy)) if copy[i].tobytes() != source[i].tobytes()]
    ours, theirs = copy.view(np.uint8).ravel(), source.view(np.uint8).ravel()
    first = ours.ctypes.data % PAGE
    pages = np.unique((np.flatnonzero(ours != theirs) + first) // PAGE)
    return pages.tolist(), rows


def same_as_plain(engine, copy, source):
    found = engine.changed(copy, since=source)
    assert (found.pages.tolist(), found.rows.tolist()) == plain(copy, source)
    assert bool(found) == bool(len(found.pages))
    return found


@pytest.fixture
def source(engine):
    made = engine.array(np.random.default_rng(1).random((300, 700)))
    engine.dedup()
    return made


def test_a_copy_is_read_only_where_either_was_written(engine, source):
    engine.copy(source)  # the first has its pages copied, and the next ones shared
    engine.dedup()
    copy = engine.copy(source)
    assert same_as_plain(engine, copy, source).pages_read <= 2
    copy[17, 3] += 1
    source[201, 699] += 1
    copy[250] = copy[250]  # written, and the same
    found = same_as_plain(engine, copy, source)
    assert found.rows.tolist() == [17, 201]
    assert 2 <= found.pages_read <= 8
    assert found.pages_total == -(-source.nbytes // PAGE)


def test_rows_smaller_and_larger_than_pages_and_random_writes(engine):
    random = np.random.default_rng(2)
    for shape in ((40_000, 5), (30, 5_000), (1, 60_000), (100_000,)):
        source = engine.array(random.random(shape))
        engine.copy(source)
        engine.dedup()
        copy = engine.copy(source)
        for _ in range(20):
            target = copy if random.random() < 0.5 else source
            target.reshape(-1)[random.integers(target.size)] += 1
            same_as_plain(engine, copy, source)
        engine.dedup()
        same_as_plain(engine, copy, source)


def test_pages_of_zeros_that_were_given_back(engine):
    source = engine.zeros((64, PAGE // 8))
    source[:] = 0
    copy = engine.array(source)
    engine.dedup()
    copy[9, 1] = 1
    found = same_as_plain(engine, copy, source)
    assert found.rows.tolist() == [9]
    assert found.pages_read == 1


def test_arrays_that_share_nothing(engine):
    """Not registered, at another place in their pages, read-only, and without elements."""
    source = np.random.default_rng(3).random((500, 70))
    copy = source.copy()
    copy[3, 5] = copy[499, 69] = 0
    copy.flags.writeable = False
    assert same_as_plain(engine, copy, source).rows.tolist() == [3, 499]
    moved = np.empty(copy.nbytes + 24, np.uint8)[24:].view(float).reshape(copy.shape)
    moved[:] = copy
    assert same_as_plain(engine, moved, source).rows.tolist() == [3, 499]
    assert not engine.changed(np.empty((0, 3)), since=np.empty((0, 3)))
    assert engine.changed(np.array(1.0), since=np.array(2.0)).rows.tolist() == [0]


def test_bytes_are_compared(engine):
    a, b = np.array([0.0, np.nan, 1.0]), np.array([-0.0, np.nan, 1.0])
    assert engine.changed(a, since=b).rows.tolist() == [0]


def test_while_the_scanner_merges_and_writers_write(engine, source):
    """Rows that nobody writes are never told, those written before always."""
    copy = engine.copy(source)
    copy[100] = 5
    n_writes = 0
    is_over = threading.Event()

    def write():
        nonlocal n_writes
        while not is_over.is_set():
            copy[200, 3] = n_writes
            copy[201] = source[201]
            n_writes += 1

    writer = threading.Thread(target=write)
    writer.start()
    try:
        with engine.start(sleep_millisecs=0):
            wait_until(lambda: n_writes > 0)
            before = engine.stats().full_scans
            while engine.stats().full_scans < before + 5:
                rows = set(engine.changed(copy, since=source).rows.tolist())
                assert {100} <= rows <= {100, 200}
    finally:
        is_over.set()
        writer.join()
    same_as_plain(engine, copy, source)


@pytest.mark.parametrize(
    ("copy", "since", "error"),
    [
        ([1], np.ones(1), TypeError),
        (np.ones(1), b"1", TypeError),
        (np.ones(2), np.ones(3), ValueError),
        (np.ones(2), np.ones(2, np.float32), ValueError),
        (np.ones((4, 4))[:, 1], np.ones(4), ValueError),
        (np.array([None]), np.array([None]), TypeError),
    ],
)
def test_what_cannot_be_compared(engine, copy, since, error):
    with pytest.raises(error):
        engine.changed(copy, since=since)
    engine.close()
    with pytest.raises(ValueError, match="closed"):
        engine.changed(np.ones(1), since=np.ones(1))
