"""Where pages are moved to while a window is open; see scratch.pyx."""

from libc.stdint cimport uintptr_t

from ksmcore._kernel.syscalls cimport sys_error


ctypedef struct scratch_t:
    uintptr_t addr               # 0: none
    size_t len_bytes
    bint whole                   # takes a huge page as a whole
    bint is_registered           # with userfaultfd, without which the kernel moves nothing there
    size_t used_bytes            # from its start on: pages may be left there
    uintptr_t mapped             # private to scratch
    size_t mapped_bytes


cdef int scratch_init(scratch_t* scratch, size_t len_bytes, bint whole, sys_error* err) noexcept nogil
cdef void scratch_end(scratch_t* scratch) noexcept nogil
cdef int scratch_register(scratch_t* scratch, int fd, sys_error* err) noexcept nogil
cdef int scratch_take(scratch_t* scratch, int fd, size_t len_bytes, uintptr_t* addr, sys_error* err) noexcept nogil
cdef void scratch_empty(scratch_t* scratch) noexcept nogil
