"""Keeping writers out of pages while they are compared and remapped; see _guard.pyx."""

from libc.stdint cimport uint32_t, uintptr_t

from ksmcore._sys cimport sys_error


# A guard must be entered before a window is opened and left afterwards; entering is counted, and
# costs a signal-handler installation, so it is done once for a batch of windows.
cdef int guard_enter(sys_error* err) noexcept nogil
cdef void guard_leave() noexcept nogil

# Between open and close: no write to the range gets through and none is lost; the caller holds the
# fork gate, must not need the GIL, must not allocate and must not take a lock.
cdef int guard_open(uintptr_t addr, size_t len_bytes, sys_error* err) noexcept nogil
cdef int guard_close(uintptr_t addr, size_t len_bytes, bint all_remapped, sys_error* err) noexcept nogil

cdef uint32_t guard_n_waits() noexcept nogil     # writers that had to wait for a window, ever
