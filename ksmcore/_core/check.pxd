"""What must hold between the records of an engine; see check.pyx."""

from ksmcore._pass.state cimport engine_core


cdef int check_engine(engine_core* c, bint are_filed) noexcept nogil
