"""Copies that share their pages with the source from the start; see copy.pyx."""

from libc.stdint cimport uintptr_t

from ksmcore._pass.state cimport engine_core


cdef void copy_span(
    engine_core* c, uintptr_t source, uintptr_t target, size_t n_pages, bint may_share, size_t* n_plain
) noexcept nogil
