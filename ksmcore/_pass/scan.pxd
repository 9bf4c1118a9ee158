"""The path of a page; see scan.pyx."""

from libc.stdint cimport uintptr_t

from ksmcore._kernel.syscalls cimport sys_error
from ksmcore._pass.state cimport engine_core


cdef int scan_at(
    engine_core* c, uintptr_t* cursor, uintptr_t end, bint immediate, bint patient, size_t* n_pages, sys_error* err
) noexcept nogil
cdef bint scan_pass_over(engine_core* c, uintptr_t* cursor, uintptr_t end, size_t* n_pages) noexcept nogil
