"""The regions of an engine's core; see registry.pyx."""

from libc.stdint cimport uint64_t, uintptr_t

from ksmcore._core.locked cimport LockedCore
from ksmcore._guard.window cimport guard_kind
from ksmcore._kernel.syscalls cimport sys_error
from ksmcore._records.ranges cimport range_list
from ksmcore._records.regions cimport region_t


cdef class Registry(LockedCore):
    cdef readonly uint64_t n_enlisted    # how often memory was registered so far

    cdef region_t* _region(self, uint64_t region_id, uintptr_t addr) noexcept nogil
    cdef void _drop(self, region_t* region) noexcept nogil
    cdef int _take_out(
        self, uint64_t region_id, uintptr_t addr, guard_kind guard, bint restore, bint keep, bint* found, bint* held,
        size_t* n_blocked, sys_error* err
    ) noexcept nogil
    cdef void _look_at(self, region_t* region, size_t* n_blocked) noexcept nogil

    # For the arena, which has memory of its own and no Python objects.
    cdef int enlist(
        self, uint64_t region_id, uintptr_t addr, size_t n_pages, int flags, bint fresh
    ) noexcept nogil
    cdef bint let_move(self, uint64_t region_id, uintptr_t addr) noexcept nogil
    cdef void strike(self, uint64_t region_id, uintptr_t addr) noexcept nogil
    cdef void leave_unsettled(self, range_list* ranges) noexcept nogil
    cdef bint discard(self, uint64_t region_id, uintptr_t addr, size_t n_pages, bint* emptied) noexcept nogil
