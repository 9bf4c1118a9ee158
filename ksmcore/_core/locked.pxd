"""An engine's core behind its lock; see locked.pyx."""

from cpython.pythread cimport PyThread_type_lock
from libc.stdint cimport uint32_t, uintptr_t

from ksmcore._guard.window cimport guard_kind
from ksmcore._kernel.syscalls cimport sys_error
from ksmcore._pass.state cimport engine_core


cdef class LockedCore:
    cdef engine_core c
    cdef PyThread_type_lock lock
    cdef uint32_t n_waiting          # threads that want the lock, the walking one aside
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
    cdef void _hold_calls(self, guard_kind guard) noexcept nogil
    cpdef void let_calls_go(self) noexcept
    cdef int _enter(self, guard_kind* entered, sys_error* err) noexcept nogil
