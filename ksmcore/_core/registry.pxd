"""The lock of an engine's core, and its regions; see registry.pyx."""

from cpython.pythread cimport PyThread_type_lock
from libc.stdint cimport uint32_t, uint64_t, uintptr_t

from ksmcore._guard.window cimport guard_kind
from ksmcore._kernel.syscalls cimport sys_error
from ksmcore._pass.state cimport engine_core
from ksmcore._records.ranges cimport range_list
from ksmcore._records.regions cimport region_t


cdef class Registry:
    cdef engine_core c
    cdef PyThread_type_lock lock
    cdef uint32_t n_waiting          # threads that want the lock, the walking one aside
    cdef readonly uint64_t n_enlisted    # how often memory was registered so far
    cdef uint32_t generation
    cdef guard_kind guard            # asked for
    cdef bint any_guard              # or a weaker one
    cdef uint32_t n_buckets
    cdef uintptr_t owner             # the thread that has the lock; 0: none
    cdef bint with_pagemap
    cdef bint with_tracker
    cdef bint hold_calls             # where the guard cannot make them wait,
    cdef bint hold_always            # and where it can
    cdef uint32_t is_holding         # calls tell of themselves, on account of this engine
    cdef uint32_t is_keeping         # and SIGSEGV is kept out of masks

    cdef int _begin(self) except -1
    cdef int _own(self) except -1
    cdef bint is_mine(self) noexcept nogil
    cdef void _lock(self) noexcept nogil
    cdef void _take_lock(self) noexcept nogil
    cdef void _unlock(self) noexcept nogil
    cdef void _let_others(self) noexcept nogil
    cdef region_t* _region(self, uint64_t region_id, uintptr_t addr) noexcept nogil
    cdef void _drop(self, region_t* region) noexcept nogil
    cdef void _hold_calls(self, guard_kind guard) noexcept nogil
    cpdef void let_calls_go(self) noexcept
    cdef int _enter(self, guard_kind* entered, sys_error* err) noexcept nogil
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
