"""The store, the memory files of shared pages; see store.pyx."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t, uintptr_t

from ksmcore._kernel.pagemap cimport pagemap
from ksmcore._kernel.syscalls cimport sys_error
from ksmcore._records.store_files cimport DEAD, store_file, store_file_of, store_forget, store_t


cdef enum:
    MAX_SHARERS = 0x01ff0000   # what `number` of a slot can hold, less what one batch can add


cdef int store_told_huge     # -1; or, by a test, whether the kernel gives memory files huge pages


# What a slot in use is: pending (to be written yet), shared by so many pages, or dead.
cdef inline bint store_is_pending(const store_t* store, uint32_t slot) noexcept nogil:
    return store.uses[slot].pending


cdef inline uint32_t store_pending(const store_t* store, uint32_t slot) noexcept nogil:
    """Of a pending slot: what store_set_pending was told."""
    return store.uses[slot].number


cdef inline void store_set_pending(store_t* store, uint32_t slot, uint32_t number) noexcept nogil:
    """From a fresh slot to a pending one; `number`, the caller's, names its place in some list."""
    store.uses[slot].pending = 1
    store.uses[slot].number = number


cdef inline void store_settle(store_t* store, uint32_t slot) noexcept nogil:
    """From a pending slot to one without sharers."""
    store.uses[slot].pending = 0
    store.uses[slot].number = 0


cdef inline uint32_t store_sharers(const store_t* store, uint32_t slot) noexcept nogil:
    """Virtual pages that map a slot, which is not dead."""
    return 0 if store.uses[slot].pending else store.uses[slot].number


cdef inline bint store_is_dead(const store_t* store, uint32_t slot) noexcept nogil:
    return store.uses[slot].used and store.uses[slot].number == DEAD


cdef inline bint store_is_live(const store_t* store, uint32_t slot) noexcept nogil:
    """Has this slot bytes that pages share, or may share?"""
    return (
        0 < slot < store.top and store.uses[slot].used and not store.uses[slot].pending
        and not store.uses[slot].hollow and store.uses[slot].number != DEAD
    )


cdef inline bint store_is_shared_block(const store_t* store, uint32_t slot, uint32_t digest) noexcept nogil:
    """Does a block of shared pages with this checksum begin here, whose first slot has a sharer?"""
    return (
        0 < slot < store.top and store.nodes[slot].digest == digest and store.uses[slot].used
        and not store.uses[slot].pending and not store.uses[slot].copy and not store.uses[slot].orphan
        and 0 < store.uses[slot].number < DEAD
    )


cdef inline bint store_is_orphan(const store_t* store, uint32_t slot) noexcept nogil:
    """Is its file out of reach? Then it gets no further sharer."""
    return store.uses[slot].orphan


cdef inline int store_fd(const store_t* store, uint32_t slot) noexcept nogil:
    """The file that a slot lies in."""
    return store_file_of(store, slot).file.fd


cdef inline long long store_offset(const store_t* store, uint32_t slot) noexcept nogil:
    """Where in it the slot lies."""
    return <long long>(<size_t>(slot - store_file_of(store, slot).first) * store.page_bytes)


cdef bint store_is_there(const store_t* store, uint32_t slot) noexcept nogil
cdef bint store_slot_at(
    store_t* store, uint64_t dev_major, uint64_t dev_minor, uint64_t inode, uint64_t offset, uint32_t* slot
) noexcept nogil
cdef void store_init(store_t* store, size_t page_bytes) noexcept nogil
cdef void store_destroy(store_t* store) noexcept nogil
cdef uint32_t store_alloc(store_t* store, uint32_t n_slots, sys_error* err) noexcept nogil
cdef void store_align(store_t* store, uint32_t n_slots) noexcept nogil
cdef const uint8_t* store_page(store_t* store, uint32_t slot) noexcept nogil
cdef int store_write(
    store_t* store, uint32_t slot, const uint8_t* source, uint32_t n_pages, sys_error* err
) noexcept nogil
cdef void store_share(store_t* store, uint32_t slot) noexcept nogil
cdef uint32_t store_unshare(store_t* store, uint32_t slot) noexcept nogil
cdef void store_idle(store_t* store, uint32_t first) noexcept nogil
cdef void store_wake(store_t* store, uint32_t slot) noexcept nogil
cdef void store_find_again(store_t* store, const uint8_t* is_elsewhere, uint32_t n_slots) noexcept nogil
cdef uint32_t store_block(store_t* store, uint32_t slot, uint32_t* n_copies) noexcept nogil
cdef uint64_t store_block_sharers(store_t* store, uint32_t slot) noexcept nogil
cdef void store_release(store_t* store, uint32_t slot) noexcept nogil
cdef void store_trim(store_t* store) noexcept nogil
cdef void store_begin_pass(store_t* store, pagemap* pm, store_forget forget, void* context) noexcept nogil
cdef uint32_t store_frozen(const store_t* store) noexcept nogil
cdef size_t store_bytes(store_t* store) noexcept nogil
