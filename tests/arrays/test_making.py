"""Arrays of the engine's own: aligned, registered from birth, gone with their last view."""

import ctypes
import gc
import io
import math
import pickle
import threading
import warnings

import numpy as np
import pytest

import ksmcore
from helpers.kernels_view import store_mappings
from helpers.memory import PAGE, address, extent, random_pages
from ksmcore._kernel import smaps
from ksmcore._testing import pagemap

MAKERS = ["empty", "zeros", "full", "array", "copy"]

DTYPES = [
    np.dtype(code)
    for code in (
        "?",
        "i1",
        "u2",
        ">i4",
        "f4",
        "f8",
        "c16",
        "M8[ns]",
        "m8[s]",
        "S7",
        "U5",
        "V9",
    )
] + [np.dtype([("a", "i4"), ("b", "f8", (2, 3)), ("c", "S3")]), np.dtype("i4,f8")]


def make(engine, maker, shape, dtype=float, order="C"):
    """The same array of ones (or of zeros) from any of the five functions."""
    if maker in ("empty", "zeros"):
        return getattr(engine, maker)(shape, dtype, order)
    if maker == "full":
        return engine.full(shape, np.ones((), dtype)[()], dtype, order)
    return getattr(engine, maker)(np.ones(shape, dtype, order))


class TestShape:
    @pytest.mark.parametrize("maker", MAKERS)
    @pytest.mark.parametrize("order", ["C", "F"])
    @pytest.mark.parametrize("shape", [(1000,), (100, 200), (3, 4, 5), (1, 1)])
    def test_as_numpy(self, engine, maker, shape, order):
        made, numpys = make(engine, maker, shape, order=order), np.ones(shape, order=order)
        assert type(made) is np.ndarray
        assert address(made) % PAGE == 0
        assert (made.shape, made.strides, made.dtype) == (
            numpys.shape,
            numpys.strides,
            numpys.dtype,
        )
        assert made.flags.writeable
        assert made.flags.aligned
        assert not made.flags.owndata
        assert (made == (0 if maker in ("empty", "zeros") else 1)).all()

    @pytest.mark.parametrize("maker", MAKERS)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_dtypes(self, engine, maker, dtype):
        made = make(engine, maker, 50, dtype)
        assert made.dtype == dtype
        assert address(made) % PAGE == 0
        expected = (np.zeros if maker in ("empty", "zeros") else np.ones)(50, dtype)
        assert made.tobytes() == expected.tobytes()
        assert engine.stats().regions == 1

    @pytest.mark.parametrize("shape", [5, np.int64(5), [5], (np.uint8(5),)])
    def test_sizes_of_any_kind(self, engine, shape):
        assert engine.empty(shape).shape == np.empty(shape).shape

    @pytest.mark.parametrize("maker", MAKERS)
    def test_scalar(self, engine, maker):
        made = make(engine, maker, ())
        assert made.shape == ()
        assert address(made) % PAGE == 0
        made[()] = 7
        assert made == 7

    def test_scalar_from_a_number(self, engine):
        made = engine.array(5)
        assert made.shape == ()
        assert made == 5
        assert made.dtype == np.array(5).dtype

    @pytest.mark.parametrize("maker", MAKERS)
    @pytest.mark.parametrize("shape", [0, (0,), (3, 0), (0, 10**9)])
    def test_of_no_bytes(self, engine, maker, shape):
        made = make(engine, maker, shape)
        assert made.shape == np.empty(shape).shape
        assert made.size == 0
        assert engine.stats().regions == 0

    def test_default_dtype(self, engine):
        assert engine.empty(1).dtype == engine.zeros(1).dtype == np.float64
        assert engine.full(1, 3).dtype == np.full(1, 3).dtype
        assert engine.full(1, 3.5).dtype == np.float64
        assert engine.full(1, "abc").dtype == np.dtype("U3")

    def test_subarray_dtype(self, engine):
        made = engine.zeros(3, ("i4", (2,)))
        assert (made.shape, made.dtype) == ((3, 2), np.dtype("i4"))

    def test_one_region_per_array_with_all_its_pages(self, engine):
        made = [engine.empty(n, np.uint8) for n in (1, PAGE, PAGE + 1, 10 * PAGE)]
        assert engine.stats().regions == 4
        n_pages = {addr: n for _, addr, n in engine._core.regions()}
        assert [n_pages[address(array)] for array in made] == [1, 1, 2, 10]

    def test_module_functions(self):
        source = np.arange(1000.0)
        for made in (
            ksmcore.empty(1000),
            ksmcore.zeros(1000),
            ksmcore.full(1000, 2.0),
            ksmcore.array(source),
            ksmcore.copy(source),
        ):
            assert made.shape == (1000,)
            assert address(made) % PAGE == 0


