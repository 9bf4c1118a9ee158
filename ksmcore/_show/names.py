"""What the program calls its memory: the variables that lead there, for pictures and reports.

Looked for when a picture is made, in the program's own modules and in the functions that are
running (from Python 3.13 on), a few steps deep and for a moment only. Nothing is kept.
"""

from __future__ import annotations

import gc
import itertools
import sys
import sysconfig
import time
from collections.abc import Iterable, Iterator, Sequence
from types import FrameType, ModuleType
from typing import Any, NamedTuple

import numpy as np

from ksmcore._gate.address import place_of
from ksmcore._gate.memories import Memory, extent, is_a, one_memory
from ksmcore._gate.objects import is_hopeless, parts_by_library

__all__ = ["names_in"]

# Of what is in a picture: so many names, and words for the others.
MOST_NAMES = 3
LONGEST_NAME = 60
LONGEST_KEY = 30
# How far is looked: steps from a variable, parts of a container, variables and parts in all, time.
MOST_STEPS = 6
MOST_PARTS = 1000
MOST_VALUES = 50_000
MOST_SECONDS = 0.3
# What is mentioned has so many bytes of a range at least, or this part of it.
LEAST_BYTES = 4096
# Libraries whose objects are one thing to whoever reads a name, whatever they are made of.
WHOLES = {"pandas", "pyarrow", "xarray"}

CO_OPTIMIZED = 1  # of a function, whose variables are no dict
LEAVES_NO_TRACE = sys.hexversion >= 0x030D0000  # a look at them: see _local


class Named(NamedTuple):
    start: int
    end: int
    name: str
    where: str


def names_in(ranges: Sequence[tuple[int, int]]) -> list[str]:
    """For each (start, end) what the program calls what lies there, the largest first, and how many
    more there are: "frames, 12 of history and 3 more"; "" where nothing leads there."""
    search = _Search()
    for value, name, where in _variables():
        if search.is_over():
            break
        search.go(value, name, where)
    return [_told(search.found, start, end) for start, end in ranges]


def _told(found: Sequence[Named], start: int, end: int) -> str:
    inside = [
        one._replace(start=max(one.start, start), end=min(one.end, end))
        for one in found
        if one.start < end and one.end > start
    ]
    # Not what is a part of another; of several names for one thing, that which was found first.
    inside.sort(key=lambda one: (one.start, -one.end))
    chosen: list[Named] = []
    covered = 0
    for one in inside:
        if one.end > covered and one.end - one.start >= min(LEAST_BYTES, end - start):
            chosen.append(one)
        covered = max(covered, one.end)
    groups: dict[str, list[Named]] = {}
    for one in chosen:
        groups.setdefault(one.name.partition("[")[0] + one.where, []).append(one)
    by_size = sorted(groups.items(), key=lambda group: -sum(x.end - x.start for x in group[1]))
    told = [
        f"{len(parts)} of {whole}" if len(parts) > 1 else parts[0].name + parts[0].where
        for whole, parts in by_size
    ]
    n_more = sum(len(parts) for _, parts in by_size[MOST_NAMES:])
    more = f" and {n_more:,} more" if n_more else ""
    return ", ".join(told[:MOST_NAMES]) + more


# ---- variables ----------------------------------------------------------------------------------


def _variables() -> Iterator[tuple[object, str, str]]:
    """(value, name, where that is): of the module that was started, of functions that are running,
    and of the program's other modules."""
    main = sys.modules.get("__main__")
    modules = [module for module in list(sys.modules.values()) if _is_programs(module)]
    if isinstance(main, ModuleType):
        yield from _of_dict(vars(main), "")
    for frame in list(sys._current_frames().values()):
        yield from _of_frames(frame)
    for module in modules:
        if module is not main:
            for value, name, _ in _of_dict(vars(module), ""):
                yield value, f"{module.__name__}.{name}", ""


def _is_programs(module: object) -> bool:
    """Is it neither a library's nor ours?"""
    # Not by getattr, which has modules loaded that come when they are first used.
    names = vars(module) if isinstance(module, ModuleType) else {}
    file, name = names.get("__file__"), names.get("__name__")
    if not isinstance(file, str) or not isinstance(name, str):
        return False
    return name.partition(".")[0] != "ksmcore" and not file.startswith(_LIBRARIES)


