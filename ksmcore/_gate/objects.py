"""What an object holds: the memory of all arrays, tensors and buffers that it is made of.

Found by going from reference to reference, as the garbage collector does: no code of the object's
runs, nothing is copied, and what is found is what the object really holds. Functions, classes and
modules are not entered, since what they lead to belongs to the program, not to the object.

Some classes written in C keep memory that no reference leads to. They are asked as pickle would ask
(protocol 5), where an array over their memory is what they answer with. Others answer with a copy:
so each is asked twice, and what is elsewhere the second time is a copy. Classes written in Python
are never asked, they hide nothing.

Objects of libraries that have a way of their own are known by name; none is imported.
"""

from __future__ import annotations

import builtins
import gc
import io
import sys
import types
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ksmcore._arrays.page_memory import PageMemory
from ksmcore._gate.address import place_of
from ksmcore._gate.memories import (
    Memory,
    UnreachableError,
    extent,
    is_a,
    one_memory,
    parts_of_tensor,
)

__all__ = ["Leaf", "PartsOf", "Reached", "is_hopeless", "parts_by_library", "reach"]

# Parts of an object of ksmcore's own, None for all others: handed down by who knows these.
PartsOf = Callable[[object], Iterable[object] | None]

# Values without parts, and without memory worth a look. Compared by identity of the class, which
# is what makes a list of a million numbers cheap.
_ATOMS = frozenset(
    {type(None), bool, int, float, complex, str, range, slice, type(...), type(NotImplemented)}
)
# What leads to the program, not to what an object is made of; and what has no large memory.
_LEFT_ALONE = (
    int,
    float,
    complex,
    str,
    type,
    types.ModuleType,
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodType,
    types.MethodWrapperType,
    types.WrapperDescriptorType,
    types.MethodDescriptorType,
    types.GetSetDescriptorType,
    types.MemberDescriptorType,
    types.CodeType,
    types.FrameType,
    types.TracebackType,
    types.GeneratorType,
    types.CoroutineType,
    types.AsyncGeneratorType,
    property,
    weakref.ReferenceType,
    io.IOBase,
    np.generic,
    np.dtype,
    np.ufunc,
)
# How deep it is asked what lies in the answer to a question.
_MOST_ASKED = 3
# Bytes in an answer that are worth a word: they are a copy of memory.
_LARGE_BYTES = 4096
_COPIES_ONLY = "it hands out copies only"
_POINTER_BYTES = 8
_HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE

# Library, classes, and what an object of theirs is made of.
_NAMED: tuple[tuple[str, tuple[str, ...], Callable[[Any], Iterable[object]]], ...] = (
    ("pyarrow", ("Table", "RecordBatch"), lambda table: table.columns),
    ("pyarrow", ("ChunkedArray",), lambda array: array.chunks),
    ("pyarrow", ("DictionaryArray",), lambda array: [*array.buffers(), array.dictionary]),
    ("pyarrow", ("Array",), lambda array: array.buffers()),
    ("torch", ("ScriptModule",), lambda module: [*module.parameters(), *module.buffers()]),
)


@dataclass(slots=True)
class Leaf:
    """One piece of memory: something that the gate takes, and where it is."""

    memory: object
    name: str
    """Of the class of what was found."""


@dataclass(slots=True)
class Reached:
    """What an object holds."""

    leaves: dict[tuple[int, int], Leaf] = field(default_factory=dict)
    """By address and length: memory that is found twice is there once."""
    unreached: Counter[str] = field(default_factory=Counter)
    """What there was no way to: how many, by class and reason."""


def is_hopeless(thing: object) -> bool:
    """Is it something that holds no memory, whatever it is?"""
    return type(thing) in _ATOMS or isinstance(thing, _LEFT_ALONE)


def parts_by_library(thing: object) -> Iterable[object] | None:
    """What an object is made of, by a way of its library's own; None for all others."""
    for library, names, parts in _NAMED:
        if is_a(type(thing), library, *names):
            return parts(thing)
    return None


def reach(thing: object, parts_of: PartsOf) -> Reached:
    """Find the memory of all that `thing` is made of."""
    walk = _Walk(parts_of)
    # The contents of modules are the program's, whatever leads there.
    modules = [module for module in list(sys.modules.values()) if hasattr(module, "__dict__")]
    walk.leave_alone(vars(module) for module in modules if vars(module) is not thing)
    walk.go([thing])
    walk.ask_all()
    return Reached(walk.leaves, walk.unreached)