class TestRefused:
    @pytest.mark.parametrize("dtype", [object, "O", [("a", "i4"), ("b", "O")]])
    @pytest.mark.parametrize("maker", ["empty", "zeros"])
    def test_objects(self, engine, maker, dtype):
        with pytest.raises(TypeError, match="references to objects"):
            getattr(engine, maker)(10, dtype)
        assert engine.stats().regions == 0

    def test_objects_in_the_source(self, engine):
        for call in (engine.array, engine.copy):
            with pytest.raises(TypeError, match="references to objects"):
                call(np.array([{}, []], object))
        with pytest.raises(TypeError, match="references to objects"):
            engine.full(10, None)

    def test_strings_of_any_length(self, engine):
        if not hasattr(np.dtypes if hasattr(np, "dtypes") else np, "StringDType"):
            pytest.skip("this NumPy has no StringDType")
        with pytest.raises(TypeError, match="references to objects"):
            engine.empty(10, np.dtypes.StringDType())

    @pytest.mark.parametrize("shape", [-1, (3, -1), (-1, 0)])
    def test_negative_sizes(self, engine, shape):
        for call in (engine.empty, engine.zeros):
            with pytest.raises(ValueError, match="negative dimensions"):
                call(shape)
        with pytest.raises(ValueError, match="negative dimensions"):
            engine.full(shape, 1)
        assert engine.stats().regions == 0

    @pytest.mark.parametrize("shape", [2.5, "3", (2.5, 3), ("a",), None, object()])
    def test_sizes_that_are_none(self, engine, shape):
        with pytest.raises(TypeError):
            engine.empty(shape)

    @pytest.mark.parametrize("order", ["A", "K", "", "c", None])
    def test_other_orders(self, engine, order):
        with pytest.raises(ValueError, match='order must be "C" or "F"'):
            engine.empty(3, float, order)

    def test_too_big(self, engine):
        with pytest.raises(ValueError, match="too big"):
            engine.empty((2**40, 2**40))
        with pytest.raises(MemoryError):
            engine.empty(2**58)
        assert engine.stats().regions == 0

    def test_masked(self, engine):
        with pytest.raises(TypeError, match="masked"):
            engine.array(np.ma.ones(10))

    def test_dtype_that_is_none(self, engine):
        with pytest.raises(TypeError):
            engine.empty(10, "no such dtype")


class TestContents:
    def test_empty_is_zero_and_takes_no_memory(self, engine):
        made = engine.empty(1000 * PAGE, np.uint8)
        start = address(made)
        present = pagemap.query(start, 1000)
        assert not any(present)
        assert not made.any()

    def test_array_copies(self, engine, rng):
        source = rng.normal(size=(30, 40))
        made = engine.array(source)
        source[0] = 0
        assert made[0].any()
        made[1] = 0
        assert source[1].any()

    @pytest.mark.parametrize("source", [[1, 2, 3], ((1.5, 2), (3, 4)), range(5), "text", 3 + 4j])
    def test_array_of_anything(self, engine, source):
        made, numpys = engine.array(source), np.array(source)
        assert made.dtype == numpys.dtype
        assert np.array_equal(made, numpys)

    def test_array_with_dtype(self, engine):
        made = engine.array([1, 2, 3], np.float32)
        assert made.dtype == np.float32
        assert made.tolist() == [1, 2, 3]

    def test_array_of_an_array_of_the_engine(self, engine):
        made = engine.array(engine.full(10, 4.0))
        assert (made == 4).all()
        assert engine.stats().regions == 1

    @pytest.mark.parametrize("step", [2, -1])
    def test_copy_of_a_strided_array(self, engine, step):
        source = np.arange(1000)[::step]
        made = engine.copy(source)
        assert np.array_equal(made, source)
        assert made.flags.c_contiguous

    def test_copy_keeps_fortran_order(self, engine, rng):
        source = np.asfortranarray(rng.normal(size=(30, 40)))
        made = engine.copy(source)
        assert made.flags.f_contiguous
        assert np.array_equal(made, source)

    def test_copy_of_a_subclass_is_plain(self, engine):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PendingDeprecationWarning)
            source = np.matrix([[1, 2], [3, 4]])
            made = engine.copy(source)
        assert type(made) is np.ndarray
        assert made.tolist() == [[1, 2], [3, 4]]

    def test_copy_of_a_read_only_array(self, engine):
        source = np.arange(10)
        source.flags.writeable = False
        assert engine.copy(source).flags.writeable

    def test_full_broadcasts(self, engine):
        made = engine.full((3, 4), [1, 2, 3, 4])
        assert made.tolist() == [[1, 2, 3, 4]] * 3

    def test_equal_arrays_share(self, engine, rng):
        source = random_pages(rng, 20)
        arrays = [engine.array(source) for _ in range(4)]
        assert engine.dedup().pages_merged == 80
        assert engine.stats().pages_shared == 20
        assert all(np.array_equal(array, source) for array in arrays)


