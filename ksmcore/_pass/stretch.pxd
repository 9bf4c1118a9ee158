"""Stretches of one repeated page; see stretch.pyx."""

from libc.stdint cimport uint32_t

from ksmcore._pass.state cimport engine_core


cdef uint32_t stretch_follow(engine_core* c, size_t i, size_t n_look) noexcept nogil
cdef size_t stretch_guess(const engine_core* c, size_t n_look) noexcept nogil
cdef void stretch_begin_span(engine_core* c) noexcept nogil
