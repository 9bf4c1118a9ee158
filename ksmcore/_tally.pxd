"""The pages of one region by what they are; see _tally.pyx."""

from libc.stdint cimport uint64_t

from ksmcore._engine cimport engine_core
from ksmcore._regions cimport region_t
from ksmcore._rmap cimport N_STATES


ctypedef struct region_tally:
    size_t n_pages
    size_t n_by_state[<int>N_STATES]     # records, by enum page_state
    size_t n_quiet
    double pages_saved                   # of n mappings of a shared page each saves (n - 1) / n of a page
    uint64_t cow_breaks


cdef void core_tally(engine_core* c, const region_t* region, region_tally* tally) noexcept nogil
cdef dict tally_as_dict(const region_tally* tally)
