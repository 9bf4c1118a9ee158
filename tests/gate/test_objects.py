"""What an object holds: found by reference, each piece once, with nothing done to the object."""

import collections
import dataclasses
import functools
import gc
import io
import logging
import sys
import threading
import types
import warnings
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np
import pytest

from helpers.memory import PAGE, extent, private_memory
from helpers.processes import run_python
from ksmcore._gate import capsules, memories, objects

N_BYTES = 8 * PAGE


def block(n_bytes=N_BYTES):
    return np.ones(n_bytes, np.uint8)


def places(thing, parts_of=lambda _: None):
    """(address, end) of all memory that is found, by address."""
    found = objects.reach(thing, parts_of)
    return sorted((start, start + n_bytes) for start, n_bytes in found.leaves)


def named(thing):
    return dict(objects.reach(thing, lambda _: None).unreached)


# --- by reference ---------------------------------------------------------------------------------


@dataclasses.dataclass
class Plain:
    values: object


@dataclasses.dataclass(slots=True)
class Slotted:
    values: object


class Pair(NamedTuple):
    first: object
    second: object


class Own(dict):
    pass


class Refuses:
    """Pickling it would run code, and fail."""

    def __init__(self, values):
        self.values = values

    def __reduce_ex__(self, protocol):
        raise AssertionError("asked")

    def __getstate__(self):
        raise AssertionError("asked")


