"""Registration: which memory belongs to which engine, and who holds it meanwhile.

The registration lock lets one registration at a time happen in the process, so that two engines
cannot take the same buffer. Finalisers never take it. It is taken after the pass lock.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import cast

import numpy as np

from ksmcore._arrays import arena
from ksmcore._arrays.page_memory import PageMemory
from ksmcore._core.core import Core
from ksmcore._core.scopes import HoldScope, LockScope
from ksmcore._engine.area import Area, Registers
from ksmcore._engine.closing import Closing
from ksmcore._engine.gathering import (
    Gathered,
    Unreached,
    admit_those,
    as_one,
    gather,
    lies_within,
    not_taken,
    together,
)
from ksmcore._engine.region import Region, Site, checked_name
from ksmcore._gate.buffers import (
    Admission,
    Export,
    Known,
    admit,
    not_a_buffer,
    release_all,
)
from ksmcore._gate.caller import caller
from ksmcore._gate.phase import Phases
from ksmcore._gate.ranges import disjoint, gaps
from ksmcore._kernel import forks, procfs
from ksmcore._kernel.per_process import PerProcess
from ksmcore._kernel.syscalls import page_bytes

__all__ = ["Registrar"]

_Memories = weakref.WeakValueDictionary[int, PageMemory]  # by address of the first byte

_registrars: weakref.WeakSet[Registrar] = weakref.WeakSet()
_registering = PerProcess(threading.RLock)
_region_ids = itertools.count(1)


def _with_gaps(buffer: object) -> object:
    """Of an array with gaps in memory of our own (see `Engine.rows`): that memory."""
    if not isinstance(buffer, np.ndarray) or buffer.flags.forc:
        return buffer
    base: object = buffer
    while isinstance(base, np.ndarray):
        base = base.base
    return base if isinstance(base, PageMemory) else buffer


class Registrar:
    """Registers buffers with the core of one engine, and gives them back; of one process.

    `engine` gives regions what they keep alive, `notice` is told of each registration.
    """

    page_bytes: int = page_bytes()

    def __init__(
        self, core: Core, engine: Callable[[], object], notice: Callable[[], object]
    ) -> None:
        self._core = core
        self._engine = engine
        self._notice = notice
        self._generation = forks.generation()
        self._regions: dict[int, Region] = {}
        self._memories: _Memories = weakref.WeakValueDictionary()
        self._phases = Phases()
        # Buffers that stay held because they could not be taken out of the core again.
        self._stranded: list[Admission] = []
        _registrars.add(self)

    def is_current(self) -> bool:
        """False in a forked child: there the core is empty, and all regions count as closed."""
        return self._generation == forks.generation()

    def end(self) -> None:
        """Nothing is registered here any more, or all of it in a parent process: let go of it."""
        _registrars.discard(self)
        for region in self.regions:
            region.close()

    # ---- in -----------------------------------------------------------------------------------

    def register(
        self, buffer: object, *, name: str | None = None, privatize: bool = False
    ) -> Region | Area:
        """See `Engine.register`."""
        if isinstance(buffer, Closing):
            raise not_a_buffer(buffer)
        checked_name(name)
        with LockScope(_registering.get()):
            one = as_one(buffer)
            if one is None:
                return self._register_parts(buffer, name, privatize)
            export = self._export(one)
            try:
                if self._find(export) is not None:
                    raise ValueError(f"this buffer ({_shown(export)}) is already registered")
            except BaseException:
                export.release()
                raise
            admissions = admit([export], page_bytes=self.page_bytes, privatize=privatize)
            return self._add_all(admissions, name)[0]

    def _register_parts(self, thing: object, name: str | None, privatize: bool) -> Area:
        """Register what is found in an object and is not registered yet."""
        gathered = self._gather(thing)
        try:
            new = self._new(gathered, self._own_ranges())
        except BaseException:
            gathered.release()
            raise
        if not new:
            raise ValueError(
                f"all of this {type(thing).__name__} that can be merged is registered already"
            )
        admissions = admit_those(
            new, gathered.unreached, page_bytes=self.page_bytes, privatize=privatize
        )
        engine = cast(Registers, self._engine())
        return Area(engine, self._add_all(admissions, name), gathered.unreached)

    def register_all(self, buffers: Sequence[object]) -> tuple[list[tuple[int, int]], Unreached]:
        """Register the buffers that are not, all or none of them; returns all page ranges. Of what
        is found in objects, that which cannot be is counted."""
        ranges: list[tuple[int, int]] = []
        unreached = Unreached()
        missing: list[Export] = []
        objects: list[Gathered] = []
        with LockScope(_registering.get()):
            try:
                for buffer in buffers:
                    if isinstance(buffer, Region):
                        if not self._owns(buffer) or buffer.closed:
                            raise ValueError(f"{buffer!r} is not registered with this engine")
                        ranges.append((buffer.addr, buffer.addr + buffer.nbytes))
                        continue
                    one = as_one(buffer)
                    if one is None:
                        objects.append(self._gather(buffer))
                        continue
                    export = self._export(one)
                    missing.append(export)
                    ranges.append((export.addr, export.end))
                    if self._find(export) is not None:
                        missing.pop().release()
                taken = [*self._own_ranges(), *((one.addr, one.end) for one in missing)]
                found = together(objects)
                ranges += [(export.addr, export.end) for export in found.exports]
                new = self._new(found, disjoint(taken))
                unreached += found.unreached
                admissions = admit_those(
                    new,
                    unreached,
                    page_bytes=self.page_bytes,
                    needed=len(new) >= len(found.exports),
                )
            except BaseException:
                release_all(missing)
                for gathered in objects:
                    gathered.release()
                raise
            try:
                # Last, as it lets go of what it refuses.
                admissions += admit(_outermost(missing), page_bytes=self.page_bytes)
            except BaseException:
                release_all(admissions)
                raise
            self._add_all(admissions)
        return disjoint(ranges), unreached

    def _gather(self, thing: object, known: Known | None = None) -> Gathered:
        return gather(thing, lambda memory, name: self._export(memory, known, name), self._parts_of)

    def _parts_of(self, thing: object) -> list[object] | None:
        """Of a region or an area: the memory; an engine is not entered."""
        if isinstance(thing, Region):
            return [] if thing.closed else [thing._view()]
        if isinstance(thing, Area):
            return list(thing.regions)
        return [] if type(thing) is type(self._engine()) else None

    def _own_ranges(self) -> list[tuple[int, int]]:
        return disjoint(
            (addr, addr + n_pages * self.page_bytes) for _, addr, n_pages in self._core.regions()
        )

    def _new(self, gathered: Gathered, taken: list[tuple[int, int]]) -> list[Export]:
        """What of it lies in none of these ranges, and is not registered with another engine."""
        others = [other for other in list(_registrars) if other is not self and other.is_current()]
        theirs = disjoint(one for other in others for one in other._own_ranges())
        return not_taken(gathered, taken, theirs)

    def _add_all(self, admissions: list[Admission], name: str | None = None) -> list[Region]:
        """Register what the gate has let in, all or none of it; the others are let go."""
        made: list[Region] = []
        frame = caller()[0]
        registered_at = frame.f_code.co_filename, frame.f_lineno
        del frame  # which leads back here
        try:
            self._phases.warn(admission.export for admission in admissions)
            while admissions:
                made.append(self._add(admissions.pop(0), name, registered_at))
        except BaseException:
            release_all(admissions)
            for region in made:
                region.close()
            raise
        self._notice()
        return made

    def _add(self, admission: Admission, name: str | None, registered_at: Site) -> Region:
        """On any error the buffer is let go."""
        export, traits = admission.export, admission.traits
        region_id = next(_region_ids)
        try:
            if export.settle is not None:
                export.settle()
        except BaseException:
            admission.release()
            raise
        try:
            if traits.must_privatize:
                self._core.privatize(export.addr, export.n_pages, traits.region_flags)
            self._core.add(region_id, export.addr, export.n_pages, traits.region_flags)
            region = Region(
                region_id,
                export,
                core=self._core,
                holder=self,
                engine=self._engine(),
                name=name,
                registered_at=registered_at,
            )
            self._regions[region_id] = region
            self._phases.add(export)
        except BaseException:
            # Once it is in the core another thread's pass may have merged it already.
            self._stranded.append(admission)
            self._core.remove(region_id, export.addr, True)
            self._regions.pop(region_id, None)
            self._stranded.remove(admission)
            admission.release()
            raise
        return region

    def allocate(self, n_bytes: int, offset: int = 0) -> PageMemory:
        """Memory that is registered from birth; see `PageMemory`."""
        memory = PageMemory(self._core, next(_region_ids), n_bytes, self._engine(), offset)
        self._memories[memory.addr + offset] = memory
        self._notice()
        return memory

    # ---- out ----------------------------------------------------------------------------------

    def unregister(self, buffer: Region | object) -> None:
        """See `Engine.unregister`."""
        if isinstance(buffer, Region):
            if not self._owns(buffer):
                raise ValueError("this region belongs to another engine")
            buffer.close()
            return
        if isinstance(buffer, Area):
            if buffer._engine is not self._engine():
                raise ValueError("this area belongs to another engine")
            buffer.close()
            return
        one = as_one(buffer)
        if one is None:
            with self._gather(buffer) as gathered:
                self._unregister_within(gathered.exports, type(buffer).__name__)
            return
        with self._export(one) as export:
            found = self._find(export)
            if found is None or found[1:] != (export.addr, export.n_pages):
                what = "not registered with this engine"
                if found is not None:
                    what += ", but lies in memory that is, as a whole (the allocator's, say)"
                raise ValueError(f"this buffer ({_shown(export)}) is {what}")
            region = self._regions.get(found[0])
            if region is None:
                self._restore(found[0], export.addr)
        if region is not None:
            region.close()

    def _unregister_within(self, exports: list[Export], name: str) -> None:
        """All regions that lie in these. What cannot be taken out does not keep the others in."""
        failed: Exception | None = None
        held = [(export.addr, export.end) for export in exports]
        found = [
            (region_id, addr)
            for region_id, addr, n_pages in self._core.regions()
            if lies_within(addr, addr + n_pages * self.page_bytes, held)
        ]
        if not found:
            raise ValueError(f"nothing of this {name} is registered with this engine by itself")
        for region_id, addr in found:
            region = self._regions.get(region_id)
            try:
                if region is None:
                    self._restore(region_id, addr)
                else:
                    region.close()
            except (MemoryError, RuntimeError, OSError) as error:
                failed = failed or error
        if failed is not None:
            raise failed

    def close_region(self, region: Region) -> None:
        """See `Region.close`."""
        export = region._export
        if export is None:
            return
        if self.is_current():
            self._restore(region._id, region.addr)
            if self._regions.pop(region._id, None) is not None:
                self._phases.remove(export)
        region._export = None
        export.release()

    def restore_all(self, *, keep: bool = False) -> None:
        """Make everything plain memory, and take it out of the core (or `keep` it there).

        Raises:
            MemoryError: there is not enough for all of it; nothing was changed then. Or, where less
                was to be had than was told, what is still merged stays so.
        """
        regions = self._core.regions()
        self._check_room(sum(self._n_merged(region_id, addr) for region_id, addr, _ in regions))
        if not keep:
            for region in self.regions:
                region.close()
            regions = self._core.regions()
        for region_id, addr, _ in regions:
            self._restore(region_id, addr, keep=keep)

    def _restore(self, region_id: int, addr: int, *, keep: bool = False) -> None:
        """Take a region out of the core (or `keep` it there), as plain memory; MemoryError when
        there is not enough."""
        self._check_room(self._n_merged(region_id, addr))
        self._core.remove(region_id, addr, True, keep)

    def _n_merged(self, region_id: int, addr: int) -> int:
        n_pages: int = self._core.tally(region_id, addr)["pages_merged"]
        return n_pages

    def _check_room(self, n_pages: int) -> None:
        needed = n_pages * self.page_bytes
        if needed > 0 and needed > (there := procfs.available_bytes()):
            raise MemoryError(
                f"to unmerge this memory takes {needed:,} bytes, and {there:,} are to be had (of "
                "the machine, or under the control group's limit); it stays merged"
            )

    # ---- held meanwhile -----------------------------------------------------------------------

    def hold(self, buffer: Region | object) -> AbstractContextManager[None]:
        """See `Engine.hold`."""

        def touched(first_byte: int, len_bytes: int) -> tuple[int, int]:
            start = first_byte - first_byte % self.page_bytes
            return start, -(-(first_byte + len_bytes - start) // self.page_bytes)

        # At once: a region that is closed is refused here, whether the block is entered or not.
        view = buffer._view() if isinstance(buffer, Region) else None

        def take() -> Export | Gathered:
            one = as_one(buffer) if view is None else view
            return self._gather(buffer, touched) if one is None else self._export(one, touched)

        return HoldScope(self._core, take)

    def hold_ranges(
        self, buffers: Sequence[object], held: contextlib.ExitStack
    ) -> tuple[list[tuple[int, int]], Unreached]:
        """(address, end) of each buffer's pages, kept mapped until `held` is closed, and what of
        objects there is no way to; without buffers, of everything registered here."""
        unreached = Unreached()
        if not buffers:
            return list(self._all_ranges(held)), unreached
        ranges: list[tuple[int, int]] = []
        unknown: list[Export] = []
        found: list[Export] = []
        for buffer in buffers:
            one = buffer._view() if isinstance(buffer, Region) else as_one(buffer)
            if one is None:
                gathered = self._gather(buffer)
                held.callback(gathered.release)
                unreached += gathered.unreached
                found += gathered.exports
                continue
            export = held.enter_context(self._export(one))
            ranges.append((export.addr, export.end))
            if self._find(export) is None:
                unknown.append(export)
        admit(unknown, page_bytes=self.page_bytes)
        own = self._own_ranges()
        known = [one for one in found if not list(gaps(one.addr, one.end, own))]
        ranges += [(export.addr, export.end) for export in known]
        unknown = [one for one in found if list(gaps(one.addr, one.end, own))]
        admissions = admit_those(unknown, unreached, page_bytes=self.page_bytes, needed=not known)
        ranges += [(one.export.addr, one.export.end) for one in admissions]
        return ranges, unreached

    def _all_ranges(self, held: contextlib.ExitStack) -> Iterator[tuple[int, int]]:
        for memory in list(self._memories.values()):
            export = held.enter_context(self._export(memory))
            yield export.addr, export.end
        for region in self.regions:
            # One that another thread closes meanwhile is simply not counted.
            with contextlib.suppress(ValueError):
                export = held.enter_context(self._export(region._view()))
                yield export.addr, export.end
        arrays = arena.pin()
        held.callback(arena.unpin)
        yield from (array for array in arrays if self.is_registered(*array))

    # ---- what is there ------------------------------------------------------------------------

    @property
    def regions(self) -> tuple[Region, ...]:
        """The open regions, in the order of their registration; arrays made by the engine aside."""
        return tuple(self._regions.values())

    def is_registered(self, addr: int, end: int) -> bool:
        """Is any of this memory registered with this engine?"""
        try:
            return self._core.find(addr, end - addr) is not None
        except ValueError:
            return True  # in part

    def _owns(self, region: Region) -> bool:
        return region._engine is self._engine()

    def _export(
        self, buffer: object, known: Known | None = None, name: str | None = None
    ) -> Export:
        """The buffer, held. Of an array made by this engine all pages count, also a last one that
        is not full: nothing else is there."""
        return Export(_with_gaps(buffer), self.page_bytes, known or self._known, name)

    def _known(self, first_byte: int, len_bytes: int) -> tuple[int, int] | None:
        memory = self._memories.get(first_byte)
        if memory is None or memory.len_bytes != len_bytes:
            return None
        return memory.addr, memory.n_pages

    def _find(self, export: Export) -> tuple[int, int, int] | None:
        """The region of this engine that holds these pages; ValueError when only some of them are
        registered, or any with another engine."""
        for other in list(_registrars):
            if (
                other is not self
                and other.is_current()
                and other.is_registered(export.addr, export.end)
            ):
                raise ValueError(
                    f"this buffer ({_shown(export)}) is registered, at least in part, with another "
                    "engine; unregister it there first"
                )
        return self._core.find(export.addr, export.n_bytes)


def _shown(export: Export) -> str:
    return f"{export.n_pages} pages at {export.addr:#x}"


def _outermost(exports: list[Export]) -> list[Export]:
    """Those that are no part of another, and not the same once more; the others are let go."""
    wanted: list[Export] = []
    covered = 0
    for export in sorted(exports, key=lambda one: (one.addr, -one.end)):
        if export.end > covered:
            wanted.append(export)
            covered = export.end
        else:
            export.release()
    return wanted
