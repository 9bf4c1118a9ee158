"""What a mapping costs in memory mappings; see costs.pyx."""

from libc.stdint cimport int64_t, uint32_t, uint64_t

from ksmcore._records.rmap cimport rmap_table


cdef inline bint costs_splits(uint32_t left, uint32_t right) noexcept nogil:
    """Does a mapping end between two neighbouring pages with these slots under them?"""
    if left == 0 and right == 0:
        return False
    return left == 0 or right != left + 1


cdef uint32_t costs_slot_under(rmap_table* rmap, uint64_t page_no, uint32_t item) noexcept nogil
cdef int64_t costs_of_mapping(rmap_table* rmap, uint64_t page_no, size_t n_pages, uint32_t slot) noexcept nogil
cdef int64_t costs_of_restoring(rmap_table* rmap, uint64_t page_no, size_t n_pages) noexcept nogil
