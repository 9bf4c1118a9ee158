"""Reading memory that the program may unmap or protect at any moment; see reader.pyx."""

from libc.stdint cimport uint32_t


cdef extern from "_kernel/reader.h":
    ctypedef struct ksm_reader:
        pass

# Between enter and leave, counted, a thread reads under protection, where a SIGSEGV handler is installed
# (see guard_enter).
cdef void reader_enter() noexcept nogil
cdef void reader_leave() noexcept nogil
cdef void reader_return() noexcept nogil              # for the handler: returns only if the thread does not read
cdef ksm_reader* reader_here() noexcept nogil        # this thread's, or NULL outside of it
