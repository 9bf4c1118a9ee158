"""The numbers of an engine at one moment; see _numbers.pyx."""

from libc.stdint cimport uint32_t, uint64_t

from ksmcore._records.budget cimport map_budget
from ksmcore._records.rmap cimport N_STATES
from ksmcore._pass.batch cimport scan_counters
from ksmcore._pass.state cimport engine_core


ctypedef struct core_numbers:
    scan_counters counters
    map_budget budget
    uint32_t n_by_state[<int>N_STATES]   # items, by enum page_state
    uint32_t n_shared                    # slots with a sharer
    uint32_t n_used                      # slots in use
    uint32_t n_frozen                    # of those: another process may map them
    uint64_t n_compares
    size_t n_regions
    size_t metadata_bytes
    uint32_t n_quiet                     # pages in the quiet tree
    bint with_pagemap
    bint with_tracker


cdef void numbers_read(engine_core* c, core_numbers* numbers) noexcept nogil
cdef dict numbers_as_dict(const core_numbers* numbers)
