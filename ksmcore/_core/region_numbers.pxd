"""The pages of one region by what they are; see region_numbers.pyx."""

from libc.stdint cimport uint8_t, uint64_t

from ksmcore._kernel.syscalls cimport sys_error
from ksmcore._pass.state cimport engine_core
from ksmcore._records.regions cimport region_t
from ksmcore._records.rmap cimport N_STATES


ctypedef struct region_counts:
    size_t n_pages
    size_t n_by_state[<int>N_STATES]     # records, by enum page_state
    size_t n_quiet
    double pages_saved                   # of n mappings of a shared page each saves (n - 1) / n of a page
    uint64_t cow_breaks


# What a page is to somebody who looks at a map of them; the values are those of ksmcore.PageState.
cdef enum shown_state:
    SHOWN_NOT_PRESENT
    SHOWN_VOLATILE
    SHOWN_UNIQUE
    SHOWN_SHARED
    SHOWN_ZERO
    SHOWN_BROKEN


cdef void region_numbers_read(engine_core* c, const region_t* region, region_counts* tally) noexcept nogil
cdef int region_numbers_map(engine_core* c, const region_t* region, uint8_t* states, sys_error* err) noexcept nogil
cdef dict region_numbers_as_dict(const region_counts* tally)
