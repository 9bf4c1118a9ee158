"""Pages that are not read again until they are written; see quiet.pyx."""

from libc.stdint cimport uint32_t

from ksmcore._pass.state cimport engine_core
from ksmcore._records.regions cimport region_t


cdef size_t quiet_min_pages      # smaller regions are not watched; tests change it

cdef void quiet_arm(engine_core* c, region_t* region, size_t n_look) noexcept nogil
cdef void quiet_disarm_changed(engine_core* c, size_t n_look) noexcept nogil
cdef void quiet_disarm_others(engine_core* c, size_t n_look) noexcept nogil
cdef void quiet_disarm_item(engine_core* c, uint32_t item) noexcept nogil
cdef bint quiet_is_still(engine_core* c, uint32_t item) noexcept nogil
cdef void quiet_begin_pass(engine_core* c) noexcept nogil
cdef void quiet_unwatch(engine_core* c, region_t* region) noexcept nogil
cdef void quiet_after_flush(engine_core* c) noexcept nogil
cdef void quiet_stop(engine_core* c) noexcept nogil
