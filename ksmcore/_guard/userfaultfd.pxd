"""The userfaultfd guards; see userfaultfd.pyx. For guard only."""

from libc.stdint cimport uint32_t

from ksmcore._guard.window cimport guard_kind, window_t
from ksmcore._kernel.syscalls cimport sys_error

cdef int userfaultfd_probe(guard_kind kind, bint* moves, sys_error* err) noexcept nogil
cdef int userfaultfd_enter(guard_kind kind, sys_error* err) noexcept nogil
cdef void userfaultfd_leave(guard_kind kind) noexcept nogil
# The caller holds the fork lock from shut to release.
cdef int userfaultfd_shut(window_t* w, sys_error* err) noexcept nogil
cdef bint userfaultfd_moves(const window_t* w) noexcept nogil
cdef int userfaultfd_release(window_t* w, bint all_remapped, sys_error* err) noexcept nogil
cdef void userfaultfd_tidy(guard_kind kind) noexcept nogil
cdef uint32_t userfaultfd_n_waits() noexcept nogil
