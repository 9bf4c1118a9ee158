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
from typing import NamedTuple

import numpy as np
import pytest

from helpers.memory import PAGE, extent, private_memory
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
    thing.kinds = [type("Int", (int,), {})(5), type("Text", (str,), {})("x"), Own()]
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
