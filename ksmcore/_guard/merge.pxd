"""What happens inside a guard window; see merge.pyx."""

from libc.stdint cimport uint8_t, uint32_t, uintptr_t

from ksmcore._guard.window cimport guard_kind
from ksmcore._kernel.syscalls cimport sys_error
from ksmcore._kernel.tracker cimport tracker_t
from ksmcore._records.store cimport store_t


# Neighbouring pages that the same is to happen to.
ctypedef struct run_t:
    guard_kind guard
    uintptr_t addr
    size_t n_pages
    size_t page_bytes
    bint over_store          # they map the store; else they are anonymous memory
    bint is_huge             # were in huge pages when they were looked at; for the functions of runs only
    int flags                # enum region_flag bits
    const tracker_t* tracker # which watches the region if it is REGION_WATCHED; may be NULL


# outcomes: enum page_outcome (see window.pxd) for each page of the run. slots: the one for each page.
cdef int merge_run(
    store_t* store, const run_t* run, const uint32_t* slots, uint8_t* outcomes, sys_error* err
) noexcept nogil
cdef int merge_zero_run(const run_t* run, uint8_t* outcomes, sys_error* err) noexcept nogil
cdef int merge_restore_range(const run_t* run, bint due, size_t* n_restored, sys_error* err) noexcept nogil
cdef int merge_share_range(store_t* store, const run_t* run, uint32_t slot, sys_error* err) noexcept nogil
cdef int merge_move(uintptr_t fresh, uintptr_t target, size_t len_bytes, sys_error* err) noexcept nogil
cdef int merge_empty_range(const run_t* run, sys_error* err) noexcept nogil
