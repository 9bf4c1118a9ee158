"""The way back: from merged pages to plain memory; see unmerge.pyx."""

from ksmcore._records.regions cimport region_t
from libc.stdint cimport uintptr_t

from ksmcore._pass.state cimport engine_core
from ksmcore._kernel.syscalls cimport sys_error

cdef int core_restore(engine_core* c, const region_t* region, sys_error* err) noexcept nogil
cdef void core_abandon(engine_core* c, const region_t* region) noexcept nogil
cdef void core_forget(engine_core* c, const region_t* region) noexcept nogil
cdef int core_check(engine_core* c) noexcept nogil
cdef bint core_discard(engine_core* c, const region_t* region, uintptr_t addr, size_t n_pages) noexcept nogil
