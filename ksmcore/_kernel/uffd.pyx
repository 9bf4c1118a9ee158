"""The system calls of userfaultfd, each return value checked and errno kept at once (see syscalls).

A descriptor stands for the memory of the process that opened it. In a forked child it would still mean the
parent's, so it is closed there (see syscalls).
"""

from libc.stdint cimport uintptr_t

from ksmcore._kernel.syscalls cimport (
    CALL_UFFD_COPY, CALL_UFFD_MOVE, CALL_UFFD_MOVE_THEN_FAIL, CALL_UFFD_PROTECT, CALL_UFFD_REGISTER,
    CALL_UFFD_REGISTER_THEN_FAIL, CALL_UFFD_UNREGISTER, CALL_UFFD_WAKE, CALL_USERFAULTFD, sys_check, sys_error,
    sys_injected, sys_opened, sys_opening,
)

cdef extern from "_kernel/uffd.h" nogil:
    int ksm_uffd_open(int user_mode_only, int* moves)
    int ksm_uffd_open_async()
    int ksm_uffd_register(int fd, uintptr_t addr, size_t len, int mode)
    int ksm_uffd_unregister(int fd, uintptr_t addr, size_t len)
    int ksm_uffd_protect(int fd, uintptr_t addr, size_t len, int on)
    int ksm_uffd_move(int fd, uintptr_t target, uintptr_t source, size_t len, size_t* moved)
    int ksm_uffd_copy(int fd, uintptr_t target, uintptr_t source, size_t len)
    int ksm_uffd_wake(int fd, uintptr_t addr, size_t len)
    unsigned int ksm_uffd_count(int fd)


cdef int uffd_open(bint user_mode_only, bint* moves, sys_error* err) noexcept nogil:
    """A new descriptor, or -1. *moves: whether pages can be moved is wanted, and whether it is had."""
    cdef int wanted = moves[0]
    cdef int fd
    if sys_injected(CALL_USERFAULTFD, 0, 0, err):
        return -1
    sys_opening()
    fd = sys_opened(ksm_uffd_open(user_mode_only, &wanted))
    moves[0] = wanted != 0
    sys_check(fd < 0, CALL_USERFAULTFD, 0, 0, err)
    return fd


cdef int uffd_open_async(sys_error* err) noexcept nogil:
    """A new descriptor for tracking writes, or -1."""
    cdef int fd
    sys_opening()
    fd = sys_opened(ksm_uffd_open_async())
    sys_check(fd < 0, CALL_USERFAULTFD, 0, 0, err)
    return fd


cdef int uffd_register(int fd, uintptr_t addr, size_t len_bytes, uffd_mode mode, sys_error* err) noexcept nogil:
    if sys_injected(CALL_UFFD_REGISTER, addr, len_bytes, err):
        return -1
    if sys_check(ksm_uffd_register(fd, addr, len_bytes, mode) != 0, CALL_UFFD_REGISTER, addr, len_bytes, err):
        return -1
    return sys_injected(CALL_UFFD_REGISTER_THEN_FAIL, addr, len_bytes, err)


cdef int uffd_unregister(int fd, uintptr_t addr, size_t len_bytes, sys_error* err) noexcept nogil:
    if sys_injected(CALL_UFFD_UNREGISTER, addr, len_bytes, err):
        return -1
    return sys_check(ksm_uffd_unregister(fd, addr, len_bytes) != 0, CALL_UFFD_UNREGISTER, addr, len_bytes, err)


cdef int uffd_protect(int fd, uintptr_t addr, size_t len_bytes, bint on, sys_error* err) noexcept nogil:
    if sys_injected(CALL_UFFD_PROTECT, addr, len_bytes, err):
        return -1
    return sys_check(ksm_uffd_protect(fd, addr, len_bytes, on) != 0, CALL_UFFD_PROTECT, addr, len_bytes, err)


cdef int uffd_move(
    int fd, uintptr_t target, uintptr_t source, size_t len_bytes, size_t* moved_bytes, sys_error* err
) noexcept nogil:
    """Move pages without copying them. Failing, it may have moved some: how many, *moved_bytes does not
    tell reliably."""
    moved_bytes[0] = 0
    if sys_injected(CALL_UFFD_MOVE, source, len_bytes, err):
        return -1
    if sys_check(
        ksm_uffd_move(fd, target, source, len_bytes, moved_bytes) != 0, CALL_UFFD_MOVE, source, len_bytes, err
    ):
        return -1
    return sys_injected(CALL_UFFD_MOVE_THEN_FAIL, source, len_bytes, err)


cdef int uffd_copy(
    int fd, uintptr_t target, uintptr_t source, size_t len_bytes, sys_error* err
) noexcept nogil:
    """Give pages that are missing the bytes at `source`. ENOENT: nothing registered is there."""
    if sys_injected(CALL_UFFD_COPY, target, len_bytes, err):
        return -1
    return sys_check(ksm_uffd_copy(fd, target, source, len_bytes) != 0, CALL_UFFD_COPY, target, len_bytes, err)


cdef int uffd_wake(int fd, uintptr_t addr, size_t len_bytes, sys_error* err) noexcept nogil:
    if sys_injected(CALL_UFFD_WAKE, addr, len_bytes, err):
        return -1
    return sys_check(ksm_uffd_wake(fd, addr, len_bytes) != 0, CALL_UFFD_WAKE, addr, len_bytes, err)


cdef unsigned int uffd_count(int fd) noexcept nogil:
    return ksm_uffd_count(fd)
