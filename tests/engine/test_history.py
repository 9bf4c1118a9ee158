"""Engine.history: a sample for each pass that changed something, from the beginning to now."""

import itertools
import json

import numpy as np
import pytest

from helpers.forks import THREADS_RUN, in_child
from helpers.memory import PAGE
from helpers.waiting import wait_until
from ksmcore._engine.history import History, Sample, sample


def made(seconds, n_sharing):
    return Sample(seconds, n_sharing * PAGE, 1, n_sharing, 0, 0, 0)


def test_one_sample_for_each_pass_that_changes_something(engine):
    assert len(engine.history) == 0
    a = engine.empty((30, PAGE), np.uint8)
    a[:20] = 5
    a[20:25] = np.arange(5, dtype=np.uint8)[:, None] + 10
    a[25:] = 1
    a[25:] = 0
    engine.dedup()
    engine.scan()
    a[3] = 9
    engine.scan()
    assert [one.bytes_saved // PAGE for one in engine.history] == [24, 24, 23]
    last, stats = engine.history[-1], engine.stats()
    assert last[1:] == tuple(getattr(stats, name) for name in Sample._fields[1:])
    assert last.pages_saved * PAGE == stats.bytes_saved
    assert last.pages_used + last.pages_saved == stats.pages_tracked + stats.ksm_zero_pages
    seconds = [one.seconds for one in engine.history]
    assert seconds == sorted(seconds)
    assert seconds[0] > 0


def test_idle_passes_only_move_the_end(engine):
    a = engine.empty((10, PAGE), np.uint8)
    a[:] = 1
    for _ in range(3):
        engine.scan()
    length = len(engine.history)
    assert length <= 3
    for _ in range(50):
        engine.scan()
    assert len(engine.history) <= length + 1
    begin, end = engine.history[-2:]
    assert begin[1:] == end[1:]
    before = end.seconds
    engine.scan()
    assert engine.history[-1].seconds > before


def test_passes_of_the_scanner_are_in_it(engine):
    a = engine.empty((100, PAGE), np.uint8)
    a[:] = np.arange(100, dtype=np.uint8)[:, None] // 2 + 1
    with engine.start(sleep_millisecs=0):
        wait_until(lambda: engine.history and engine.history[-1].bytes_saved == 50 * PAGE)
    assert engine.history[0].pages_volatile == 100


@pytest.mark.filterwarnings(THREADS_RUN)
def test_a_forked_child_begins_a_new_one(engine):
    a = engine.empty((10, PAGE), np.uint8)
    a[:] = 1
    engine.dedup()

    def work():
        assert len(engine.history) == 0
        assert engine.peak_bytes_saved == 0
        b = engine.empty((5, PAGE), np.uint8)
        b[:] = 1
        engine.dedup()
        assert [one.bytes_saved for one in engine.history] == [4 * PAGE]

    assert in_child(work) == 0
    assert [one.bytes_saved for one in engine.history] == [9 * PAGE]


def test_a_full_one_is_thinned_out_over_all_of_its_time():
    history = History(most_samples=64)
    for n in range(10_000):
        history.add(made(float(n), n % 7))
        assert len(history) <= 64
        assert history[0] == made(0.0, 0)
        assert history[-1] == made(float(n), n % 7)
    seconds = [one.seconds for one in history]
    gaps = [after - before for before, after in itertools.pairwise(seconds)]
    assert min(gaps) > 0
    assert max(gaps) <= 4 * 10_000 / 64


def test_the_stride_doubles_each_time_it_is_full():
    history = History(most_samples=4)
    for n in range(5):
        history.add(made(float(n), n))
    assert [one.seconds for one in history] == [0, 2, 4]
    for n in range(5, 9):
        history.add(made(float(n), n))
    assert [one.seconds for one in history] == [0, 4, 8]
    for n in range(9, 13):
        history.add(made(float(n), n))
    assert [one.seconds for one in history] == [0, 4, 8, 12]


def test_a_long_rest_keeps_both_its_ends():
    history = History(most_samples=8)
    history.add(made(0, 1))
    for n in range(1000):
        history.add(made(1.0 + n, 2))
    history.add(made(2000, 3))
    assert list(history) == [made(0, 1), made(1.0, 2), made(1000.0, 2), made(2000, 3)]


def test_as_a_sequence(engine):
    history = History()
    assert repr(history) == "<ksmcore.History: 0 samples>"
    assert history.as_dict() == {name: [] for name in Sample._fields}
    for n in range(3):
        history.add(made(n / 2, n))
    assert list(history[1:]) == [made(0.5, 1), made(1.0, 2)]
    assert repr(history) == "<ksmcore.History: 3 samples, 0.0 to 1.0 s>"
    assert json.loads(json.dumps(history.as_dict()))["bytes_saved"] == [0, PAGE, 2 * PAGE]
    numbers = engine.stats().as_dict()
    assert sample(1.5, numbers, PAGE) == Sample(1.5, 0, 0, 0, 0, 0, 0)
