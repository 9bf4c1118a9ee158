"""Which slots of a store are mapped in this process: counted by what the rmap table knows, and asked of the kernel.

A claim is a page that lies over a slot, whether it shares it or is a private copy over it. A slot with claims is not
handed out again, even when its memory has been given back: it is hollow then.

The caller holds the engine's lock.
"""

from libc.stdint cimport uint8_t, uint32_t, uintptr_t
from libc.string cimport memset

from ksmcore._kernel.pagemap cimport PAGE_OWNED, PAGE_UNSURE, SPAN_PAGES, pagemap, pagemap_query
from ksmcore._kernel.syscalls cimport sys_error, sys_error_clear
from ksmcore._records.store_files cimport store_file, store_file_of, store_t, store_use

cdef extern from *:
    """
    static void touch(const void *page) { (void)*(const volatile char *)page; }
    """
    void touch(const void* page) nogil


cdef bint _has_gone(const store_t* store, uint32_t slot) noexcept nogil:
    """With its file. Nobody counts what lies over it."""
    return store.segments[slot // store.slots_per_segment].view == NULL


cdef void claims_set_hollow(store_t* store, uint32_t slot, bint hollow) noexcept nogil:
    """From a free slot to a hollow one, or back."""
    cdef store_file* file = store_file_of(store, slot)
    cdef int more = 1 if hollow else -1
    memset(&store.uses[slot], 0, sizeof(store_use))
    store.uses[slot].used = store.uses[slot].hollow = hollow
    store.n_used += more
    store.n_hollow += more
    file.n_used += more
    file.n_hollow += more


cdef void claims_add(store_t* store, uint32_t slot) noexcept nogil:
    """One page more lies over a slot. One that is free (the program has kept a mapping of it) is so no more."""
    if _has_gone(store, slot):
        return
    store.claims[slot] += 1
    if not store.uses[slot].used:
        claims_set_hollow(store, slot, True)


cdef void claims_lose(store_t* store, uint32_t slot) noexcept nogil:
    """Keep a slot and its bytes, until store_find_again: it may be mapped somewhere by the program's own means."""
    if slot < store.top and store.uses[slot].used:
        store.uses[slot].lost = 1
        store.has_lost = True


cdef void claims_drop(store_t* store, uint32_t slot) noexcept nogil:
    """One page less. A hollow slot that nothing registered lies over any more is lost until a census has found it
    nowhere else: only then can it be handed out again."""
    if _has_gone(store, slot):
        return
    store.claims[slot] -= 1
    if store.claims[slot] == 0 and store.uses[slot].hollow:
        claims_lose(store, slot)


cdef uint32_t claims_unshown(store_t* store, pagemap* pm, uint32_t slot, uint32_t n_slots) noexcept nogil:
    """How many of these slots of one file, from the first one on, no page table shows but that of our own view.

    The kernel counts the entries that show a page, and tells whether there is but one. Moving a mapping does not change
    that number: so it is right whatever moves meanwhile, and of other processes too. It leaves out mappings through
    which nobody has read yet. All of them where there is no page map to ask.
    """
    cdef uint8_t flags[<int>SPAN_PAGES]
    cdef sys_error ignored
    cdef const uint8_t* view
    cdef uint32_t done = 0, n, i, place
    sys_error_clear(&ignored)
    while done < n_slots:
        place = (slot + done) % store.slots_per_segment
        view = store.segments[(slot + done) // store.slots_per_segment].view + <size_t>place * store.page_bytes
        n = min(min(n_slots - done, <uint32_t>SPAN_PAGES), store.slots_per_segment - place)
        for i in range(n):
            touch(view + <size_t>i * store.page_bytes)
        if pagemap_query(pm, <uintptr_t>view, n, flags, &ignored) != 0:
            return done
        for i in range(n):
            if not flags[i] & PAGE_OWNED and not (flags[i] & PAGE_UNSURE and pm.file.fd < 0):
                return done + i
        done += n
    return n_slots