class _Walk:
    """One way through an object; `above`: the one in which the question was asked whose answer this
    goes through."""

    def __init__(self, parts_of: PartsOf, above: _Walk | None = None) -> None:
        self._parts_of = parts_of
        self._depth: int = 0 if above is None else above._depth + 1
        # By id; kept, so that no other object can have the same one meanwhile.
        self._seen: dict[int, object] = {}
        self._seen_above: tuple[dict[int, object], ...] = ()
        # Classes whose objects have no memory of their own, and lead on by references only.
        self._plain: set[type] = set() if above is None else above._plain
        if above is not None:
            self._seen_above = (above._seen, *above._seen_above)
        self._to_ask: list[object] = []
        self.leaves: dict[tuple[int, int], Leaf] = {}
        self.unreached: Counter[str] = Counter()

    def leave_alone(self, things: Iterable[object]) -> None:
        """Do not enter these."""
        self._seen.update((id(thing), thing) for thing in things)

    def go(self, things: Iterable[object]) -> None:
        """Through all that can be reached by references."""
        # One iterator for each object that is being looked at: no object is too deep.
        open_ones: list[Iterator[object]] = [iter(things)]
        while open_ones:
            for thing in open_ones[-1]:
                if type(thing) in _ATOMS or self._was_seen(thing):
                    continue
                self._seen[id(thing)] = thing
                parts = self._parts(thing)
                if parts:
                    open_ones.append(iter(parts))
                    break
            else:
                open_ones.pop()

    def _was_seen(self, thing: object) -> bool:
        return id(thing) in self._seen or any(id(thing) in seen for seen in self._seen_above)

    def _parts(self, thing: Any) -> Iterable[object]:
        kind = type(thing)
        if kind is list or kind is tuple:
            return list(thing)
        if kind is dict:
            return list(thing.values())
        if isinstance(thing, _LEFT_ALONE):
            return ()
        if kind in self._plain:
            return self._parts_of_plain(thing)
        try:
            own = self._parts_of(thing)
            return self._parts_of_other(thing) if own is None else own
        except UnreachableError as error:
            self._leave_out(thing, str(error))
        except Exception as error:
            # Whatever a library raises when it is asked about an object that is not whole.
            self._leave_out(thing, f"it raises {type(error).__name__}")
        return ()

    def _parts_of_other(self, thing: Any) -> Iterable[object]:
        kind = type(thing)
        if isinstance(thing, np.ndarray):
            return self._parts_of_array(thing)
        if is_a(kind, "jaxlib", "ArrayImpl") and len(thing.sharding.device_set) > 1:
            shards: list[object] = [shard.data for shard in thing.addressable_shards]
            return shards
        known = parts_by_library(thing)
        if known is not None:
            return known
        if is_a(kind, "pyarrow", "Buffer"):
            while thing.parent is not None:
                thing = thing.parent
        memory = one_memory(thing)
        if memory is not None:
            self._add(memory, kind.__name__)
            return ()
        if is_a(kind, "torch", "Tensor"):
            return parts_of_tensor(thing)
        if is_a(kind, "polars", "DataFrame", "Series"):
            self._to_ask.append(thing)
            return ()
        if not _is_asked(kind):
            self._plain.add(kind)
            return self._parts_of_plain(thing)
        self._to_ask.append(thing)
        return _references(thing)

    def _parts_of_plain(self, thing: object) -> list[object]:
        parts = _references(thing)
        if not parts and _hides_state(type(thing)):
            self._leave_out(thing, "there is no way to its memory")
        return parts

    def _parts_of_array(self, array: np.ndarray[Any, Any]) -> Iterable[object]:
        """Its memory, as a whole: views of one array share pages."""
        if array.dtype.kind == "O":
            values: Iterable[object] = array.flat
            return iter(values)
        if array.dtype.hasobject:
            raise UnreachableError("its values are references")
        base: Any = array
        while isinstance(base.base, np.ndarray):
            base = base.base
        if isinstance(base.base, PageMemory):
            self._add(base.base, type(array).__name__)
        else:
            self._add(Memory(*extent(base), base), type(array).__name__)
        # A subclass may have more: a mask, say.
        return () if type(array) is np.ndarray else gc.get_referents(array)

    def _add(self, memory: Any, name: str) -> None:
        if isinstance(memory, Memory):
            start, len_bytes = memory.addr, memory.len_bytes
        else:
            with memoryview(memory) as view:
                if not view.contiguous:
                    raise UnreachableError("it is not contiguous")
                start, len_bytes = place_of(view)
        self.leaves.setdefault((start, len_bytes), Leaf(memory, name))

    def _leave_out(self, thing: object, why: str) -> None:
        self.unreached[f"{_name(type(thing))}: {why}"] += 1

    # ---- questions ----------------------------------------------------------------------------

    def ask_all(self) -> None:
        """Ask the objects that keep memory which no reference leads to. Last, when all that is
        reached without has been seen, so that answers lead to little else."""
        while self._to_ask:
            thing = self._to_ask.pop()
            try:
                self._ask(thing)
            except Exception as error:
                # Most that cannot be pickled has nothing but what its references lead to.
                if not _references(thing):
                    self._leave_out(thing, f"it raises {type(error).__name__} when it is asked")

    def _ask(self, thing: object) -> None:
        first = _Walk(self._parts_of, self)
        answer, n_copied = first._follow_answer(thing)
        if not first.leaves:
            self.unreached += first.unreached
            if n_copied >= _LARGE_BYTES:
                self._leave_out(thing, _COPIES_ONLY)
            return
        # The first answer is kept meanwhile, so that no copy can lie where another did.
        second = _Walk(self._parts_of, self)
        other, _ = second._follow_answer(thing)
        for place, leaf in first.leaves.items():
            if place in second.leaves:
                self.leaves.setdefault(place, leaf)
            else:
                n_copied += place[1]
        if n_copied >= _LARGE_BYTES:
            self._leave_out(thing, "it hands out copies of some of it")
        self.unreached += second.unreached
        # What both answers led to was there before they were given; the rest goes with them.
        self.leave_alone(first._seen[key] for key in first._seen.keys() & second._seen.keys())
        del answer, other

    def _follow_answer(self, thing: Any) -> tuple[object, int]:
        """The answer, to be kept as long as what it leads to; and bytes in it that are copies."""
        if is_a(type(thing), "polars", "DataFrame", "Series"):
            answer = _arrow_of_polars(thing)
        else:
            answer = thing.__reduce_ex__(5)
        parts = list(_flat(answer))
        copies = [part for part in parts if isinstance(part, bytes | bytearray)]
        self._seen.update((id(copy), copy) for copy in copies)
        self.go(parts)
        if self._depth < _MOST_ASKED:
            self.ask_all()
        return (answer, parts), sum(len(copy) for copy in copies)


