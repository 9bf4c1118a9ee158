"""The store: one memory file that holds all shared pages of an engine.

A slot is one page of the file. Slots are handed out in the order in which they are asked for, so that
pages which are merged one after the other stand one after the other in the file, and one mapping
serves them. The bytes of a slot are written once, before anybody maps it, and never change while it
exists; the file is read through private read-only views, and written with pwrite, so no writable
mapping of it ever exists.

Where the kernel gives memory files huge pages, the copy of a huge page begins at a multiple of its size, so that
it can be mapped as one again.

A block is a slot and the copies that follow it (`copy` set), all with the same bytes. A stretch of one
repeated page maps a block over and over. Only its first slot stands in the stable tree; the block is
released as a whole, when none of its slots has a sharer.

After a fork the child maps the store as well. Slots that existed then are frozen: they go on being
shared, but are neither punched nor written again while a process of that fork lives. `seen_forks` is
compared with the process's count of forks, under the fork lock, before anything is punched or written.
A frozen slot that is released is dead: used by nobody here, and remembering (in its tree node, which it
does not need any more) the last fork whose child may map it. `store_thaw` gives dead slots back, and
thaws the others, as the children end.

A slot whose memory is given back while pages of this process still lie over it, all of them private copies, is
hollow: it is handed out again when nothing lies over it any more. So a copy that the program throws away (madvise)
uncovers zeros, never the bytes of somebody else.

Invariants: n_used counts slots with `used`; n_shared those with sharers that are not pending; a slot
that is not used has no sharers, no claims and no other flag; `copy` slots follow their block without a gap; a dead
slot is frozen, and has DEAD in place of its sharers; a hollow one has none, and claims unless it is lost.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport free, qsort, realloc
from libc.string cimport memset, strstr

from ksmcore._kernel.forks cimport forks_count, forks_gone, forks_lock, forks_unlock, forks_watch
from ksmcore._kernel.pagemap cimport PAGE_OWNED, PAGE_UNSURE, SPAN_PAGES, pagemap, pagemap_query
from ksmcore._kernel.syscalls cimport (
    ADVISE_DONTFORK, sys_advise, sys_close, sys_drop, sys_error, sys_error_clear, sys_grow, sys_is_kept, sys_keep,
    sys_map_anon, sys_map_view, sys_memfd, sys_open_read, sys_punch, sys_read_at, sys_truncate, sys_unmap,
    sys_write_at,
)
from ksmcore._trees cimport rb_node

cdef extern from *:
    """
    static void touch(const void *page) { (void)*(const volatile char *)page; }
    """
    void touch(const void* page) nogil

cdef enum:
    MAX_SLOTS = 0x7fffffff     # a tree link holds 31 bits
    # Released slots are searched for once they are a quarter of all: searching less often keeps new
    # pages together at the end of the file, searching later would let the arrays grow without need.
    REUSE_SHARE = 4


cdef int store_told_huge = -1


cdef bint _gets_huge_pages() noexcept nogil:
    """Does the kernel give memory files huge pages unasked? Unless somebody switched it on it does not."""
    cdef char modes[128]
    cdef sys_error ignored
    cdef int fd
    if store_told_huge >= 0:
        return store_told_huge
    sys_error_clear(&ignored)
    fd = sys_open_read(b"/sys/kernel/mm/transparent_hugepage/shmem_enabled", &ignored)
    if fd < 0:
        return False
    memset(modes, 0, sizeof(modes))
    # Always reported as failed, for there are fewer bytes; those that there are have come.
    sys_read_at(fd, modes, sizeof(modes) - 1, 0, &ignored)
    sys_close(fd)
    return (
        strstr(modes, b"[always]") != NULL or strstr(modes, b"[within_size]") != NULL
        or strstr(modes, b"[force]") != NULL
    )


cdef void store_init(store_t* store, size_t page_bytes) noexcept nogil:
    memset(store, 0, sizeof(store_t))
    store.gets_huge_pages = -1
    store.file.fd = -1
    store.page_bytes = page_bytes
    store.slots_per_segment = <uint32_t>(SEGMENT_BYTES // page_bytes)
    store.top = store.cursor = 1
    store.seen_forks = forks_count()


cdef bint store_is_there(const store_t* store) noexcept nogil:
    """False when the program closed the descriptor under us. What is shared stays shared, and right; but
    nothing can be added or given back, and above all nothing is written to somebody else's file."""
    return sys_is_kept(&store.file)


