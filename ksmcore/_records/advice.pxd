"""What the program has advised about registered memory; see advice.pyx."""

from libc.stdint cimport uint64_t, uintptr_t


# Neighbours with flags other than none.
ctypedef struct advised_t:
    uintptr_t start
    uintptr_t end
    int flags                # enum region_flag bits

# By address. Times are of sys_now_ns.
ctypedef struct advice_t:
    advised_t* all
    size_t n
    size_t n_bytes           # of the array
    size_t n_barred          # regions that no pass looks at for what was seen
    uint64_t seen_ns         # when the last look was begun; 0: there was none
    uint64_t cost_ns         # of the last look
    bint for_restoring       # that was its purpose
    uint64_t pass_ns         # when the pass was begun; older looks do not serve it


cdef void advice_destroy(advice_t* advice) noexcept nogil
cdef bint advice_add(advice_t* advice, uintptr_t start, uintptr_t end, int flags) noexcept nogil
cdef int advice_at(const advice_t* advice, uintptr_t addr, uintptr_t* end) noexcept nogil
