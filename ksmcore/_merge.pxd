"""What happens inside a guard window; see _merge.pyx."""

from libc.stdint cimport uint8_t, uint32_t, uintptr_t

from ksmcore._store cimport store_t
from ksmcore._sys cimport sys_error


cdef enum:
    WINDOW_PAGES = 128       # most pages of one window: tens of microseconds for a waiting writer

# madvise flags of a region that a new mapping must get again.
cdef enum region_flag:
    REGION_DONTFORK = 1
    REGION_DONTDUMP = 2
    REGION_HUGEPAGE = 4
    REGION_NOHUGEPAGE = 8

# What became of one page of a run.
cdef enum page_outcome:
    DONE
    CHANGED                  # its bytes were not (or no longer) what they were taken for
    REFUSED                  # the kernel would not protect or remap it; see the error


cdef int merge_run(
    store_t* store, uintptr_t addr, uint32_t slot, uint32_t n_pages, int flags,
    uint8_t* outcomes, sys_error* err
) noexcept nogil
cdef int reshare_run(
    store_t* store, uintptr_t addr, uint32_t slot, uint32_t n_pages,
    uint8_t* outcomes, sys_error* err
) noexcept nogil
cdef int zero_run(
    size_t page_bytes, uintptr_t addr, uint32_t n_pages, bint over_store, int flags,
    uint8_t* outcomes, sys_error* err
) noexcept nogil
cdef int restore_range(
    size_t page_bytes, uintptr_t addr, size_t n_pages, int flags, size_t* n_restored, sys_error* err
) noexcept nogil
