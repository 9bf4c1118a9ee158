"""Memory that is passed over without a survey; see still.pyx."""

from libc.stdint cimport uintptr_t

from ksmcore._pass.state cimport engine_core
from ksmcore._records.regions cimport region_t

cdef enum:
    WALKED_PER_LOOK = 64       # pages that are passed over in the time of looking at one


cdef bint still_pass_over(
    engine_core* c, region_t* region, uintptr_t* cursor, uintptr_t end, size_t least, size_t* n_pages
) noexcept nogil
cdef void still_note_survey(
    const engine_core* c, region_t* region, uintptr_t start, uintptr_t end, size_t n_looked, size_t n_absent
) noexcept nogil
