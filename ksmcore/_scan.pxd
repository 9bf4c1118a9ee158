"""The path of a page; see _scan.pyx."""

from libc.stdint cimport uint32_t, uintptr_t

from ksmcore._engine cimport engine_core
from ksmcore._sys cimport sys_error


cdef int core_scan_at(
    engine_core* c, uintptr_t* cursor, uintptr_t end, bint immediate, size_t* n_pages, sys_error* err
) noexcept nogil
cdef void core_forget_item(engine_core* c, uint32_t item) noexcept nogil
