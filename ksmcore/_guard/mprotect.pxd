"""The mprotect guard; see mprotect.pyx. For guard only."""

from libc.stdint cimport uint32_t, uintptr_t

from ksmcore._kernel.syscalls cimport sys_error

cdef int signal_enter(sys_error* err) noexcept nogil
cdef void signal_leave() noexcept nogil
cdef int signal_ready(sys_error* err) noexcept nogil
# The caller holds the gate from protect to release.
cdef int signal_protect(uintptr_t addr, size_t len_bytes, sys_error* err) noexcept nogil
cdef int signal_release(uintptr_t addr, size_t len_bytes, bint all_remapped, sys_error* err) noexcept nogil
cdef uint32_t signal_n_waits() noexcept nogil
cdef bint signal_is_installed() noexcept nogil