class TestLife:
    def test_a_slice_outlives_the_name(self, engine, rng):
        source = random_pages(rng, 20)
        base = engine.array(source)
        tail = base[10 * PAGE :][::2]
        del base
        gc.collect()
        assert engine.stats().regions == 1
        engine.dedup(engine.array(source), tail.base)
        assert np.array_equal(tail, source[10 * PAGE :][::2])

    @pytest.mark.parametrize(
        "view",
        [
            memoryview,
            lambda a: a.reshape(4, -1).T,
            lambda a: a.view(np.uint16),
            lambda a: np.frombuffer(a, np.uint8),
            lambda a: (ctypes.c_char * a.nbytes).from_buffer(a),
        ],
        ids=["memoryview", "transpose", "view", "frombuffer", "ctypes"],
    )
    def test_views_of_all_kinds_keep_it(self, engine, view):
        base = engine.full(4 * PAGE, 9, np.uint8)
        kept = view(base)
        start = address(base)
        del base
        gc.collect()
        assert engine.stats().regions == 1
        assert smaps.vmas_in(start, start + 4 * PAGE)
        del kept
        gc.collect()
        assert engine.stats().regions == 0

    @pytest.mark.parametrize("merged", [False, True])
    def test_collected_means_unmapped(self, engine, merged):
        made = engine.full(1000 * PAGE, 7, np.uint8)
        start, end = extent(made)
        if merged:
            assert engine.dedup().pages_merged == 1000
        del made
        gc.collect()
        assert engine.stats().regions == 0
        assert engine.stats().store_pages == 0
        assert store_mappings(start, end) == []
        assert not any(vma.start <= start < end <= vma.end for vma in smaps.vmas_in(start, end))

    def test_a_sharer_survives_the_other(self, engine, rng):
        source = random_pages(rng, 20)
        a, b = engine.array(source), engine.array(source)
        engine.dedup()
        del a
        gc.collect()
        assert np.array_equal(b, source)
        assert engine.stats().pages_shared == 20
        assert engine.stats().pages_sharing == 0
        b[:] = 1
        assert (b == 1).all()

    def test_cyclic_garbage(self, engine):
        class Node:
            pass

        gc.collect()
        for _ in range(10):
            node = Node()
            node.data = engine.full(10 * PAGE, 7, np.uint8)
            node.self = node
            engine.dedup()
            del node
        gc.collect()
        assert engine.stats().regions == 0

    def test_cyclic_garbage_with_the_engine_inside(self):
        engine = ksmcore.Engine()
        made = engine.full(10 * PAGE, 7, np.uint8)
        engine.dedup()
        cycle = [engine, made]
        cycle.append(cycle)
        start, end = extent(made)
        del engine, made, cycle
        gc.collect()
        assert store_mappings(start, end) == []

    def test_after_closing_the_engine(self, rng):
        source = random_pages(rng, 20)
        with ksmcore.Engine() as engine:
            a, b = engine.array(source), engine.array(source)
            c = engine.full(20 * PAGE, 6, np.uint8)
            engine.dedup()
        for array, expected in ((a, source), (b, source), (c, 6)):
            assert store_mappings(*extent(array)) == []
            assert (array == expected).all()
            array[:] = 1
            assert (array == 1).all()
        del a, b, c, array
        gc.collect()

    def test_after_the_engine_is_gone(self, rng):
        source = random_pages(rng, 20)
        engine = ksmcore.Engine()
        a, b = engine.array(source), engine.array(source)
        engine.dedup()
        del engine
        gc.collect()
        assert np.array_equal(a, source)
        a[:] = 1
        assert np.array_equal(b, source)

    def test_unregistered_memory_stays_valid(self, engine):
        made = engine.full(10 * PAGE, 7, np.uint8)
        engine.dedup()
        engine.unregister(made)
        assert (made == 7).all()
        del made
        gc.collect()
        assert engine.stats().regions == 0

    def test_registered_with_another_engine_afterwards(self, engine):
        made = engine.full(10 * PAGE, 7, np.uint8)
        with ksmcore.Engine() as other:
            with pytest.raises(ValueError, match="another engine"):
                other.register(made)
            engine.unregister(made)
            other.register(made)
            assert other.dedup().pages_merged == 10

    def test_a_numpy_result_is_plain(self, engine):
        made = engine.full(10 * PAGE, 7, np.uint8)
        assert address(made + 1) != address(made)
        assert engine.stats().regions == 1


