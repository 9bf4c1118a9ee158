"""Are the mappings still what the engine takes them for? See census.pyx."""

from libc.stdint cimport int64_t, uintptr_t

from ksmcore._kernel.syscalls cimport sys_error
from ksmcore._pass.state cimport engine_core
from ksmcore._records.regions cimport region_t


cdef int census_take(engine_core* c, int64_t asked_maps, int64_t max_map_count, sys_error* err) noexcept nogil
cdef int census_agrees(engine_core* c, sys_error* err) noexcept nogil
cdef int census_of_range(
    engine_core* c, uintptr_t addr, uintptr_t end, bint* is_plain, size_t* n_blocked, sys_error* err
) noexcept nogil
cdef int census_of_region(engine_core* c, region_t* region, size_t* n_blocked, sys_error* err) noexcept nogil
