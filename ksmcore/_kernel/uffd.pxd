"""The system calls of userfaultfd; see uffd.pyx."""

from libc.stdint cimport uintptr_t

from ksmcore._kernel.syscalls cimport sys_error


# What to be told of: accesses to pages that are not there, writes to pages that are protected.
cdef enum uffd_mode:
    UFFD_MISSING = 1
    UFFD_PROTECTED = 2


cdef int uffd_open(bint user_mode_only, bint* moves, sys_error* err) noexcept nogil
cdef int uffd_open_async(sys_error* err) noexcept nogil
cdef int uffd_register(int fd, uintptr_t addr, size_t len_bytes, uffd_mode mode, sys_error* err) noexcept nogil
cdef int uffd_unregister(int fd, uintptr_t addr, size_t len_bytes, sys_error* err) noexcept nogil
cdef int uffd_protect(int fd, uintptr_t addr, size_t len_bytes, bint on, sys_error* err) noexcept nogil
cdef int uffd_move(
    int fd, uintptr_t target, uintptr_t source, size_t len_bytes, size_t* moved_bytes, sys_error* err
) noexcept nogil
cdef int uffd_copy(
    int fd, uintptr_t target, uintptr_t source, size_t len_bytes, sys_error* err
) noexcept nogil
cdef int uffd_wake(int fd, uintptr_t addr, size_t len_bytes, sys_error* err) noexcept nogil
cdef unsigned int uffd_count(int fd) noexcept nogil      # faults since the last count
