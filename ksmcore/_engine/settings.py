"""Settings of an engine: their names, defaults, allowed values, and the texts for wrong ones.

A `Settings` object is valid as a whole or does not come into being.
"""

from __future__ import annotations

import contextlib
import numbers
import operator
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from ksmcore._engine.stats import PassReport

__all__ = ["InForce", "Settings"]

# What can be asked for by name; "auto" stands for the first of them that is to be had.
ORDERS = ("digest", "content")
CHECKSUMS = ("jhash", "mmh3")
GUARDS = ("userfaultfd", "userfaultfd-user", "mprotect")  # the strongest first
DIRTY_TRACKERS = ("pagemap", "checksum")  # the fastest first
MOST_THREADS = 64

_NO_WORD = object()

# How a setting that is on or off is written in the environment.
_YES_NO = {"1": True, "yes": True, "true": True, "0": False, "no": False, "false": False}

# Bound when the engine is made: trees and table are built with them.
FIXED = ("order", "checksum", "rmap_hash_size", "guard", "dirty", "hold_calls")


@dataclass(frozen=True, slots=True)
class Settings:
    """How an engine works. Raises TypeError or ValueError naming what would be allowed."""

    run: int = 0
    """What the background scanner does, as in /sys/kernel/mm/ksm/run: 0 not running, what is merged
    stays; 1 running; 2 not running, and everything becomes plain memory again, and stays
    registered. `start` and `stop` set it to 1 and 0."""
    pages_to_scan: int = 4096
    """Pages that the scanner looks at in one batch, at most."""
    sleep_millisecs: int = 20
    """How long the scanner rests after a batch. After a pass in which nothing had to be read it
    rests for so long that idling costs a third of a percent of a processor at most; a registration
    wakes it."""
    max_pages_to_merge: int = 0
    """Most pages that one batch of the scanner merges; 0: no bound."""
    target_scan_time: float | None = None
    """Seconds that a pass of the scanner should take: batches and rests are then chosen to fit,
    `sleep_millisecs` is not used, and `pages_to_scan` bounds a batch. None: by hand."""
    max_cpu: float = 70.0
    """Most that the scanner takes of one processor, in percent; this goes before the target."""
    threads: int | Literal["auto"] = "auto"
    """Threads that compute checksums and write shared pages side by side; "auto": for `scan` and
    `dedup` as many as there are processors for this process, 8 at most, and one for the background
    scanner. What is merged, and what is counted, does not depend on it."""
    smart_scan: bool = False
    """Look less often at pages that found no equal page again and again: down to every eighth pass,
    until they change. Where the kernel tells what was written they are not read anyway."""
    use_zero_pages: bool = True
    """Give back pages that hold only zeros; they need no shared page."""
    max_shared_pages: int | None = None
    """Most pages that the store may hold; None: no limit."""
    max_page_sharing: int | Literal["auto"] = "auto"
    """Most pages of memory that map one shared page; "auto": as many as there are, with copies of a
    page that is repeated in long stretches, as many as make mappings and copies cost least."""
    map_budget: int | Literal["auto"] = "auto"
    """Most memory mappings the engine may use; "auto": half of what is free without it."""
    rmap_hash_size: int = 64
    """Buckets that the rmap hash begins with; it grows by itself. Fixed."""
    checksum: Literal["jhash", "mmh3"] = "jhash"
    """What tells whether a page changed. Fixed."""
    order: Literal["digest", "content"] = "digest"
    """Key of both trees: checksum, then bytes; or the bytes alone, as the 2009 original. Fixed."""
    guard: Literal["auto", "userfaultfd", "userfaultfd-user", "mprotect"] = "auto"
    """What keeps writers out of a page that is being merged; "auto": the first of these that is
    to be had. Fixed."""
    dirty: Literal["auto", "pagemap", "checksum"] = "auto"
    """What tells which pages changed since the last pass: the kernel, so that pages which were not
    written are not read ("pagemap": Linux 6.7, order "digest"; the first write to such a page costs
    its writer a microsecond), or the checksum of every page. "auto": the first of these that is to
    be had. Fixed."""

    hold_calls: bool | Literal["auto"] = "auto"
    """Have the functions of the C library that read into memory tell of it, so that none meets a
    merge; their entries in the tables of all loaded objects are redirected for it while the engine
    is open. "auto": where the guard cannot make system calls wait (all but "userfaultfd"). True:
    also there, for direct input into pages that are merged already. Fixed."""

    def __post_init__(self) -> None:
        for name in ("use_zero_pages", "smart_scan"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, not {getattr(self, name)!r}")
        if not isinstance(self.hold_calls, bool) and self.hold_calls != "auto":
            raise TypeError(f"hold_calls must be True, False or 'auto', not {self.hold_calls!r}")
        self._whole("run", 0)
        if self.run > 2:
            raise ValueError(f"run must be 0, 1 or 2, not {self.run}")
        self._whole("pages_to_scan", 1)
        self._whole("sleep_millisecs", 0)
        self._whole("max_pages_to_merge", 0)
        self._seconds("target_scan_time", "None")
        self._seconds("max_cpu", "")
        if not 0 < self.max_cpu <= 100:
            raise ValueError(f"max_cpu must be above 0 and at most 100 percent, not {self.max_cpu}")
        self._whole("threads", 1, '"auto"', "auto")
        if self.threads != "auto" and self.threads > MOST_THREADS:
            raise ValueError(f"threads is at most {MOST_THREADS}, not {self.threads}")
        self._whole("max_shared_pages", 0, "None (no limit)", None)
        self._whole("max_page_sharing", 2, '"auto"', "auto")
        self._whole("map_budget", 0, '"auto"', "auto")
        self._whole("rmap_hash_size", 1)
        if self.rmap_hash_size > 2**28:
            raise ValueError(f"rmap_hash_size is at most 2**28 buckets, not {self.rmap_hash_size}")
        _choice("checksum", self.checksum, CHECKSUMS)
        _choice("order", self.order, ORDERS)
        _choice("guard", self.guard, ("auto", *GUARDS))
        _choice("dirty", self.dirty, ("auto", *DIRTY_TRACKERS))
        if self.dirty == "pagemap" and self.order == "content":
            raise ValueError(
                "dirty='pagemap' needs order='digest': in content order a page must be read to be "
                "found again"
            )

    def _whole(self, name: str, least: int, word_text: str = "", word: object = _NO_WORD) -> None:
        """Check a field that is a whole number of at least `least`, or one special value.

        Numbers of other libraries (NumPy's) become Python's.
        """
        value = getattr(self, name)
        if word is not _NO_WORD and type(value) is type(word) and value == word:
            return
        allowed = f"a whole number of at least {least}" + (f" or {word_text}" if word_text else "")
        try:
            number = operator.index(value)
        except TypeError:
            number = None
        if number is None or isinstance(value, bool):
            raise TypeError(f"{name} must be {allowed}, not {value!r}")
        if number < least or number >= 2**62:
            raise ValueError(f"{name} must be {allowed}, not {value!r}")
        object.__setattr__(self, name, number)

    def _seconds(self, name: str, or_none: str) -> None:
        """Check a field that is a number above 0, or None where that is allowed."""
        value = getattr(self, name)
        if value is None and or_none:
            return
        allowed = "a number above 0" + (f" or {or_none}" if or_none else "")
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"{name} must be {allowed}, not {value!r}")
        if not 0 < float(value) < float("inf"):
            raise ValueError(f"{name} must be {allowed}, not {value!r}")
        object.__setattr__(self, name, float(value))

    @classmethod
    def made(cls, **given: Any) -> Settings:
        """These settings; for the others what the environment says (KSMCORE_PAGES_TO_SCAN=100, with
        numbers and words as in Python, and yes or no), or their defaults."""
        check_names(given)
        for setting in fields(cls):
            variable = f"KSMCORE_{setting.name.upper()}"
            if setting.name not in given and os.environ.get(variable):
                try:
                    cls(**{setting.name: (value := _from_text(setting.type, os.environ[variable]))})
                except (TypeError, ValueError) as error:
                    raise ValueError(f"{variable}={os.environ[variable]!r}: {error}") from None
                given[setting.name] = value
        return cls(**given)

    def changed(self, **changes: Any) -> Settings:
        """These settings with `changes`; ValueError for a fixed one, TypeError for an unknown."""
        check_names(changes)
        for name in changes:
            if name in FIXED:
                free = ", ".join(f.name for f in fields(Settings) if f.name not in FIXED)
                raise ValueError(
                    f"{name} is fixed when an engine is made: make another one, as in "
                    f"ksmcore.Engine({name}={changes[name]!r}). Changeable are {free}"
                )
        return replace(self, **changes)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def _repr_html_(self) -> str:
        from ksmcore._show import notebook

        return notebook.of_settings(self)


