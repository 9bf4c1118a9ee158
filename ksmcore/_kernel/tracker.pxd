"""Written-page tracking; see tracker.pyx."""

from libc.stdint cimport uintptr_t

from ksmcore._kernel.pagemap cimport pagemap
from ksmcore._kernel.syscalls cimport sys_error, sys_file


ctypedef struct tracker_t:
    sys_file file            # an asynchronous userfaultfd; none: written pages are not told


cdef int tracker_open(tracker_t* tracker, const pagemap* pm, sys_error* err) noexcept nogil
cdef void tracker_close(tracker_t* tracker) noexcept nogil
cdef bint tracker_is_there(tracker_t* tracker) noexcept nogil
cdef int tracker_watch(tracker_t* tracker, uintptr_t addr, uintptr_t end, sys_error* err) noexcept nogil
cdef void tracker_unwatch(tracker_t* tracker, uintptr_t addr, uintptr_t end) noexcept nogil
cdef void tracker_disarm(tracker_t* tracker, uintptr_t addr, size_t len_bytes) noexcept nogil

# For guard windows: a range is let go before, and what is anonymous memory in it taken back afterwards.
# fd: of the tracker that watches it, -1: none does.
cdef int tracker_let_go(int fd, uintptr_t addr, size_t len_bytes, sys_error* err) noexcept nogil
cdef void tracker_take_back(int fd, uintptr_t addr, size_t len_bytes) noexcept nogil
