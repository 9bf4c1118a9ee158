"""The scratch: memory that only the scanner knows, where pages are moved to while a window is open.

Window by window is filled from its start to its end, and all of it given up at once: each time the kernel takes pages
away, other processors that run this process have to be told, which takes them and the caller longer than all else that
a window costs. The caller holds the fork lock; the install lock, where it begins or ends.

There are two: one for single pages, and one that takes a huge page as a whole. The kernel moves a huge page
without splitting it only to an aligned place without a page table, so that one is mapped anew before
another is moved there. To give up a huge page at once takes a hundredth of the time that its 512 pages would.
"""

from libc.stdint cimport uintptr_t
from libc.string cimport memset

from ksmcore._kernel.syscalls cimport (
    ADVISE_DONTDUMP, ADVISE_DONTFORK, ADVISE_DONTNEED, ADVISE_NOHUGEPAGE, sys_advise, sys_error, sys_error_clear,
    sys_map_anon, sys_map_anon_at, sys_unmap,
)
from ksmcore._kernel.uffd cimport UFFD_PROTECTED, uffd_register


cdef int scratch_init(scratch_t* scratch, size_t len_bytes, bint whole, sys_error* err) noexcept nogil:
    """An empty one of len_bytes (for a huge page its size), not registered. -1 without memory for it."""
    cdef sys_error ignored
    sys_error_clear(&ignored)
    memset(scratch, 0, sizeof(scratch_t))
    scratch.mapped_bytes = 2 * len_bytes if whole else len_bytes
    scratch.mapped = <uintptr_t>sys_map_anon(scratch.mapped_bytes, err)
    if scratch.mapped == 0:
        return -1
    scratch.addr = scratch.mapped
    if whole:
        scratch.addr += (len_bytes - scratch.mapped % len_bytes) % len_bytes
    scratch.len_bytes = len_bytes
    scratch.whole = whole
    _advise(scratch)
    sys_advise(scratch.addr, len_bytes, ADVISE_NOHUGEPAGE, &ignored)
    return 0


cdef void scratch_end(scratch_t* scratch) noexcept nogil:
    cdef sys_error ignored
    sys_error_clear(&ignored)
    # Unchecked: our own mapping, whole.
    if scratch.mapped != 0:
        sys_unmap(scratch.mapped, scratch.mapped_bytes, &ignored)
    memset(scratch, 0, sizeof(scratch_t))


cdef int scratch_register(scratch_t* scratch, int fd, sys_error* err) noexcept nogil:
    """For whatever: the kernel moves pages only to where the descriptor is registered."""
    if not scratch.is_registered:
        if uffd_register(fd, scratch.addr, scratch.len_bytes, UFFD_PROTECTED, err) != 0:
            return -1
        scratch.is_registered = True
    return 0


cdef int scratch_take(scratch_t* scratch, int fd, size_t len_bytes, uintptr_t* addr, sys_error* err) noexcept nogil:
    """Where the pages of the next window go: nothing is there, and the kernel moves no page to where one is."""
    if scratch.used_bytes + len_bytes > scratch.len_bytes and _empty(scratch, err) != 0:
        return -1
    if scratch_register(scratch, fd, err) != 0:
        return -1
    addr[0] = scratch.addr + scratch.used_bytes
    scratch.used_bytes += len_bytes
    return 0


cdef void scratch_empty(scratch_t* scratch) noexcept nogil:
    """Give up what is in it; if that fails, before the next window."""
    cdef sys_error ignored
    sys_error_clear(&ignored)
    if scratch.used_bytes != 0:
        _empty(scratch, &ignored)


cdef void _advise(scratch_t* scratch) noexcept nogil:
    """What is moved there may be of memory that children and core files are not to have."""
    cdef sys_error ignored
    sys_error_clear(&ignored)
    sys_advise(scratch.addr, scratch.len_bytes, ADVISE_DONTFORK, &ignored)
    sys_advise(scratch.addr, scratch.len_bytes, ADVISE_DONTDUMP, &ignored)


cdef int _empty(scratch_t* scratch, sys_error* err) noexcept nogil:
    if not scratch.whole:
        if sys_advise(scratch.addr, scratch.used_bytes, ADVISE_DONTNEED, err) != 0:
            return -1
    else:
        scratch.is_registered = False
        if sys_map_anon_at(scratch.addr, scratch.len_bytes, err) != 0:
            return -1
        _advise(scratch)
    scratch.used_bytes = 0
    return 0