cdef void store_destroy(store_t* store) noexcept nogil:
    """Drop the descriptor, the views and the arrays; mappings of the file elsewhere stay right."""
    cdef sys_error ignored
    cdef uint32_t i
    sys_error_clear(&ignored)
    # Unchecked: munmap of whole mappings of our own fails only on a broken argument.
    for i in range(store.n_segments):
        sys_unmap(<uintptr_t>store.views[i], SEGMENT_BYTES, &ignored)
    if store.nodes != NULL:
        sys_unmap(<uintptr_t>store.nodes, <size_t>store.capacity * sizeof(rb_node), &ignored)
    if store.uses != NULL:
        sys_unmap(<uintptr_t>store.uses, <size_t>store.capacity * sizeof(store_use), &ignored)
    if store.claims != NULL:
        sys_unmap(<uintptr_t>store.claims, <size_t>store.capacity * sizeof(uint32_t), &ignored)
    free(store.views)
    if store.file.fd >= 0:
        forks_watch(-1)
    sys_drop(&store.file)
    store_init(store, store.page_bytes)


cdef int _add_segment(store_t* store, sys_error* err) noexcept nogil:
    """Room for one segment more in the file, the views and the arrays.

    Each step leaves the store as it was when a later one fails: a longer file and longer arrays are
    only used up to `capacity`, which is raised last.
    """
    cdef size_t old = store.capacity
    cdef size_t new = old + store.slots_per_segment
    cdef uint8_t* view
    cdef void* grown
    if new > MAX_SLOTS:
        return -1
    if store.file.fd < 0:
        sys_keep(&store.file, sys_memfd(b"ksmcore-store", err))
        if store.file.fd >= 0:
            forks_watch(1)
    if not store_is_there(store):
        return -1
    if sys_truncate(store.file.fd, <long long>(new * store.page_bytes), err) != 0:
        return -1
    grown = realloc(store.views, (store.n_segments + 1) * sizeof(uint8_t*))
    if grown == NULL:
        return -1
    store.views = <uint8_t**>grown
    view = <uint8_t*>sys_map_view(SEGMENT_BYTES, store.file.fd, <long long>(old * store.page_bytes), err)
    if view == NULL:
        return -1
    # A child has no use for the view. When the advice is refused the child merely has it as well.
    sys_advise(<uintptr_t>view, SEGMENT_BYTES, ADVISE_DONTFORK, err)
    if _grow_arrays(store, old, new, err) != 0:
        sys_unmap(<uintptr_t>view, SEGMENT_BYTES, err)
        return -1
    store.views[store.n_segments] = view
    store.n_segments += 1
    store.capacity = <uint32_t>new
    return 0


cdef int _grow_arrays(store_t* store, size_t old, size_t new, sys_error* err) noexcept nogil:
    """All three, or none: what has grown before one fails is cut back to the length that `capacity` tells."""
    cdef void** arrays[3]
    cdef size_t item_bytes[3]
    cdef void* grown
    cdef int i, n_grown = 0
    arrays[0] = <void**>&store.nodes
    arrays[1] = <void**>&store.uses
    arrays[2] = <void**>&store.claims
    item_bytes[0] = sizeof(rb_node)
    item_bytes[1] = sizeof(store_use)
    item_bytes[2] = sizeof(uint32_t)
    while n_grown < 3:
        if old == 0:
            grown = sys_map_anon(new * item_bytes[n_grown], err)
        else:
            grown = sys_grow(arrays[n_grown][0], old * item_bytes[n_grown], new * item_bytes[n_grown], err)
        if grown == NULL:
            break
        arrays[n_grown][0] = grown
        n_grown += 1
    if n_grown == 3:
        return 0
    for i in range(n_grown):
        sys_unmap(<uintptr_t>arrays[i][0] + old * item_bytes[i], (new - old) * item_bytes[i], err)
        if old == 0:
            arrays[i][0] = NULL
    return -1


