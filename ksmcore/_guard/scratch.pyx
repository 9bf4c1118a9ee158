"""The scratch: memory that only the scanner knows, where pages are moved to while a window is open.

The caller holds the fork lock in a window, and the install lock outside of one.

There are two: one for single pages, and one that takes a huge page as a whole. The kernel moves a huge page
without splitting it only to an aligned place without a page table, so that one is mapped anew after each
window. To give up a huge page at once takes a hundredth of the time that its 512 pages would.
"""

from libc.stdint cimport uintptr_t
from libc.string cimport memset

from ksmcore._kernel.syscalls cimport (
    ADVISE_DONTFORK, ADVISE_DONTNEED, ADVISE_NOHUGEPAGE, sys_advise, sys_error, sys_error_clear, sys_map_anon,
    sys_map_anon_at, sys_unmap,
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
    sys_advise(scratch.addr, len_bytes, ADVISE_DONTFORK, &ignored)
    sys_advise(scratch.addr, len_bytes, ADVISE_NOHUGEPAGE, &ignored)
    return 0


cdef void scratch_end(scratch_t* scratch) noexcept nogil:
    cdef sys_error ignored
    sys_error_clear(&ignored)
    # Unchecked: our own mapping, whole.
    if scratch.mapped != 0:
        sys_unmap(scratch.mapped, scratch.mapped_bytes, &ignored)
    memset(scratch, 0, sizeof(scratch_t))


cdef int scratch_ready(scratch_t* scratch, int fd, sys_error* err) noexcept nogil:
    """Before a window: what is in it after a move must be what was moved."""
    if scratch.is_full and _empty(scratch, scratch.len_bytes, err) != 0:
        return -1
    if not scratch.is_registered:
        # For whatever: the kernel moves pages only to where the descriptor is registered.
        if uffd_register(fd, scratch.addr, scratch.len_bytes, UFFD_PROTECTED, err) != 0:
            return -1
        scratch.is_registered = True
    return 0


cdef void scratch_empty(scratch_t* scratch, size_t len_bytes) noexcept nogil:
    """Give up what is in the first len_bytes of it; if that fails, before the next window."""
    cdef sys_error ignored
    sys_error_clear(&ignored)
    _empty(scratch, len_bytes, &ignored)


cdef int _empty(scratch_t* scratch, size_t len_bytes, sys_error* err) noexcept nogil:
    cdef sys_error ignored
    scratch.is_full = True
    if not scratch.whole:
        if sys_advise(scratch.addr, len_bytes, ADVISE_DONTNEED, err) != 0:
            return -1
    else:
        scratch.is_registered = False
        if sys_map_anon_at(scratch.addr, scratch.len_bytes, err) != 0:
            return -1
        sys_error_clear(&ignored)
        sys_advise(scratch.addr, scratch.len_bytes, ADVISE_DONTFORK, &ignored)
    scratch.is_full = False
    return 0
