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

# The same for a short-lived thread that was begun by one which reads, and so has its signals blocked. It keeps the
# place by itself: the first look at a thread-local variable of ours would have the C library set up a heap for it.
cdef ksm_reader* reader_borrow() noexcept nogil
cdef void reader_give_back(ksm_reader* reader) noexcept nogil