cdef uint32_t _free_run(store_t* store, uint32_t start, uint32_t n_slots) noexcept nogil:
    """First of `n_slots` free neighbours at or after `start` and below `top`, or 0."""
    cdef uint32_t slot = start
    cdef uint32_t n = 0
    while slot < store.top:
        n = n + 1 if not store.uses[slot].used else 0
        slot += 1
        if n == n_slots:
            return slot - n_slots
    return 0


cdef uint32_t store_alloc(store_t* store, uint32_t n_slots, sys_error* err) noexcept nogil:
    """Hand out `n_slots` neighbouring slots, the first of a block; 0 when there is no room.

    Next fit: the slot after the last one handed out if that is free, else the next free one. The
    cursor goes back to the start only when a good part of the slots is free again.
    """
    cdef uint32_t slot = 0
    cdef uint32_t i
    if store.cursor < store.top:
        slot = _free_run(store, store.cursor, n_slots)
    elif store.top >= store.aligned_end and store.top - 1 - store.n_used > store.top // REUSE_SHARE:
        slot = _free_run(store, 1, n_slots)
    if slot == 0:
        slot = store.top
        while slot + n_slots > store.capacity:
            if _add_segment(store, err) != 0:
                return 0
        store.top = slot + n_slots
    for i in range(n_slots):
        memset(&store.uses[slot + i], 0, sizeof(store_use))
        store.uses[slot + i].used = 1
        store.uses[slot + i].copy = 1 if i > 0 else 0
    store.n_used += n_slots
    store.cursor = slot + n_slots
    return slot


cdef void store_align(store_t* store, uint32_t n_slots) noexcept nogil:
    """The slots of a huge page come next: have the first be a multiple of n_slots, a power of two, if that is of
    use. The slots left out are free."""
    if store.gets_huge_pages < 0:
        store.gets_huge_pages = _gets_huge_pages()
    if store.gets_huge_pages:
        store.top = (store.top + n_slots - 1) & ~(n_slots - 1)
        store.cursor = store.top
        store.aligned_end = store.top + n_slots


cdef const uint8_t* store_page(store_t* store, uint32_t slot) noexcept nogil:
    """The bytes of a written slot, for reading."""
    cdef uint32_t segment = slot // store.slots_per_segment
    return store.views[segment] + <size_t>(slot - segment * store.slots_per_segment) * store.page_bytes


cdef int store_write(
    store_t* store, uint32_t slot, const uint8_t* source, uint32_t n_pages, sys_error* err
) noexcept nogil:
    """Give slots that nobody maps their bytes. Not mapped: fresh or released before the last fork
    check, so no other process can see them change either."""
    if not store_is_there(store):
        return -1
    return sys_write_at(
        store.file.fd, source, <size_t>n_pages * store.page_bytes,
        <long long>(<size_t>slot * store.page_bytes), err
    )


cdef void store_share(store_t* store, uint32_t slot) noexcept nogil:
    store.uses[slot].number += 1
    if store.uses[slot].number == 1:
        store.n_shared += 1
        if store.uses[slot].idle:
            store_wake(store, slot)


cdef uint32_t store_unshare(store_t* store, uint32_t slot) noexcept nogil:
    """One sharer less. Returns the first slot of the block when nobody shares any of it now, else 0."""
    cdef uint32_t first, n_copies, i
    store.uses[slot].number -= 1
    if store.uses[slot].number != 0:
        return 0
    store.n_shared -= 1
    first = store_block(store, slot, &n_copies)
    for i in range(n_copies):
        if store_sharers(store, first + i) != 0 or store.uses[first + i].lost:
            return 0
    return first


cdef void store_idle(store_t* store, uint32_t first) noexcept nogil:
    """The block that begins here has lost its last sharer: it stands in the stable tree, to be shared again or
    released (see core's release)."""
    cdef uint32_t n_copies, i
    store_block(store, first, &n_copies)
    for i in range(n_copies):
        store.n_idle += not store.uses[first + i].idle
        store.uses[first + i].idle = 1


