"""What the program has advised about registered memory, by the last look at it (see look in the pass): one sorted
array, empty for most programs.

The caller holds the engine's lock.
"""

from libc.stdint cimport uintptr_t
from libc.stdlib cimport free, realloc
from libc.string cimport memset


cdef void advice_destroy(advice_t* advice) noexcept nogil:
    free(advice.all)
    memset(advice, 0, sizeof(advice_t))


cdef bint advice_add(advice_t* advice, uintptr_t start, uintptr_t end, int flags) noexcept nogil:
    """Behind those that are there; False without memory for it."""
    cdef advised_t* grown
    if advice.n == advice.capacity:
        grown = <advised_t*>realloc(advice.all, (2 * advice.capacity + 16) * sizeof(advised_t))
        if grown == NULL:
            return False
        advice.all = grown
        advice.capacity = 2 * advice.capacity + 16
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
