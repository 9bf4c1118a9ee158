"""What the program has advised about registered memory, by the last look at it (see look in the pass): one sorted
array, empty for most programs.

The caller holds the engine's lock, and may hold that of the file it was read from: mapped memory, and no malloc.
"""

from libc.stdint cimport uintptr_t
from libc.string cimport memset

from ksmcore._kernel.syscalls cimport (
    sys_error, sys_error_clear, sys_grow, sys_map_anon, sys_page_bytes, sys_unmap,
)


cdef void advice_destroy(advice_t* advice) noexcept nogil:
    cdef sys_error ignored
    sys_error_clear(&ignored)
    # Unchecked: a whole mapping of our own.
    if advice.all != NULL:
        sys_unmap(<uintptr_t>advice.all, advice.n_bytes, &ignored)
    memset(advice, 0, sizeof(advice_t))


cdef bint advice_add(advice_t* advice, uintptr_t start, uintptr_t end, int flags) noexcept nogil:
    """Behind those that are there; False without memory for it."""
    cdef sys_error ignored
    cdef void* grown
    sys_error_clear(&ignored)
    if (advice.n + 1) * sizeof(advised_t) > advice.n_bytes:
        if advice.all == NULL:
            grown = sys_map_anon(sys_page_bytes(), &ignored)
        else:
            grown = sys_grow(advice.all, advice.n_bytes, 2 * advice.n_bytes, &ignored)
        if grown == NULL:
            return False
        advice.n_bytes = sys_page_bytes() if advice.all == NULL else 2 * advice.n_bytes
        advice.all = <advised_t*>grown
    advice.all[advice.n].start = start
    advice.all[advice.n].end = end
    advice.all[advice.n].flags = flags
    advice.n += 1
    return True


cdef int advice_at(const advice_t* advice, uintptr_t addr, uintptr_t* end) noexcept nogil:
    """The flags of the page at `addr`, and of those behind it before *end."""
    cdef size_t low = 0, high = advice.n, middle
    while low < high:
        middle = (low + high) // 2
        if advice.all[middle].end <= addr:
            low = middle + 1
        else:
            high = middle
    end[0] = <uintptr_t>-1
    if low == advice.n:
        return 0
    if addr < advice.all[low].start:
        end[0] = advice.all[low].start
        return 0
    end[0] = advice.all[low].end
    return advice.all[low].flags
