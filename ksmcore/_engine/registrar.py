"""Registration: which memory belongs to which engine, and who holds it meanwhile.

Called by users, as methods of an engine, and by the passes of the engine. Calls the gate, and the
core that keeps the page ranges.

The registration lock lets one registration at a time happen in the process, so that two engines
cannot take the same buffer. Finalisers never take it, and a forked child makes it anew: a thread
that held it does not exist there.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager

import numpy as np

from ksmcore._arrays import arena
from ksmcore._arrays.making import ArrayMaker
from ksmcore._arrays.page_memory import PageMemory
from ksmcore._core.core import Core
from ksmcore._engine.region import Region, disjoint
from ksmcore._gate import buffers as gate
from ksmcore._gate.phase import warn_of_phase
from ksmcore._kernel import forks, procfs

__all__ = ["Registrar"]

_Memories = weakref.WeakValueDictionary[int, PageMemory]  # by address of the first byte

_registrars: weakref.WeakSet[Registrar] = weakref.WeakSet()
_registering = threading.RLock()
_region_ids = itertools.count(1)


def _renew_lock() -> None:
    global _registering
    _registering = threading.RLock()


os.register_at_fork(after_in_child=_renew_lock)


def _with_gaps(buffer: object) -> object:
    """Of an array with gaps in memory of our own (see `ArrayMaker.rows`): that memory."""
    if not isinstance(buffer, np.ndarray) or buffer.flags.forc:
        return buffer
    base: object = buffer
    while isinstance(base, np.ndarray):
        base = base.base
    return base if isinstance(base, PageMemory) else buffer


class Registrar(ArrayMaker):
    """The part of an engine that buffers are registered with."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._generation = forks.generation()
        self._regions: dict[int, Region] = {}
        self._memories: _Memories = weakref.WeakValueDictionary()
        # Buffers that stay held because they could not be taken out of the core again.
        self._stranded: list[gate.Admission] = []
        self._closed = False
        # KSMCORE_DISABLE=1: buffers are looked at as ever, and nothing is registered.
        self._disabled = os.environ.get("KSMCORE_DISABLE", "0").lower() not in ("", "0", "no")
        _registrars.add(self)
        self._renew()

    def register(self, buffer: object, *, privatize: bool = False) -> Region:
        """Let the pages of a writable, contiguous buffer be merged.

        The whole pages inside the buffer are scanned; a first and last page that it shares with
        other memory are never touched. The buffer is held until the region is closed.

        `privatize`: turn shared anonymous memory (the default of `mmap.mmap(-1, n)`) into private
        memory in place, with the same bytes; other processes then no longer see what is written.

        Raises:
            TypeError: not a buffer, or one that holds references to objects.
            ValueError: read-only, not contiguous, no whole page inside, registered already (in part
                or whole), or memory that cannot be merged; the message says why and what to do.
        """
        self._check_open()
        with _registering:
            with self._hold(buffer) as (addr, n_pages):
                if self._find(addr, n_pages) is not None:
                    raise ValueError(
                        f"this buffer ({n_pages} pages at {addr:#x}) is already registered"
                    )
            admission = gate.admit(buffer, page_bytes=self.page_bytes, privatize=privatize)
            self._warn_of_phase([admission])
            return self._add(admission)

    def _add(self, admission: gate.Admission) -> Region:
        """Register what the gate has let in; on any error the buffer is let go."""
        flags = (
            admission.dontfork
            | admission.dontdump << 1
            | admission.hugepage << 2
            | admission.nohugepage << 3
        )
        region_id = next(_region_ids)
        try:
            if admission.must_privatize and not self._disabled:
                self._core.privatize(admission.addr, admission.n_pages, flags)
            if not self._disabled:
                self._core.add(region_id, admission.addr, admission.n_pages, flags)
            region = Region(self, region_id, admission)
            self._regions[region_id] = region
        except BaseException:
            # Once it is in the core another thread's pass may have merged it already.
            self._stranded.append(admission)
            self._core.remove(region_id, admission.addr, True)
            self._regions.pop(region_id, None)
            self._stranded.remove(admission)
            admission.release()
            raise
        self._registered()
        return region

    def _hold(self, buffer: object) -> AbstractContextManager[tuple[int, int]]:
        """(address, pages) of a buffer, held meanwhile. Of an array made by this engine all pages
        count, also a last one that is not full: nothing else is there."""
        return gate.hold(_with_gaps(buffer), page_bytes=self.page_bytes, known=self._known)

    def _known(self, first_byte: int, len_bytes: int) -> tuple[int, int] | None:
        memory = self._memories.get(first_byte)
        if memory is None or memory.len_bytes != len_bytes:
            return None
        return memory.addr, memory.n_pages

    def _find(self, addr: int, n_pages: int) -> tuple[int, int, int] | None:
        """The region of this engine that holds these pages; ValueError when only some of them are
        registered, or any with another engine."""
        len_bytes = n_pages * self.page_bytes
        for other in list(_registrars):
            if other is self or other._closed:
                continue
            try:
                taken = other._core.find(addr, len_bytes) is not None
            except ValueError:
                taken = True
            if taken:
                raise ValueError(
                    f"this buffer ({n_pages} pages at {addr:#x}) is registered, at least in part, "
                    "with another engine; unregister it there first"
                )
        return self._core.find(addr, len_bytes)

    def _warn_of_phase(self, admissions: list[gate.Admission]) -> None:
        """Before they are registered; where warnings are errors, all of them are let go."""
        held = [region._admission for region in list(self._regions.values())]
        try:
            warn_of_phase(admissions, [admission for admission in held if admission is not None])
        except BaseException:
            for admission in admissions:
                admission.release()
            raise

    def unregister(self, buffer: Region | object) -> None:
        """Make the pages of a region, or of a registered buffer, plain private memory again.

        Raises:
            ValueError: it is not registered with this engine.
            MemoryError: not enough memory to unmerge; it is still registered, all bytes are right.
        """
        self._check_open()
        if isinstance(buffer, Region):
            if buffer._engine is not self:
                raise ValueError("this region belongs to another engine")
            buffer.close()
            return
        with self._hold(buffer) as (addr, n_pages):
            if self._disabled:
                self._unregister_disabled(addr, n_pages)
                return
            found = self._find(addr, n_pages)
            if found is None or found[1:] != (addr, n_pages):
                what = "not registered with this engine"
                if found is not None:
                    what += ", but lies in memory that is, as a whole (the allocator's, say)"
                raise ValueError(f"this buffer ({n_pages} pages at {addr:#x}) is {what}")
            region = self._regions.get(found[0])
            if region is None:
                self._restore(found[0], addr)
        if region is not None:
            region.close()

    def _unregister_disabled(self, addr: int, n_pages: int) -> None:
        """KSMCORE_DISABLE: there are handles only, and arrays that have none."""
        for region in self.regions:
            if (region.addr, region.n_pages) == (addr, n_pages):
                region.close()

    def _restore(self, region_id: int, addr: int, *, keep: bool = False) -> None:
        """Take a region out of the core (or `keep` it there), as plain memory; MemoryError when
        there is not enough."""
        needed = self._core.tally(region_id, addr)["pages_merged"] * self.page_bytes
        if needed > 0 and needed > (there := procfs.available_bytes()):
            raise MemoryError(
                f"to unmerge this memory takes {needed:,} bytes, and {there:,} are to be had (of "
                "the machine, or under the control group's limit); it stays merged"
            )
        self._core.remove(region_id, addr, True, keep)

    def _close_region(self, region: Region) -> None:
        admission = region._admission
        if admission is None:
            return
        if not region.closed:
            self._restore(region._id, region._addr)
            self._regions.pop(region._id, None)
        region._admission = None
        admission.release()

    def hold(self, buffer: Region | object) -> AbstractContextManager[None]:
        """Keep the scanner away from registered memory, for system calls that write into it:

            with engine.hold(buffer):
                sock.recv_into(buffer)

        Entering waits until the scanner is out of the buffer's regions (a span of pages at most);
        nothing in them is merged until the block is left. Holds may be nested, and taken by several
        threads. A region that is held cannot be unregistered. The buffer may be any part of a
        registered one, and is kept in memory meanwhile.

        Raises:
            ValueError: nothing of the buffer is registered with this engine.
            TypeError: not a writable, contiguous buffer.
        """
        self._check_open()
        return self._holding(buffer._view() if isinstance(buffer, Region) else buffer)

    @contextlib.contextmanager
    def _holding(self, buffer: object) -> Iterator[None]:
        def touched(first_byte: int, len_bytes: int) -> tuple[int, int]:
            start = first_byte - first_byte % self.page_bytes
            return start, -(-(first_byte + len_bytes - start) // self.page_bytes)

        buffer = _with_gaps(buffer)
        with gate.hold(buffer, page_bytes=self.page_bytes, known=touched) as (addr, n_pages):
            held = self._core.hold(addr, n_pages * self.page_bytes)
            if not held and not self._disabled:
                raise ValueError("nothing of this buffer is registered with this engine")
            try:
                yield
            finally:
                for region_id, start in held:
                    self._core.let_go(region_id, start)

    @property
    def regions(self) -> tuple[Region, ...]:
        """The open regions, in the order of their registration; arrays made by the engine aside."""
        self._own()
        return tuple(self._regions.values())

    def _register_all(self, buffers: tuple[object, ...]) -> list[tuple[int, int]]:
        """Register the buffers that are not, all or none of them; returns all page ranges."""
        if self._disabled:
            return []
        ranges: list[tuple[int, int]] = []
        missing: list[tuple[int, int, object]] = []
        with _registering:
            for buffer in buffers:
                if isinstance(buffer, Region):
                    if buffer._engine is not self or buffer.closed:
                        raise ValueError(f"{buffer!r} is not registered with this engine")
                    ranges.append((buffer.addr, buffer.addr + buffer.nbytes))
                    continue
                with self._hold(buffer) as (addr, n_pages):
                    end = addr + n_pages * self.page_bytes
                    if self._find(addr, n_pages) is None:
                        missing.append((addr, -end, buffer))
                ranges.append((addr, end))
            made: list[Region] = []
            wanted: list[object] = []
            covered = 0
            for _, minus_end, buffer in sorted(missing, key=lambda one: one[:2]):
                # A part of another buffer, or the same once more, comes with that.
                if -minus_end > covered:
                    wanted.append(buffer)
                    covered = -minus_end
            admissions = gate.admit_all(wanted, page_bytes=self.page_bytes)
            self._warn_of_phase(admissions)
            try:
                while admissions:
                    made.append(self._add(admissions.pop(0)))
            except BaseException:
                for admission in admissions:
                    admission.release()
                for region in made:
                    region.close()
                raise
        return disjoint(ranges)

    def _held_ranges(
        self, buffers: tuple[object, ...], held: contextlib.ExitStack
    ) -> list[tuple[int, int]]:
        """(address, end) of each buffer's pages, kept mapped until `held` is closed."""
        ranges: list[tuple[int, int]] = []

        def hold(buffer: object) -> tuple[int, int]:
            addr, n_pages = held.enter_context(self._hold(buffer))
            ranges.append((addr, addr + n_pages * self.page_bytes))
            return addr, n_pages

        if not buffers:
            for memory in list(self._memories.values()):
                hold(memory)
            for region in self.regions:
                # One that another thread closes meanwhile is simply not counted.
                with contextlib.suppress(ValueError):
                    hold(region._view())
            arrays = arena.pin()
            held.callback(arena.unpin)
            return ranges + [array for array in arrays if self._is_registered(*array)]
        unknown: list[object] = []
        for buffer in buffers:
            exported = buffer._view() if isinstance(buffer, Region) else buffer
            if self._find(*hold(exported)) is None:
                unknown.append(exported)
        for admission in gate.admit_all(unknown, page_bytes=self.page_bytes):
            held.callback(admission.release)
        return ranges

    def _allocate(self, n_bytes: int, offset: int = 0) -> PageMemory:
        self._check_open()
        core = None if self._disabled else self._core
        memory = PageMemory(core, next(_region_ids), n_bytes, self, offset)
        self._memories[memory.addr + offset] = memory
        self._registered()
        return memory

    def _is_registered(self, addr: int, end: int) -> bool:
        self._check_open()
        try:
            return self._core.find(addr, end - addr) is not None
        except ValueError:
            return True  # in part

    # ---- whose it is --------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("this engine is closed")
        self._own()

    @staticmethod
    def _generation_now() -> int:
        return forks.generation()

    def _is_inherited(self) -> bool:
        return self._generation != forks.generation()

    def _own(self) -> None:
        """In a forked child: begin empty. The parent's regions count as closed here."""
        if not self._is_inherited():
            return
        regions, self._regions = self._regions, {}
        self._memories = weakref.WeakValueDictionary()
        self._renew()
        self._generation = forks.generation()
        for region in regions.values():
            region.close()

    def _renew(self) -> None:
        """What else is made with the engine, and made anew in a forked child."""

    def _registered(self) -> None:
        """There is something more to scan."""