cdef void store_wake(store_t* store, uint32_t slot) noexcept nogil:
    """The block of this slot does not wait for its release any more."""
    cdef uint32_t n_copies, i
    cdef uint32_t first = store_block(store, slot, &n_copies)
    for i in range(n_copies):
        store.n_idle -= store.uses[first + i].idle
        store.uses[first + i].idle = 0


cdef void store_claim(store_t* store, uint32_t slot) noexcept nogil:
    """One page more lies over a slot. One that is free (the program has kept a mapping of it) is so no more."""
    store.claims[slot] += 1
    if not store.uses[slot].used:
        store.uses[slot].used = store.uses[slot].hollow = 1
        store.n_used += 1
        store.n_hollow += 1


cdef void store_unclaim(store_t* store, uint32_t slot) noexcept nogil:
    """One page less: a hollow slot under which nothing lies any more can be handed out again."""
    store.claims[slot] -= 1
    if store.claims[slot] == 0 and store.uses[slot].hollow and not store.uses[slot].lost:
        memset(&store.uses[slot], 0, sizeof(store_use))
        store.n_hollow -= 1
        store.n_used -= 1


cdef uint32_t store_unshown(store_t* store, pagemap* pm, uint32_t slot, uint32_t n_slots) noexcept nogil:
    """How many of these slots, from the first one on, no page table shows but that of our own view.

    The kernel counts the entries that show a page, and tells whether there is but one. Moving a mapping does not change
    that number: so it is right whatever moves meanwhile, and of other processes too. It leaves out mappings through
    which nobody has read yet. All of them where there is no page map to ask.
    """
    cdef uint8_t flags[<int>SPAN_PAGES]
    cdef sys_error ignored
    cdef uint32_t done = 0, n, i
    sys_error_clear(&ignored)
    while done < n_slots:
        n = min(n_slots - done, <uint32_t>SPAN_PAGES)
        n = min(n, store.slots_per_segment - (slot + done) % store.slots_per_segment)
        for i in range(n):
            touch(store_page(store, slot + done + i))
        if pagemap_query(pm, <uintptr_t>store_page(store, slot + done), n, flags, &ignored) != 0:
            return done
        for i in range(n):
            if not flags[i] & (PAGE_OWNED | PAGE_UNSURE):
                return done + i
        done += n
    return n_slots


cdef void store_lose(store_t* store, uint32_t slot) noexcept nogil:
    """Keep a slot and its bytes for ever: the program has mapped it somewhere by its own means."""
    if slot < store.top and store.uses[slot].used:
        store.uses[slot].lost = 1


cdef uint32_t store_block(store_t* store, uint32_t slot, uint32_t* n_copies) noexcept nogil:
    """First slot, and length, of the block that a used slot belongs to."""
    cdef uint32_t first = slot
    cdef uint32_t end = slot + 1
    while store.uses[first].copy:
        first -= 1
    while end < store.top and store.uses[end].used and store.uses[end].copy:
        end += 1
    n_copies[0] = end - first
    return first


cdef uint64_t store_block_sharers(store_t* store, uint32_t slot) noexcept nogil:
    """Sharers of all slots of the block that a used slot belongs to."""
    cdef uint32_t n_copies, i
    cdef uint32_t first = store_block(store, slot, &n_copies)
    cdef uint64_t n_sharers = 0
    for i in range(n_copies):
        n_sharers += store_sharers(store, first + i)
    return n_sharers


cdef void store_release(store_t* store, uint32_t slot) noexcept nogil:
    """Give back the whole block that begins at `slot`, which is in no tree, and whose bytes nobody shows. Carried out
    by store_trim, for all of it at once: were its first slot free before the others, a new block there would be taken
    to go on over them."""
    cdef uint32_t n_copies, i
    store_block(store, slot, &n_copies)
    if store.n_releases + n_copies > <uint32_t>MAX_RELEASES:
        store_trim(store)
    for i in range(n_copies):
        store_settle(store, slot + i)
        store.releases[store.n_releases] = slot + i
        store.n_releases += 1


