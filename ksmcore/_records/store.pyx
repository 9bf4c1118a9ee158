"""The store: the memory that holds all shared pages of an engine, in memory files (see store_files).

A slot is one page of a file. Slots are handed out in the order in which they are asked for, so that
pages which are merged one after the other stand one after the other in the file, and one mapping
serves them. The bytes of a slot are written once, before anybody maps it, and never change while it
exists; the files are read through private read-only views, and written with pwrite, so no writable
mapping of one ever exists. The views are for this process alone: forked children and core files do not get them.

Where the kernel gives memory files huge pages, the copy of a huge page begins at a multiple of its size, so that
it can be mapped as one again.

A block is a slot and the copies that follow it (`copy` set), all with the same bytes. A stretch of one
repeated page maps a block over and over. Only its first slot stands in the stable tree; the block is
released as a whole, when none of its slots has a sharer.

After a fork the child maps the files as well. No slot of a file that existed then is handed out or written any more,
so that the child sees nothing but what it was born with. Its slots go on being shared. While a process of that fork
lives the file is frozen: none of it is punched, and a slot that is released is dead, used by nobody here, and
remembering (in its tree node, which it does not need any more) the last fork whose child may map it.
`store_begin_pass` gives dead slots back as the children end. `seen_forks` is compared with the process's count of
forks, under the fork lock, before anything is punched.

A slot whose memory is given back while pages of this process still lie over it, all of them private copies, is
hollow: it is handed out again when nothing lies over it any more. So a copy that the program throws away (madvise)
uncovers zeros, never the bytes of somebody else.

Invariants: n_used counts slots with `used`; n_shared those with sharers that are not pending; a slot
that is not used has no sharers, no claims and no flag; `copy` slots follow their block without a gap; a dead
slot is in a file that existed at a fork, and has DEAD in place of its sharers; a hollow one has no sharers, but
claims. Each file counts its own too.
"""

from libc.errno cimport EAGAIN, EFBIG
from libc.stdint cimport uint8_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport qsort
from libc.string cimport memset, strstr

from ksmcore._kernel.forks cimport forks_count, forks_living, forks_lock, forks_look, forks_unlock
from ksmcore._kernel.pagemap cimport pagemap
from ksmcore._kernel.syscalls cimport (
    sys_device, sys_error, sys_error_clear, sys_file_limit, sys_is_kept, sys_punch, sys_read_text, sys_write_at,
)
from ksmcore._records.claims cimport claims_set_hollow, claims_unshown
from ksmcore._records.store_files cimport (
    DEAD, MAX_RELEASES, SEGMENT_BYTES, store_files_can_be_written, store_files_close_all, store_files_look_after,
    store_files_make_room, store_segment, store_use,
)
from ksmcore._trees cimport rb_node

cdef enum:
    # Released slots are searched for once they are a quarter of all: searching less often keeps new
    # pages together at the end of the file, searching later would let the arrays grow without need.
    REUSE_SHARE = 4


cdef int store_told_huge = -1


cdef bint _gets_huge_pages() noexcept nogil:
    """Does the kernel give memory files huge pages unasked? Unless somebody switched it on it does not."""
    cdef char modes[128]
    if store_told_huge >= 0:
        return store_told_huge
    sys_read_text(b"/sys/kernel/mm/transparent_hugepage/shmem_enabled", modes, sizeof(modes))
    return (
        strstr(modes, b"[always]") != NULL or strstr(modes, b"[within_size]") != NULL
        or strstr(modes, b"[force]") != NULL
    )


