"""Shared pages that nobody shares any more; see release.pyx."""

from ksmcore._kernel.syscalls cimport sys_error
from ksmcore._pass.state cimport engine_core


cdef void release_idle(engine_core* c) noexcept nogil
cdef void release_if_worth(engine_core* c) noexcept nogil
