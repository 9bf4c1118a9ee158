"""Shared pages that nobody shares any more; see release.pyx."""

from ksmcore._pass.state cimport engine_core


cdef void release_idle(engine_core* c, bint may_read) noexcept nogil
cdef void release_if_worth(engine_core* c, bint may_read) noexcept nogil