class TestStorage:
    @pytest.mark.parametrize("merged", [False, True])
    @pytest.mark.parametrize("order", ["C", "F"])
    @pytest.mark.parametrize("protocol", [2, 5])
    def test_pickle(self, engine, rng, protocol, order, merged):
        made = engine.array(np.asarray(rng.integers(0, 9, (64, PAGE), dtype=np.uint8), order=order))
        if merged:
            engine.dedup()
        back = pickle.loads(pickle.dumps(made, protocol))
        assert np.array_equal(back, made)
        assert back.flags.f_contiguous == made.flags.f_contiguous
        assert engine.stats().regions == 1

    def test_out_of_band_pickle(self, engine):
        made = engine.full(10 * PAGE, 7, np.uint8)
        buffers = []
        text = pickle.dumps(made, 5, buffer_callback=buffers.append)
        assert np.array_equal(pickle.loads(text, buffers=buffers), made)

    def test_save(self, engine, tmp_path, rng):
        made = engine.array(rng.normal(size=(100, 50)))
        engine.dedup()
        np.save(tmp_path / "x.npy", made)
        assert np.array_equal(np.load(tmp_path / "x.npy"), made)

    def test_readinto(self, engine, rng):
        content = rng.bytes(10 * PAGE)
        made = engine.full(10 * PAGE, 7, np.uint8)
        engine.dedup()
        assert io.BytesIO(content).readinto(made) == len(content)
        assert made.tobytes() == content

    def test_read_from_a_file_into_merged_pages(self, engine, rng, tmp_path):
        content = rng.bytes(10 * PAGE)
        (tmp_path / "x").write_bytes(content)
        made = engine.full(10 * PAGE, 7, np.uint8)
        twin = engine.full(10 * PAGE, 7, np.uint8)
        engine.dedup()
        with open(tmp_path / "x", "rb", buffering=0) as file:
            assert file.readinto(made) == len(content)
        assert made.tobytes() == content
        assert (twin == 7).all()


class TestThreads:
    def test_many_threads_make_and_drop_while_another_scans(self, engine):
        n_threads, n_rounds = 6, 60
        errors = []
        done = threading.Event()

        def work(number):
            dice = np.random.default_rng(number)
            kept = []
            try:
                for step in range(n_rounds):
                    value = int(dice.integers(0, 4))
                    n_pages = int(dice.integers(1, 40))
                    array = engine.full(n_pages * PAGE, value, np.uint8)
                    array[step % array.size] = step
                    kept.append((array, value, step))
                    if len(kept) > 5:
                        array, value, step = kept.pop(int(dice.integers(0, 5)))
                        assert array[step % array.size] == step
                        assert np.count_nonzero(array != value) <= 1
            except BaseException as error:
                errors.append(error)

        def scan():
            try:
                while not done.is_set():
                    engine.scan()
                    engine.dedup()
            except BaseException as error:
                errors.append(error)

        scanner = threading.Thread(target=scan)
        workers = [threading.Thread(target=work, args=(number,)) for number in range(n_threads)]
        for thread in (scanner, *workers):
            thread.start()
        for thread in workers:
            thread.join()
        done.set()
        scanner.join()
        assert errors == []
        gc.collect()
        assert engine.stats().regions == 0
        assert engine.stats().store_pages == 0

    def test_dropped_by_another_thread(self, engine):
        box = [engine.full(10 * PAGE, 7, np.uint8)]
        engine.dedup()
        thread = threading.Thread(target=box.clear)
        thread.start()
        thread.join()
        assert engine.stats().regions == 0


def test_many_small_arrays(engine):
    arrays = [engine.full(PAGE // 8, i % 7 + 1.0) for i in range(500)]
    assert engine.stats().regions == 500
    engine.dedup()
    assert all((array == i % 7 + 1).all() for i, array in enumerate(arrays))
    del arrays[::2]
    gc.collect()
    assert engine.stats().regions == 250
    engine._core.check()


def test_size_of_a_product_is_not_cut_off(engine):
    sizes = (2**31, 2**31, 4)
    assert math.prod(sizes) == 2**64
    with pytest.raises(ValueError, match="too big"):
        engine.empty(sizes, np.uint8)
