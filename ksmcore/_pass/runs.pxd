"""From intents to runs to the merge protocol; see runs.pyx."""

from ksmcore._pass.batch cimport batch


cdef void runs_choose(batch* b) noexcept nogil
cdef int runs_carry_out(batch* b) noexcept nogil
