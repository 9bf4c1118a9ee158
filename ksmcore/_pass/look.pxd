"""What the program has advised about the memory that is to be remapped; see look.pyx."""

from libc.stdint cimport uintptr_t

from ksmcore._pass.state cimport engine_core
from ksmcore._records.regions cimport region_t


cdef void look_begin_pass(engine_core* c, bint patient) noexcept nogil
cdef void look_at_intents(engine_core* c) noexcept nogil
cdef void look_before_restoring(engine_core* c) noexcept nogil
cdef int look_flags(const engine_core* c, const region_t* region, uintptr_t addr, uintptr_t* end) noexcept nogil
