"""What the program has advised about the memory that is to be remapped; see look.pyx."""

from libc.stdint cimport int64_t, uintptr_t

from ksmcore._kernel.maps cimport vma_t
from ksmcore._pass.state cimport engine_core
from ksmcore._records.regions cimport region_t


# Mappings, as the map budget counts them.
ctypedef struct maps_tally:
    int64_t n_maps
    int64_t n_ours               # mappings of stores, what they cut off, and what watching does
    uintptr_t end_of_store       # private: where the last mapping of a store ends, 0 when another followed


cdef void look_tally(maps_tally* tally, const vma_t* vma) noexcept nogil
cdef void look_take_room(engine_core* c, const maps_tally* tally) noexcept nogil
cdef int64_t look_n_maps(const engine_core* c) noexcept nogil
cdef void look_at_room(engine_core* c) noexcept nogil
cdef void look_begin_pass(engine_core* c, bint patient) noexcept nogil
cdef void look_at_intents(engine_core* c) noexcept nogil
cdef void look_before_restoring(engine_core* c) noexcept nogil
cdef int look_flags(const engine_core* c, const region_t* region, uintptr_t addr, uintptr_t* end) noexcept nogil
