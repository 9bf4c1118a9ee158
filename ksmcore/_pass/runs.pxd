"""From intents to runs to the merge protocol; see runs.pyx."""

from ksmcore._pass.batch cimport batch


cdef int runs_flush(batch* b) noexcept nogil