def _references(thing: object) -> list[object]:
    return [part for part in gc.get_referents(thing) if not isinstance(part, type)]


def _flat(answer: Any) -> Iterator[object]:
    """What an answer is made of, so that bytes among it are known."""
    to_see = [answer]
    if isinstance(answer, tuple):
        # Items of a list or a dict come as iterators, made for the answer.
        to_see = list(answer[:3])
        to_see.extend(list(items) for items in answer[3:5] if items is not None)
    seen: dict[int, object] = {}
    while to_see:
        part = to_see.pop()
        if isinstance(part, tuple | list | dict) and id(part) not in seen:
            seen[id(part)] = part
            to_see.extend(part.values() if isinstance(part, dict) else part)
        elif id(part) not in seen:
            yield part


def _arrow_of_polars(thing: Any) -> object:
    """The same memory as pyarrow sees it. In older forms than the newest, text is converted."""
    frame = thing.to_frame() if hasattr(thing, "to_frame") else thing
    newest = sys.modules["polars"].CompatLevel.newest()
    return frame.to_arrow(compat_level=newest)


def _is_asked(kind: type) -> bool:
    """Is pickling it written in C, by other than the standard library?"""
    for name in ("__reduce_ex__", "__reduce__", "__getstate__"):
        owner = next((base for base in kind.__mro__ if name in vars(base)), object)
        if not _is_standard(owner) and not isinstance(vars(owner)[name], types.FunctionType):
            return True
    return False


def _hides_state(kind: type) -> bool:
    """Has it a state in C, beside what is the standard library's, attributes and slots?"""
    own: list[type] = []
    for base in kind.__mro__:
        if _is_standard(base):
            break
        own.append(base)
    if not own:
        return False
    n_words = (kind.__dictoffset__ > 0) + (kind.__weakrefoffset__ > 0)
    for one in own:
        n_words += sum(isinstance(x, types.MemberDescriptorType) for x in vars(one).values())
    return kind.__basicsize__ > base.__basicsize__ + n_words * _POINTER_BYTES


def _is_standard(kind: type) -> bool:
    root = str(kind.__module__).partition(".")[0]
    if root == "builtins":
        # Where an extension forgets to say whose its classes are, they seem to be Python's.
        return vars(builtins).get(kind.__name__) is kind or not kind.__flags__ & _HEAP_TYPE
    return root in sys.stdlib_module_names


def _name(kind: type) -> str:
    root = str(kind.__module__).partition(".")[0]
    return kind.__qualname__ if root == "builtins" else f"{root}.{kind.__qualname__}"
