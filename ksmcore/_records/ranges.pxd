"""Address ranges with what is known of each; see ranges.pyx."""

from libc.stdint cimport uintptr_t


# Neighbours of which the same is known, other than nothing.
ctypedef struct range_t:
    uintptr_t start
    uintptr_t end
    int flags                # as the owner of the list understands them, never 0

# By address.
ctypedef struct range_list:
    range_t* all
    size_t n
    size_t n_bytes           # of the array


cdef void ranges_destroy(range_list* ranges) noexcept nogil
cdef bint ranges_add(range_list* ranges, uintptr_t start, uintptr_t end, int flags) noexcept nogil
cdef int ranges_at(const range_list* ranges, uintptr_t addr, uintptr_t* end) noexcept nogil
