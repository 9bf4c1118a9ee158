"""The mappings of the process, one after the other by address; allocates nothing.

All of them are read as text (0.5 us each). For a range, the kernel is asked where it can answer
(PROCMAP_QUERY, Linux 6.11); before that, all are read and most passed over.

Their traits, what the program has advised and the like, only smaps tells: 2.5 us each, and 10-15 ms more for each GiB
of small resident pages on the way, since the kernel walks their page tables.
"""

from libc.errno cimport EFAULT, ENOENT, ENOTTY, errno
from libc.stdint cimport uintptr_t

from ksmcore._kernel.syscalls cimport CALL_PREAD, sys_check, sys_close, sys_error, sys_injected, sys_open_read

cdef extern from "_kernel/maps.h" nogil:
    int ksm_vma_each(int fd, vma_visit visit, void* context)
    int ksm_vma_at(int fd, uintptr_t addr, vma_t* vma)
    int ksm_traits_each(int fd, uintptr_t end, vma_visit visit, void* context)
    ctypedef struct ksm_policy:
        int mode
    int ksm_policy_at(uintptr_t addr, ksm_policy* policy)
    int ksm_policy_set(uintptr_t addr, size_t len_bytes, const ksm_policy* policy)
    int ksm_key_set(uintptr_t addr, size_t len_bytes, int key)

cdef extern from "<sys/mman.h>" nogil:
    int mlock(const void* addr, size_t len_bytes)


ctypedef struct range_visit:
    uintptr_t start
    uintptr_t end
    vma_visit visit
    void* context


cdef void _if_within(const vma_t* vma, void* context) noexcept nogil:
    cdef range_visit* wanted = <range_visit*>context
    if vma.start < wanted.end and vma.end > wanted.start:
        wanted.visit(vma, wanted.context)


cdef int maps_each(vma_visit visit, void* context, sys_error* err) noexcept nogil:
    """Visit every mapping. -1 with *err when the kernel does not tell; some may have been visited."""
    cdef int fd = sys_open_read(b"/proc/self/maps", err)
    cdef int rc
    if fd < 0:
        return -1
    rc = sys_injected(CALL_PREAD, 0, 0, err)
    if rc == 0:
        rc = sys_check(ksm_vma_each(fd, visit, context) != 0, CALL_PREAD, 0, 0, err)
    sys_close(fd)
    return rc


cdef int maps_each_in(
    uintptr_t start, uintptr_t end, vma_visit visit, void* context, sys_error* err
) noexcept nogil:
    """Visit every mapping that overlaps [start, end)."""
    cdef range_visit wanted
    cdef vma_t vma
    cdef uintptr_t cursor = start
    cdef int fd = sys_open_read(b"/proc/self/maps", err)
    cdef int rc = 0
    if fd < 0:
        return -1
    while cursor < end:
        rc = ksm_vma_at(fd, cursor, &vma)
        if rc != 0 or vma.start >= end:
            break
        visit(&vma, context)
        cursor = vma.end
    if rc != 0 and errno == ENOENT:
        rc = 0
    elif rc != 0 and errno == ENOTTY and cursor == start:
        wanted.start = start
        wanted.end = end
        wanted.visit = visit
        wanted.context = context
        rc = sys_check(ksm_vma_each(fd, _if_within, &wanted) != 0, CALL_PREAD, start, end - start, err)
    elif rc != 0:
        sys_check(True, CALL_PREAD, start, end - start, err)
    sys_close(fd)
    return rc


cdef int maps_traits_each(uintptr_t end, vma_visit visit, void* context, sys_error* err) noexcept nogil:
    """Visit every mapping below `end`, with its traits. -1 with *err when the kernel does not tell."""
    cdef int fd = sys_open_read(b"/proc/self/smaps", err)
    cdef int rc
    if fd < 0:
        return -1
    rc = sys_injected(CALL_PREAD, 0, 0, err)
    if rc == 0:
        rc = sys_check(ksm_traits_each(fd, end, visit, context) != 0, CALL_PREAD, 0, 0, err)
    sys_close(fd)
    return rc


cdef int maps_has_policy(uintptr_t addr) noexcept nogil:
    """A policy of the whole process does not count: what is mapped anew falls under it again."""
    cdef ksm_policy policy
    if ksm_policy_at(addr, &policy) == 0:
        return policy.mode != 0
    return 0 if errno == EFAULT else -1          # nothing is mapped there (any more)


# ---- what is given to a new mapping -------------------------------------------------------------------
# Unchecked: where it is refused the bytes are right all the same, and it was allowed for the mapping before.

cdef void maps_give_policy(uintptr_t source, uintptr_t target, size_t len_bytes) noexcept nogil:
    """Give pages that are not there yet the NUMA policy that others have for themselves, if any."""
    cdef ksm_policy policy
    if ksm_policy_at(source, &policy) == 0 and policy.mode != 0:
        ksm_policy_set(target, len_bytes, &policy)


cdef void maps_give_key(uintptr_t addr, size_t len_bytes, int key) noexcept nogil:
    ksm_key_set(addr, len_bytes, key)


cdef void maps_lock(uintptr_t addr, size_t len_bytes) noexcept nogil:
    mlock(<const void*>addr, len_bytes)
