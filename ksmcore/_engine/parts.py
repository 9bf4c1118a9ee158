"""What an engine is put together of, in one process: each part knows the core, the settings in
force, and the one callable that it needs."""

from __future__ import annotations

import functools
import weakref
from dataclasses import dataclass
from typing import cast

from ksmcore._core.core import Core
from ksmcore._core.null_core import NullCore
from ksmcore._engine.features import check_tracker, choose_guard
from ksmcore._engine.passes import Passes
from ksmcore._engine.registrar import Registrar
from ksmcore._engine.scanner import Scanner
from ksmcore._engine.settings import InForce, Settings
from ksmcore._kernel import forks

__all__ = ["Parts", "make_core", "make_parts"]


@dataclass(frozen=True, slots=True)
class Parts:
    generation: int
    """Of the process, see `forks.generation`."""
    in_force: InForce
    registrar: Registrar
    passes: Passes
    scanner: Scanner


def make_core(made: Settings, *, disabled: bool) -> Core:
    """The core of an engine with these settings; `disabled`: one that merges nothing."""
    if made.dirty == "pagemap":
        check_tracker()
    core = Core(
        order=made.order,
        checksum=made.checksum,
        guard=choose_guard(made.guard),
        any_guard=made.guard == "auto",
        with_pagemap=True,
        with_tracker=made.dirty != "checksum",
        n_buckets=made.rmap_hash_size,
        hold_calls=made.hold_calls is not False and not disabled,
        hold_always=made.hold_calls is True,
    )
    return cast(Core, NullCore(core)) if disabled else core


def make_parts(core: Core, engine: object, in_force: InForce) -> Parts:
    passes = Passes(core, in_force)
    scanner = Scanner(passes, in_force)
    notice = functools.partial(scanner.wake, only_if_resting=True)
    registrar = Registrar(core, weakref.ref(engine), notice)
    return Parts(forks.generation(), in_force, registrar, passes, scanner)
