"""The way back: from merged pages to plain memory; see unmerge.pyx."""

from libc.stdint cimport uintptr_t

from ksmcore._guard.window cimport guard_kind
from ksmcore._kernel.syscalls cimport sys_error
from ksmcore._pass.state cimport engine_core
from ksmcore._records.regions cimport region_t


cdef bint unmerge_is_due(engine_core* c, const region_t* region) noexcept nogil
cdef int unmerge_region(
    engine_core* c, const region_t* region, guard_kind guard, sys_error* err
) noexcept nogil
cdef void unmerge_lose(engine_core* c, const region_t* region) noexcept nogil
cdef void unmerge_settle(engine_core* c, region_t* region) noexcept nogil
cdef void unmerge_abandon(engine_core* c, const region_t* region) noexcept nogil
cdef void unmerge_forget(engine_core* c, const region_t* region) noexcept nogil
cdef bint unmerge_discard(engine_core* c, const region_t* region, uintptr_t addr, size_t n_pages) noexcept nogil