cdef int _by_number(const void* a, const void* b) noexcept nogil:
    cdef uint32_t left = (<const uint32_t*>a)[0]
    cdef uint32_t right = (<const uint32_t*>b)[0]
    return (left > right) - (left < right)


cdef void _see_forks(store_t* store) noexcept nogil:
    """Freeze what existed when the process last forked. The caller holds the fork lock."""
    cdef uint32_t slot
    if forks_count() == store.seen_forks:
        return
    store.seen_forks = forks_count()
    store.n_frozen = 0
    for slot in range(1, store.top):
        if store.uses[slot].used:
            store.uses[slot].frozen = 1
            store.n_frozen += 1


cdef void _free_slots(store_t* store, uint32_t first, uint32_t n) noexcept nogil:
    """Punch neighbouring slots and hand them out again. The caller holds the fork lock.

    A hole that cannot be punched costs memory, not correctness: its slot is free all the same, and
    writing it again replaces its bytes.
    """
    cdef sys_error ignored
    cdef uint32_t slot
    sys_error_clear(&ignored)
    if n > 0 and store_is_there(store):
        sys_punch(
            store.file.fd, <long long>(<size_t>first * store.page_bytes), <size_t>n * store.page_bytes,
            &ignored
        )
    memset(store.uses + first, 0, n * sizeof(store_use))
    for slot in range(first, first + n):
        store.uses[slot].used = store.uses[slot].hollow = store.claims[slot] != 0
        store.n_hollow += store.uses[slot].hollow
        store.n_used -= not store.uses[slot].used


cdef void store_trim(store_t* store) noexcept nogil:
    """Carry out the releases, neighbours together. Frozen slots stay used, out of every tree: dead."""
    cdef uint32_t i = 0, n, slot
    if store.n_releases == 0:
        return
    qsort(store.releases, store.n_releases, sizeof(uint32_t), _by_number)
    forks_lock()
    _see_forks(store)
    while i < store.n_releases:
        slot = store.releases[i]
        if store.uses[slot].frozen:
            store.uses[slot].copy = 0
            store.uses[slot].number = DEAD
            store.nodes[slot].digest = store.seen_forks
            store.n_dead += 1
            i += 1
            continue
        n = 1
        while i + n < store.n_releases and store.releases[i + n] == slot + n and not store.uses[slot + n].frozen:
            n += 1
        _free_slots(store, slot, n)
        i += n
    forks_unlock()
    store.n_releases = 0


cdef bint _is_dead_since(const store_t* store, uint32_t slot, uint32_t gone) noexcept nogil:
    return store_is_dead(store, slot) and not store.uses[slot].lost and store.nodes[slot].digest <= gone


cdef void store_thaw(store_t* store, pagemap* pm) noexcept nogil:
    """Give back, or let be written again, what was frozen for children that are gone by now."""
    cdef uint32_t slot = 1, n, gone
    forks_lock()
    _see_forks(store)
    if store.n_frozen != 0:
        gone = forks_gone()
        if gone != store.seen_gone:
            store.seen_gone = gone
            while slot < store.top:
                n = 0
                while slot + n < store.top and _is_dead_since(store, slot + n, gone):
                    n += 1
                if n > 0:
                    # What is still shown stays dead: by what the program has moved, or by a child that nobody told of.
                    n = store_unshown(store, pm, slot, n)
                    _free_slots(store, slot, n)
                    store.n_dead -= n
                    store.n_frozen -= n
                    slot += max(n, <uint32_t>1)
                    continue
                if gone == store.seen_forks and store.uses[slot].frozen:
                    store.uses[slot].frozen = 0
                    store.n_frozen -= 1
                slot += 1
    forks_unlock()


cdef size_t store_bytes(store_t* store) noexcept nogil:
    """Bytes of metadata in use."""
    return (
        <size_t>store.top * (sizeof(rb_node) + sizeof(store_use) + sizeof(uint32_t))
        + store.n_segments * sizeof(uint8_t*)
        + sizeof(store_t)
    )