HOLDERS = {
    "list": lambda x: [1, x],
    "tuple": lambda x: ("a", x),
    "dict": lambda x: {"x": x},
    "ordered": lambda x: collections.OrderedDict(x=x),
    "default": lambda x: collections.defaultdict(list, x=[x]),
    "deque": lambda x: collections.deque([x]),
    "mapping proxy": lambda x: types.MappingProxyType({"x": x}),
    "chain": lambda x: collections.ChainMap({}, {"x": x}),
    "named tuple": lambda x: Pair(1, x),
    "namespace": lambda x: types.SimpleNamespace(x=x),
    "dataclass": Plain,
    "with slots": Slotted,
    "subclass of dict": lambda x: Own(x=x),
    "not to be pickled": Refuses,
    "partial": lambda x: functools.partial(print, x),
    "array of objects": lambda x: np.array([None, [x]], object),
    "nested": lambda x: [{"a": (Plain([Slotted({"b": x})]),)}],
    "dict view": lambda x: {"x": x}.values(),
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_holders(holder):
    values = block()
    assert places(HOLDERS[holder](values)) == [extent(values)]


def test_a_million_deep_and_in_circles():
    values = block()
    deep = [values]
    for _ in range(100_000):
        deep = [deep]
    circle = Plain(deep)
    deep.append(circle)
    circle.itself = circle
    assert places(circle) == [extent(values)]
    # Taken apart by hand: the interpreter itself may not like to free what is so deep.
    deep.pop()
    while deep and type(deep[0]) is list:
        deep = deep[0]


def test_each_piece_once():
    values = block()
    assert places([values, {"again": values}, values[: 2 * PAGE], values[::2]]) == [extent(values)]


def test_views_stand_for_the_array_that_they_lie_in():
    values = np.ones((64, PAGE), np.uint8)
    assert places([values[3:5, 100:]]) == [extent(values)]
    assert places([values.T[::-1]]) == [extent(values)]
    assert places(np.broadcast_to(values, (1000, 64, PAGE))) == [extent(values)]


def test_masked_arrays_with_their_masks():
    values = np.ma.masked_array(block(), np.zeros(N_BYTES, bool))
    assert places([values]) == sorted([extent(values.data), extent(values.mask)])


def test_buffers_of_every_kind():
    for make in (bytes, bytearray, lambda n: memoryview(bytearray(n))):
        values = make(N_BYTES)
        start, end = extent(np.frombuffer(values, np.uint8))
        assert places({"values": values}) == [(start, end)]
    memory = private_memory(8)
    assert len(places([memory])) == 1


def test_the_program_is_not_entered():
    values = block()

    class Local:
        kept = values

        def method(self):
            return values

    def closure():
        return values

    thing = Plain([Local, Local().method, closure, (x for x in values), sys, logging, Local()])
    assert places(thing) == []
    assert named(thing) == {}


def test_what_a_program_has_around_its_data_is_no_trouble():
    values = block()
    thing = Plain(values)
    thing.log = logging.getLogger("anything")
    thing.lock = threading.Lock()
    thing.thread = threading.current_thread()
    thing.file = io.StringIO()
    thing.random = np.random.default_rng(1)
    thing.error = ValueError("x")
    assert extent(values) in places(thing)
    assert named(thing) == {}


def test_nothing_is_held_afterwards():
    values = block()
    before = sys.getrefcount(values)
    found = objects.reach([Plain(values)], lambda _: None)
    del found
    gc.collect()
    assert sys.getrefcount(values) == before


def test_many_small_things_are_quick():
    thing = {"numbers": list(range(300_000)), "names": [str(n) for n in range(1000)]}
    assert places(thing) == []


def test_variable_strings_are_named():
    if not hasattr(getattr(np, "dtypes", None), "StringDType"):
        pytest.skip("this NumPy has no StringDType")
    assert named([np.zeros(100, np.dtypes.StringDType())]) == {
        "numpy.ndarray: its values are references": 1
    }


@pytest.mark.parametrize("thing", [1, "x", None, 1.5, range(9), len, sys, int, io.BytesIO()])
def test_hopeless(thing):
    assert objects.is_hopeless(thing)


def test_not_hopeless():
    assert not any(map(objects.is_hopeless, [[], {}, b"", block(), object(), Plain(1)]))


# --- by protocols ---------------------------------------------------------------------------------


class Exports:
    """As arrays of other libraries do, with NumPy's own capsules."""

    def __init__(self, values, device=1, versions=True):
        self.values, self.device, self.versions = values, device, versions

    def __dlpack_device__(self):
        return self.device, 0

    def __dlpack__(self, **how):
        if how and not self.versions:
            raise TypeError("unexpected keyword")
        return self.values.__dlpack__(**how)


class Describes:
    def __init__(self, values):
        self.__array_interface__ = values.__array_interface__
        self.values = values

    __array_interface__ = None


@pytest.mark.parametrize("versions", [False, True])
@pytest.mark.parametrize(
    "pick", [lambda x: x, lambda x: x.T, lambda x: x[::-1], lambda x: x[3:5, ::2], lambda x: x[:0]]
)
def test_capsules(pick, versions):
    values = pick(np.ones((16, PAGE // 4), np.float32))
    memory = memories.one_memory(Exports(values, versions=versions))
    start, n_bytes = memories.extent(values)
    assert memory.len_bytes == n_bytes
    assert n_bytes == 0 or memory.addr == start


def test_capsules_give_back_what_they_hold():
    values = block()
    before = sys.getrefcount(values)
    for versions in (False, True):
        memory = memories.one_memory(Exports(values, versions=versions))
        view = memory.view()
        assert view.readonly
        assert view[5] == 1
        del memory
        gc.collect()
        # The view holds it.
        assert sys.getrefcount(values) > before
        del view
        gc.collect()
        assert sys.getrefcount(values) == before


def test_a_capsule_is_used_once():
    capsule = block().__dlpack__()
    capsules.CapsuleMemory(capsule)
    with pytest.raises(ValueError, match=r"(?i)capsule"):
        capsules.CapsuleMemory(capsule)
    for wrong in (None, 7, object()):
        with pytest.raises((ValueError, TypeError)):
            capsules.CapsuleMemory(wrong)


def test_copies_in_capsules_are_told():
    values = block()
    try:
        capsule = values.__dlpack__(max_version=(1, 0), copy=True)
    except TypeError:
        pytest.skip("this NumPy does not copy into capsules")
    with pytest.raises(ValueError, match="copies"):
        capsules.CapsuleMemory(capsule)


def test_other_devices_are_named():
    with pytest.raises(memories.UnreachableError, match="device of kind 2"):
        memories.one_memory(Exports(block(), device=2))
    assert named([Exports(block(), device=2)]) == {
        f"{__name__.partition('.')[0]}.Exports: it is on a device of kind 2": 1
    }


def test_array_interface():
    values = block().reshape(8, PAGE)
    assert places([Describes(values)]) == [extent(values)]
    assert places(Describes(values[::2])) == [(extent(values)[0], extent(values)[0] + 7 * PAGE)]


def test_an_interface_with_bytes_is_a_copy():
    class Copies:
        @property
        def __array_interface__(self):
            return {"data": bytes(N_BYTES), "shape": (N_BYTES,), "typestr": "|u1", "version": 3}

    assert list(named([Copies()])) == [
        f"{__name__.partition('.')[0]}.{Copies.__qualname__}: it hands out copies only"
    ]


def test_an_object_that_raises_is_named():
    class Broken:
        def __dlpack_device__(self):
            raise RuntimeError("deleted")

        def __dlpack__(self):
            raise RuntimeError("deleted")

    values = block()
    found = objects.reach([Broken(), values], lambda _: None)
    assert len(found.leaves) == 1
    assert [text.partition(": ")[2] for text in found.unreached] == ["deleted"]


def test_parts_that_are_handed_down():
    values = block()

    class Known:
        pass

    assert places([Known()], lambda x: [values] if type(x) is Known else None) == [extent(values)]


# --- libraries ------------------------------------------------------------------------------------


def storage_of(tensor):
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.data_ptr() + storage.nbytes()


def test_tensors_stand_for_their_storage():
    torch = pytest.importorskip("torch")
    packed = torch.ones(8 * PAGE, requires_grad=True)
    assert places([packed[5:9], packed.detach()[::3], packed]) == [storage_of(packed)]
    assert packed.untyped_storage().resizable()
    half = torch.ones(4 * PAGE, dtype=torch.bfloat16)
    assert places(half) == [storage_of(half)]
    assert places([half.untyped_storage()]) == [storage_of(half)]


def test_modules_and_optimizers():
    torch = pytest.importorskip("torch")
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.BatchNorm1d(64))
    model.register_buffer("extra", torch.ones(PAGE), persistent=False)
    expected = sorted(storage_of(t) for t in [*model.parameters(), *model.buffers()])
    assert places(model) == expected
    assert set(places(model.state_dict())) < set(expected)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(4, 64)).sum().backward()
    optimizer.step()
    assert len(places(optimizer)) > 2 * len(list(model.parameters()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.script(torch.nn.Linear(64, 64))
    assert places(scripted) == sorted(storage_of(t) for t in scripted.parameters())


@pytest.mark.filterwarnings("ignore:Sparse")
def test_tensors_of_other_layouts():
    torch = pytest.importorskip("torch")
    dense = torch.eye(64)
    for sparse in (dense.to_sparse(), dense.to_sparse_csr(), dense.to_sparse_csc()):
        assert storage_of(
            sparse.values() if sparse.layout != torch.sparse_coo else sparse._values()
        ) in places([sparse])
    assert named([torch.empty(5, device="meta")]) == {"torch.Tensor: it is on the device 'meta'": 1}


def test_jax_arrays():
    """In a process of its own: JAX has threads, and warns of forks."""
    if find_spec("jax") is None:
        pytest.skip("no jax")
    done = run_python(
        """
        import jax
        from ksmcore._gate import objects

        for dtype in ("float32", "bfloat16", "int8"):
            values = jax.numpy.ones(8 * 4096, dtype)
            start = values.unsafe_buffer_pointer()
            found = objects.reach({"w": values}, lambda _: None)
            assert list(found.leaves) == [(start, values.nbytes)], found
            del found
            values.delete()
            found = objects.reach([values], lambda _: None)
            assert not found.leaves
            assert found.unreached.total() == 1, found
        """,
        flags=(),
    )
    assert done.returncode == 0, done.stderr


def test_arrow():
    pa = pytest.importorskip("pyarrow")
    table = pa.table(
        {
            "x": np.arange(10_000.0),
            "text": [f"value {n}" for n in range(10_000)],
            "kind": pa.array(["a", "b"] * 5000).dictionary_encode(),
            "lists": [[1, 2]] * 10_000,
        }
    )
    buffers = [b for column in table.columns for c in column.chunks for b in c.buffers() if b]
    buffers += [b for b in table["kind"].chunk(0).dictionary.buffers() if b]
    expected = sorted({(b.address, b.address + b.size) for b in buffers})
    assert places(table) == expected
    assert set(places([table["x"], table["text"].chunk(0)])) < set(expected)
    one = table["x"].chunk(0).slice(7, 9)
    assert places(one) == places(table["x"])
    part = one.buffers()[1].slice(80, 100)
    assert places([part]) == places(table["x"])


def test_frames():
    pd = pytest.importorskip("pandas")
    values = np.arange(20_000.0)
    frame = pd.DataFrame({"x": values, "y": np.arange(20_000)})
    frame["more"] = pd.array([1, None] * 10_000, dtype="Int64")
    frame["kind"] = pd.Categorical(["a", "b"] * 10_000)
    view = frame["y"]
    found = places(frame)
    assert set(places(view)) < set(found)
    assert sum(end - start for start, end in found) >= 20_000 * (8 + 8 + 8 + 1 + 1)
    pytest.importorskip("pyarrow")
    arrow = pd.Series(values, dtype="float64[pyarrow]")
    assert sum(end - start for start, end in places([arrow])) >= values.nbytes


def test_polars():
    pl = pytest.importorskip("polars")
    pytest.importorskip("pyarrow")
    frame = pl.DataFrame(
        {"x": np.arange(20_000.0), "y": [None, 1] * 10_000, "t": ["long" * 9] * 20_000}
    )
    found = places(frame)
    assert found == places(frame)
    assert sum(end - start for start, end in found) > 20_000 * (8 + 8 + 16)
    assert set(places([frame["x"]])) < set(found)


def test_xarray():
    xr = pytest.importorskip("xarray")
    values = np.ones((64, PAGE))
    assert extent(values) in places(xr.Dataset({"t": (("x", "y"), values)}))


def test_estimators():
    """The nodes of a tree lie in C: they are asked for, and no copy is taken for them."""
    ensemble = pytest.importorskip("sklearn.ensemble")
    neighbors = pytest.importorskip("sklearn.neighbors")
    rng = np.random.default_rng(0)
    x = rng.random((2000, 5))
    y = (x[:, 0] > rng.random(2000)).astype(int)
    forest = ensemble.RandomForestClassifier(3, random_state=0).fit(x, y)
    found = places(forest)
    for tree in forest.estimators_:
        nodes = tree.tree_.__getstate__()["nodes"]
        assert extent(nodes) in found
    again = places(forest)
    assert found == again
    near = neighbors.KNeighborsClassifier().fit(x, y)
    assert extent(near._fit_X) in places(near)


def test_copies_are_told_from_memory():
    spatial = pytest.importorskip("scipy.spatial")
    tree = spatial.cKDTree(np.random.default_rng(0).random((20_000, 3)))
    assert extent(tree.data) in places([tree])
    assert named([tree]) == {"scipy.cKDTree: it hands out copies of some of it": 1}
