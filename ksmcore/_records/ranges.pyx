"""Address ranges with what is known of each: one sorted array, empty for most programs.

The caller holds the lock of whom they belong to, and may hold others under which nothing may be taken from malloc:
mapped memory.
"""

from libc.stdint cimport uintptr_t
from libc.string cimport memset

from ksmcore._kernel.syscalls cimport (
    sys_error, sys_error_clear, sys_grow, sys_map_anon, sys_page_bytes, sys_unmap,
)


cdef void ranges_destroy(range_list* ranges) noexcept nogil:
    cdef sys_error ignored
    sys_error_clear(&ignored)
    # Unchecked: a whole mapping of our own.
    if ranges.all != NULL:
        sys_unmap(<uintptr_t>ranges.all, ranges.n_bytes, &ignored)
    memset(ranges, 0, sizeof(range_list))


cdef bint ranges_add(range_list* ranges, uintptr_t start, uintptr_t end, int flags) noexcept nogil:
    """Behind those that are there; False without memory for it."""
    cdef sys_error ignored
    cdef void* grown
    sys_error_clear(&ignored)
    if (ranges.n + 1) * sizeof(range_t) > ranges.n_bytes:
        if ranges.all == NULL:
            grown = sys_map_anon(sys_page_bytes(), &ignored)
        else:
            grown = sys_grow(ranges.all, ranges.n_bytes, 2 * ranges.n_bytes, &ignored)
        if grown == NULL:
            return False
        ranges.n_bytes = sys_page_bytes() if ranges.all == NULL else 2 * ranges.n_bytes
        ranges.all = <range_t*>grown
    ranges.all[ranges.n].start = start
    ranges.all[ranges.n].end = end
    ranges.all[ranges.n].flags = flags
    ranges.n += 1
    return True


cdef int ranges_at(const range_list* ranges, uintptr_t addr, uintptr_t* end) noexcept nogil:
    """What is known of the page at `addr`, and of those behind it before *end."""
    cdef size_t low = 0, high = ranges.n, middle
    while low < high:
        middle = (low + high) // 2
        if ranges.all[middle].end <= addr:
            low = middle + 1
        else:
            high = middle
    end[0] = <uintptr_t>-1
    if low == ranges.n:
        return 0
    if addr < ranges.all[low].start:
        end[0] = ranges.all[low].start
        return 0
    end[0] = ranges.all[low].end
    return ranges.all[low].flags