cdef void store_init(store_t* store, size_t page_bytes) noexcept nogil:
    memset(store, 0, sizeof(store_t))
    store.gets_huge_pages = -1
    store.page_bytes = page_bytes
    store.slots_per_segment = <uint32_t>(SEGMENT_BYTES // page_bytes)
    store.top = store.cursor = 1
    store.seen_forks = forks_count()


cdef void store_destroy(store_t* store) noexcept nogil:
    store_files_close_all(store)
    store_init(store, store.page_bytes)


cdef bint store_is_there(const store_t* store, uint32_t slot) noexcept nogil:
    """Can this slot be mapped, written and given back? Not where the program closed the descriptor under us. What is
    shared stays shared, and right; but above all nothing is written to somebody else's file."""
    return sys_is_kept(&store_file_of(store, slot).file)


cdef bint store_slot_at(
    store_t* store, uint64_t dev_major, uint64_t dev_minor, uint64_t inode, uint64_t offset, uint32_t* slot
) noexcept nogil:
    """Is this a file of the store's, whether it is within reach or not? *slot: the one at this offset, 0: none."""
    cdef store_file* file
    cdef uint64_t major, minor
    cdef uint32_t i
    for i in range(store.n_files):
        file = &store.files[i]
        if file.file.ino != inode or inode == 0:
            continue
        sys_device(&file.file, &major, &minor)
        if major == dev_major and minor == dev_minor:
            file.is_mapped = True
            offset //= store.page_bytes
            slot[0] = file.first + <uint32_t>offset if offset < file.top - file.first else 0
            return True
    return False


# ---- handing out ------------------------------------------------------------------------------

cdef uint32_t _free_run(store_t* store, uint32_t start, uint32_t end, uint32_t n_slots) noexcept nogil:
    """First of `n_slots` free neighbours from `start` on and below `end`, in one file, or 0."""
    cdef uint32_t slot = start
    cdef uint32_t n = 0
    while slot < end:
        n = n + 1 if not store.uses[slot].used else 0
        slot += 1
        if n == n_slots:
            return slot - n_slots
    return 0


cdef uint32_t _free_anywhere(store_t* store, uint32_t n_slots) noexcept nogil:
    """The same in any file that can be written, once a good part of their slots is free again."""
    cdef const store_file* file
    cdef uint32_t i, slot, n_handed = 0, n_free = 0
    for i in range(store.n_files):
        file = &store.files[i]
        if store_files_can_be_written(store, file):
            n_handed += file.top - file.first
            n_free += file.top - file.first - 1 - file.n_used
    for i in range(store.n_files if n_free > n_handed // REUSE_SHARE else 0):
        file = &store.files[i]
        if store_files_can_be_written(store, file):
            slot = _free_run(store, file.first + 1, file.top, n_slots)
            if slot != 0:
                store.current = i
                return slot
    return 0


cdef uint32_t _at_the_end(store_t* store, uint32_t n_slots, sys_error* err) noexcept nogil:
    """Slots behind all that were ever handed out, or 0 with *err."""
    cdef store_file* file = NULL
    cdef uint32_t slot = 0
    if store.n_open != 0 and store_files_can_be_written(store, &store.files[store.growing]):
        file = &store.files[store.growing]
    while file == NULL or file.top + n_slots > file.end:
        # The first slot of a file is never used.
        if sys_file_limit() // store.page_bytes <= n_slots:
            err.code = EFBIG
            return 0
        if store_files_make_room(store, err) != 0:
            return 0
        file = &store.files[store.growing]
        if not store_files_can_be_written(store, file):
            err.code = EAGAIN    # the process has just forked
            return 0
    slot = file.top
    file.top += n_slots
    store.top = file.top
    store.current = store.growing
    return slot


cdef void _notice_forks(store_t* store) noexcept nogil:
    if forks_count() != store.seen_forks:
        forks_lock()
        _see_forks(store)
        forks_unlock()


cdef uint32_t store_alloc(store_t* store, uint32_t n_slots, sys_error* err) noexcept nogil:
    """Hand out `n_slots` neighbouring slots, the first of a block; 0 when there is no room.

    Next fit: the slot after the last one handed out if that is free, else the next free one. The
    cursor goes back to the start only when a good part of the slots is free again.
    """
    cdef store_file* file
    cdef uint32_t slot = 0
    cdef uint32_t i
    _notice_forks(store)
    if store.n_open != 0:
        file = &store.files[store.current]
        if store_files_can_be_written(store, file) and store.cursor < file.top:
            slot = _free_run(store, store.cursor, file.top, n_slots)
        elif store.top >= store.aligned_end:
            slot = _free_anywhere(store, n_slots)
    if slot == 0:
        slot = _at_the_end(store, n_slots, err)
        if slot == 0:
            return 0
    for i in range(n_slots):
        memset(&store.uses[slot + i], 0, sizeof(store_use))
        store.uses[slot + i].used = 1
        store.uses[slot + i].copy = 1 if i > 0 else 0
    store.n_used += n_slots
    store_file_of(store, slot).n_used += n_slots
    store.cursor = slot + n_slots
    return slot


cdef void store_align(store_t* store, uint32_t n_slots) noexcept nogil:
    """The slots of a huge page come next: have the first be a multiple of n_slots, a power of two, if that is of
    use. The slots left out are free."""
    cdef store_file* file
    cdef sys_error ignored
    if store.gets_huge_pages < 0:
        store.gets_huge_pages = _gets_huge_pages()
    if not store.gets_huge_pages:
        return
    _notice_forks(store)
    sys_error_clear(&ignored)
    if store.n_open == 0 or not store_files_can_be_written(store, &store.files[store.growing]):
        if store_files_make_room(store, &ignored) != 0:
            return
    file = &store.files[store.growing]
    file.top = min((file.top + n_slots - 1) & ~(n_slots - 1), file.end)
    store.top = store.cursor = file.top
    store.current = store.growing
    store.aligned_end = file.top + n_slots


# ---- bytes ------------------------------------------------------------------------------------

cdef const uint8_t* store_page(store_t* store, uint32_t slot) noexcept nogil:
    """The bytes of a written slot, for reading."""
    cdef uint32_t segment = slot // store.slots_per_segment
    return (
        store.segments[segment].view + <size_t>(slot - segment * store.slots_per_segment) * store.page_bytes
    )


cdef int store_write(
    store_t* store, uint32_t slot, const uint8_t* source, uint32_t n_pages, sys_error* err
) noexcept nogil:
    """Give slots that nobody maps their bytes; -1 where that cannot be. Not mapped: fresh or released before the last
    fork check, so no other process can see them change either. Nor one that was forked since they were handed out:
    then they are given up."""
    cdef store_file* file = store_file_of(store, slot)
    if not sys_is_kept(&file.file) or forks_count() != file.made:
        return -1
    if sys_write_at(
        file.file.fd, source, <size_t>n_pages * store.page_bytes, store_offset(store, slot), err
    ) == 0:
        return 0
    file.is_full = file.is_full or err.code == EFBIG
    return -1


# ---- sharers ----------------------------------------------------------------------------------

cdef void store_share(store_t* store, uint32_t slot) noexcept nogil:
    store.uses[slot].number += 1
    if store.uses[slot].number == 1:
        store.n_shared += 1
        store_file_of(store, slot).n_shared += 1
        if store.uses[slot].idle:
            store_wake(store, slot)


cdef uint32_t store_unshare(store_t* store, uint32_t slot) noexcept nogil:
    """One sharer less. Returns the first slot of the block when nobody shares any of it now, else 0. One out of reach
    goes with its file."""
    cdef uint32_t first, n_copies
    store.uses[slot].number -= 1
    if store.uses[slot].number != 0:
        return 0
    store.n_shared -= 1
    store_file_of(store, slot).n_shared -= 1
    if store.uses[slot].orphan:
        return 0
    first = store_block(store, slot, &n_copies)
    return first if _is_unused(store, first, n_copies) else 0


cdef bint _is_unused(const store_t* store, uint32_t first, uint32_t n_copies) noexcept nogil:
    """Does nobody share any slot of this block, and is none lost?"""
    cdef uint32_t i
    for i in range(n_copies):
        if store_sharers(store, first + i) != 0 or store.uses[first + i].lost:
            return False
    return True


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


cdef void store_find_again(store_t* store, const uint8_t* is_elsewhere, uint32_t n_slots) noexcept nogil:
    """Lost slots of the first n_slots that are mapped nowhere but where they are known to be are like all others again.
    Those that nobody shares are idle: they are asked for once more before they are released."""
    cdef uint32_t slot, n_copies, first
    store.has_lost = False
    for slot in range(1, store.top):
        if not store.uses[slot].lost:
            continue
        if slot >= n_slots or is_elsewhere[slot]:
            store.has_lost = True
            continue
        store.uses[slot].lost = 0
        if store.uses[slot].hollow:
            if store.claims[slot] == 0:
                claims_set_hollow(store, slot, False)
        elif not store.uses[slot].orphan and not store_is_dead(store, slot):
            first = store_block(store, slot, &n_copies)
            if _is_unused(store, first, n_copies):
                store_idle(store, first)


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


# ---- giving back ------------------------------------------------------------------------------

cdef void _see_forks(store_t* store) noexcept nogil:
    """Freeze what existed when the process last forked. The caller holds the fork lock."""
    cdef uint32_t i
    if forks_count() == store.seen_forks:
        return
    store.seen_forks = forks_count()
    for i in range(store.n_files):
        store.files[i].is_frozen = store.files[i].file.ino != 0 and store.files[i].made != store.seen_forks


cdef void _free_slots(store_t* store, uint32_t first, uint32_t n) noexcept nogil:
    """Punch neighbouring slots of one file, which are free then, or hollow. The caller holds the fork lock.

    A hole that cannot be punched costs memory, not correctness: its slot is free all the same, and
    writing it again replaces its bytes.
    """
    cdef store_file* file = store_file_of(store, first)
    cdef sys_error ignored
    cdef uint32_t slot
    sys_error_clear(&ignored)
    if sys_is_kept(&file.file):
        sys_punch(file.file.fd, store_offset(store, first), <size_t>n * store.page_bytes, &ignored)
    memset(&store.uses[first], 0, n * sizeof(store_use))
    store.n_used -= n
    file.n_used -= n
    for slot in range(first, first + n):
        if store.claims[slot] != 0:
            claims_set_hollow(store, slot, True)


cdef void store_trim(store_t* store) noexcept nogil:
    """Carry out the releases, neighbours together. Those in a frozen file stay used, out of every tree: dead."""
    cdef store_file* file
    cdef uint32_t i = 0, n, slot
    if store.n_releases == 0:
        return
    qsort(store.releases, store.n_releases, sizeof(uint32_t), _by_number)
    forks_lock()
    _see_forks(store)
    while i < store.n_releases:
        slot = store.releases[i]
        file = store_file_of(store, slot)
        if file.is_frozen:
            store.uses[slot].copy = 0
            store.uses[slot].number = DEAD
            store.nodes[slot].digest = store.seen_forks
            store.n_dead += 1
            file.n_dead += 1
            i += 1
            continue
        n = 1
        # No run of slots goes on from one file to the next.
        while i + n < store.n_releases and store.releases[i + n] == slot + n:
            n += 1
        _free_slots(store, slot, n)
        i += n
    forks_unlock()
    store.n_releases = 0


cdef bint _keeps_for_others(const store_file* file) noexcept nogil:
    """Dead slots that were still shown when the last child of a file's was gone are asked for again in each pass."""
    return file.is_frozen or file.n_dead != 0


cdef void _thaw(store_t* store, pagemap* pm, store_file* file) noexcept nogil:
    """Give back what was kept for children that are gone by now. The caller holds the fork lock."""
    cdef uint32_t slot = file.first + 1, n
    file.is_frozen = forks_living(file.made, store.seen_forks)
    while slot < file.top and file.n_dead != 0:
        n = 0
        while slot + n < file.top and store_is_dead(store, slot + n) and not store.uses[slot + n].lost and not (
            file.is_frozen and forks_living(file.made, store.nodes[slot + n].digest)
        ):
            n += 1
        # What is still shown stays dead: by what the program has moved, or by a child that nobody told of.
        n = claims_unshown(store, pm, slot, n)
        if n > 0:
            _free_slots(store, slot, n)
            store.n_dead -= n
            file.n_dead -= n
        slot += max(n, <uint32_t>1)
    if not file.is_frozen and file.n_dead == 0 and file.file.fd >= 0:
        # Nobody else maps it any more: what is new may come here again.
        file.made = store.seen_forks


cdef void store_begin_pass(store_t* store, pagemap* pm, store_forget forget, void* context) noexcept nogil:
    """Look after the files: what children have kept and is free by now, what is out of reach, what is empty."""
    cdef uint32_t i
    cdef bint any_kept = False
    forks_lock()
    _see_forks(store)
    for i in range(store.n_files):
        any_kept = any_kept or _keeps_for_others(&store.files[i])
    if any_kept:
        forks_look()
        for i in range(store.n_files):
            if _keeps_for_others(&store.files[i]):
                _thaw(store, pm, &store.files[i])
    forks_unlock()
    store_files_look_after(store, forget, context)


cdef uint32_t store_frozen(const store_t* store) noexcept nogil:
    """Slots in use that another process may map."""
    cdef uint32_t i, n = 0
    for i in range(store.n_files):
        n += store.files[i].n_used if store.files[i].is_frozen else 0
    return n


cdef size_t store_bytes(store_t* store) noexcept nogil:
    """Bytes of metadata in use."""
    cdef uint32_t i
    cdef size_t n = 0
    for i in range(store.n_files):
        n += store.files[i].top - store.files[i].first if store.files[i].n_segments != 0 else 0
    return (
        n * (sizeof(rb_node) + sizeof(store_use) + sizeof(uint32_t)) + store.n_segments * sizeof(store_segment)
        + store.n_files * sizeof(store_file) + sizeof(store_t)
    )
