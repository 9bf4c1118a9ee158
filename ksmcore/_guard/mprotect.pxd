"""The mprotect guard; see mprotect.pyx. For guard only, and tests."""

from libc.stdint cimport uint32_t, uintptr_t

from ksmcore._kernel.syscalls cimport sys_error

cdef int mprotect_enter(sys_error* err) noexcept nogil
cdef void mprotect_leave() noexcept nogil
cdef int mprotect_ready(sys_error* err) noexcept nogil
# The caller holds the fork lock, from shut to release.
cdef bint mprotect_may_shut(bint is_way_back) noexcept nogil
cdef int mprotect_shut(uintptr_t addr, size_t len_bytes, sys_error* err) noexcept nogil
cdef int mprotect_release(uintptr_t addr, size_t len_bytes, bint all_remapped, sys_error* err) noexcept nogil
cdef uint32_t mprotect_n_waits() noexcept nogil
cdef bint mprotect_is_installed() noexcept nogil
