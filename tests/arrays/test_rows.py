"""rows: every row begins on a page, so equal frames are merged whatever their size."""

import numpy as np
import pytest

import ksmcore
from helpers.memory import PAGE


@pytest.mark.parametrize(
    ("row_shape", "dtype"),
    [((84, 84), np.uint8), (1764, np.float32), ((3, 5, 7), np.int64), ((), "S9"), (PAGE, np.uint8)],
)
def test_shape_strides_and_alignment(engine, row_shape, dtype):
    array = engine.rows(5, row_shape, dtype)
    plain = np.zeros((5, *np.empty(row_shape).shape), dtype)
    assert (array.shape, array.dtype) == (plain.shape, plain.dtype)
    assert array.strides[1:] == plain.strides[1:]
    assert array.strides[0] % PAGE == array.ctypes.data % PAGE == 0
    assert array.strides[0] - PAGE < plain.strides[0] <= array.strides[0]
    assert all(array[k : k + 1].flags.c_contiguous for k in range(5))
    assert np.array_equal(array, plain)


def test_equal_frames_are_merged(engine, rng):
    frames = engine.rows(60, (84, 84), np.uint8)
    kinds = rng.integers(0, 256, (20, 84, 84), dtype=np.uint8)
    frames[:] = kinds[np.arange(60) % 20]
    assert engine.dedup(frames).bytes_saved == 40 * 2 * PAGE
    assert np.array_equal(frames, kinds[np.arange(60) % 20])
    frames[3, 0, 0] += 1
    assert np.array_equal(frames[23], kinds[3])
    # Contiguous, they lie at other offsets each, and share nothing.
    packed = engine.empty((60, 84, 84), np.uint8)
    packed[:] = kinds[np.arange(60) % 20]
    before = engine.stats().bytes_saved
    engine.dedup(packed)
    assert engine.stats().bytes_saved - before < 2 * PAGE * 10


def test_the_array_stands_for_all_its_memory(engine):
    frames = engine.rows(10, 5000, np.uint8)
    frames[:] = 7
    assert engine.estimate(frames).pages == 20
    engine.dedup(frames, frames)
    with engine.hold(frames[3:5]):
        assert engine.dedup().skipped["held"] == 20
    engine.unregister(frames)
    assert engine.stats().regions == 0
    assert (frames == 7).all()
    del frames


def test_nothing_in_it(engine):
    assert engine.rows(0, (3, 4)).shape == (0, 3, 4)
    assert engine.rows(3, (0, 4)).shape == (3, 0, 4)
    assert engine.stats().regions == 0


@pytest.mark.parametrize(
    ("n", "row_shape", "dtype", "error"),
    [
        (-1, 3, float, ValueError),
        (3, (2, -1), float, ValueError),
        (1.5, 3, float, TypeError),
        (3, 3, object, TypeError),
        (2**40, 2**40, float, ValueError),
    ],
)
def test_refused(engine, n, row_shape, dtype, error):
    with pytest.raises(error):
        engine.rows(n, row_shape, dtype)


def test_of_the_default_engine():
    assert ksmcore.rows(2, 3).strides == (PAGE, 8)
