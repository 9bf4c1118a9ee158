"""The numbers of an engine at one moment; see numbers.pyx."""

from libc.stdint cimport int64_t, uint32_t, uint64_t

from ksmcore._pass.batch cimport scan_counters
from ksmcore._pass.state cimport engine_core


# Python sees these fields, and those of scan_counters, by their names; what they mean to users is told in
# _engine/counters.py, under the same names.
ctypedef struct core_numbers:
    size_t regions
    uint32_t pages_shared        # slots with a sharer
    uint32_t pages_sharing       # further sharers
    uint32_t pages_unshared
    uint32_t pages_quiet         # in the quiet tree
    uint32_t pages_volatile
    uint32_t pages_left_out
    uint32_t ksm_zero_pages
    uint32_t store_pages         # slots in use
    uint32_t store_pages_frozen  # of those: another process may map them
    uint32_t guard_waits         # of all engines
    uint64_t page_compares
    uint64_t metadata_bytes
    int64_t maps_used
    int64_t maps_allowed
    bint with_pagemap
    bint with_tracker
    scan_counters counters


cdef void numbers_read(engine_core* c, core_numbers* numbers) noexcept nogil
cdef dict numbers_as_dict(const core_numbers* numbers)