_LIBRARIES = tuple(
    {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
)


def _of_dict(names: dict[str, object], where: str) -> Iterator[tuple[object, str, str]]:
    for name, value in list(names.items()):
        if not str(name).startswith("__"):
            yield value, str(name), where


def _of_frames(innermost: FrameType) -> Iterator[tuple[object, str, str]]:
    frame: FrameType | None = innermost
    while frame is not None:
        module = str(frame.f_globals.get("__name__"))
        if module.partition(".")[0] not in {"ksmcore", "threading"}:
            yield from _of_dict(_local(frame), f" in {frame.f_code.co_name}()")
        frame = frame.f_back


def _local(frame: FrameType) -> dict[str, object]:
    """The variables of a function that is running; nothing of a module, whose own they are.

    Before Python 3.13 they are left alone. There a look brings all of them into a dict that the
    frame keeps, which is the program's where it has asked for its `locals()`.
    """
    if LEAVES_NO_TRACE and frame.f_code.co_flags & CO_OPTIMIZED:
        return dict(frame.f_locals)
    return {}


# ---- what they lead to --------------------------------------------------------------------------


class _Search:
    def __init__(self) -> None:
        self.found: list[Named] = []
        self._seen: dict[int, object] = {}
        self._n_left = MOST_VALUES
        self._end = time.monotonic() + MOST_SECONDS

    def is_over(self) -> bool:
        return self._n_left <= 0 or time.monotonic() > self._end

    def go(
        self, value: object, name: str, where: str, steps: int = 0, is_whole: bool = False
    ) -> None:
        """Note the memory of a variable, or of a part of one. Parts of a whole have its name."""
        if is_hopeless(value) or id(value) in self._seen or len(name) > LONGEST_NAME:
            return
        self._n_left -= 1
        if self._n_left < 0 or (self._n_left % 64 == 0 and self.is_over()):
            self._n_left = min(self._n_left, 0)
            return
        # Kept meanwhile, so that no other object can have the same number.
        self._seen[id(value)] = value
        try:
            is_memory = self._note(value, name, where)
            parts = [] if is_memory or steps == MOST_STEPS else list(_parts(value))
        except (Exception, SystemExit):  # of an object that is not whole, or asks for too much
            return
        is_whole = is_whole or _is_whole(value)
        for part, words in parts:
            self.go(part, name if is_whole else name + words, where, steps + 1, is_whole)

    def _note(self, value: Any, name: str, where: str) -> bool:
        """False: it is no memory, but may have parts that are."""
        if isinstance(value, np.ndarray):
            if value.dtype.kind == "O":
                return False
            start, len_bytes = extent(value)
        else:
            memory = one_memory(value)
            if memory is None:
                return False
            if isinstance(memory, Memory):
                start, len_bytes = memory.addr, memory.len_bytes
            else:
                start, len_bytes = place_of(memory)
        self.found.append(Named(start, start + len_bytes, name, where))
        return True


def _library(value: object) -> str:
    return str(type(value).__module__).partition(".")[0]


def _is_whole(value: object) -> bool:
    return _library(value) in WHOLES


def _parts(value: Any) -> Iterator[tuple[object, str]]:
    """Of a container or an object: each part, and what is added to the name for it."""
    kind = type(value)
    known = parts_by_library(value)
    if _library(value) == "ksmcore":
        return
    if known is not None or _is_whole(value):
        parts = gc.get_referents(value) if known is None else known
        yield from ((part, "") for part in itertools.islice(parts, MOST_PARTS))
    elif isinstance(value, np.ndarray):  # of objects
        yield from _numbered(value.flat[:MOST_PARTS].tolist())
    elif isinstance(value, list):
        yield from _numbered(list.__iter__(value))
    elif isinstance(value, tuple):
        yield from _numbered(tuple.__iter__(value))
    elif isinstance(value, dict):
        for key, part in list(dict.items(value))[:MOST_PARTS]:
            if type(key) in (str, int):
                yield part, f"[{_short(repr(key))}]"
    elif is_a(kind, "torch", "Module"):
        for where in ("_parameters", "_buffers", "_modules"):
            yield from ((part, f".{name}") for name, part in vars(value)[where].items())
    elif kind.__dictoffset__ != 0:
        yield from ((part, f".{name}") for name, part in list(vars(value).items())[:MOST_PARTS])


def _numbered(parts: Iterable[object]) -> Iterator[tuple[object, str]]:
    yield from ((part, f"[{i}]") for i, part in enumerate(itertools.islice(parts, MOST_PARTS)))


def _short(text: str) -> str:
    return text if len(text) <= LONGEST_KEY else f"{text[: LONGEST_KEY - 1]}…"