@dataclass(slots=True)
class InForce:
    """What the parts of an engine go by at the moment. All of them share it, and look at it anew
    for each batch."""

    settings: Settings
    on_pass: Callable[[PassReport], object] | None = None
    """See `Engine.on_pass`."""
    tidiers: list[Callable[[bool, float], object]] = field(default_factory=list)
    """What keeps free memory that is registered gives it back: with True, what was not needed for a
    while, and now and then; with False, all. Nothing is raised."""


def check_names(given: dict[str, Any]) -> None:
    """Raise TypeError naming the valid settings when `given` has another one."""
    known = [f.name for f in fields(Settings)]
    for name in given:
        if name not in known:
            raise TypeError(f"unknown setting {name!r}; the settings are {', '.join(known)}")


def _from_text(kind: Any, text: str) -> Any:
    """A value of this type of field, or the text itself, which the field then takes or refuses."""
    word = text.strip()
    if kind.startswith("bool"):
        return _YES_NO.get(word.lower(), word)
    if "None" in kind and word.lower() == "none":
        return None
    for number in (int, float) if "float" in kind else (int,) if "int" in kind else ():
        with contextlib.suppress(ValueError):
            return number(word)
    return word


def _choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        listed = ", ".join(repr(word) for word in allowed)
        kind = ValueError if isinstance(value, str) else TypeError
        raise kind(f"{name}={value!r} is not to be had here; one of {listed}")
