"""Reading memory that the program may unmap or protect at any moment; see reader.pyx."""

from libc.stdint cimport uint32_t


cdef extern from "_kernel/reader.h":
    ctypedef struct ksm_reader:
        pass

# Between enter and leave, counted, a thread reads under protection, where handlers of SIGSEGV and SIGBUS are
# installed (see guard_enter). It gets no other signals meanwhile.
cdef void reader_enter() noexcept nogil
cdef void reader_leave() noexcept nogil
cdef void reader_return(void* context) noexcept nogil # for handlers: returns only if the thread does not read
cdef ksm_reader* reader_here() noexcept nogil        # this thread's, or NULL outside of it
