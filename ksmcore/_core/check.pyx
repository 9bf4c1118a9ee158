"""The check: what must hold between the records of an engine. It visits everything, so only tests ask for it.

Each invariant has a number: 1-7 stable tree, 21-27 unstable tree, 31-34 rmap, 41-47 quiet tree; between them 10: in
the quiet tree and not only there, 11: an item of no region, 12: a sharer that is not over the store, 13: a slot left
pending, 14: sharers counted wrong, 15: shared but not used, or dead, 16: totals, 17: a tree node that begins no block,
18: a shared page whose bytes are not those it was filed under (asked for by itself: two pages that are written alike
while they are merged may have it so, and then their equals do not find it), 19: unstable or quiet items counted wrong,
20: a shared page that has room for a sharer, and that no search finds, 28: a file of the store counts its slots wrong,
29: pages over a slot counted wrong, 30: idle or hollow, and not as such should be.

The caller holds the engine's lock.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free

from ksmcore._pass.state cimport engine_core
from ksmcore._records.forest cimport forest_check, forest_first, forest_holds, forest_next
from ksmcore._records.regions cimport region_t, regions_at
from ksmcore._records.rmap cimport PAGE_SHARED, PAGE_UNSHARED, rmap_check, rmap_slot
from ksmcore._records.store cimport (
    store_block, store_block_sharers, store_file_of, store_is_dead, store_is_orphan, store_is_pending, store_page,
    store_sharers,
)


cdef bint _is_hidden(engine_core* c, uint32_t slot) noexcept nogil:
    """Is this the first slot of a block in use that has room, but stands in no tree?"""
    cdef uint32_t n_copies, i
    if c.store.uses[slot].copy or forest_holds(&c.stable, slot) or store_block_sharers(&c.store, slot) == 0:
        return False
    if store_is_orphan(&c.store, slot):
        return False
    store_block(&c.store, slot, &n_copies)
    for i in range(n_copies):
        if store_sharers(&c.store, slot + i) < c.max_page_sharing:
            return True
    return False


cdef bint _is_odd(engine_core* c, uint32_t slot) noexcept nogil:
    if c.store.uses[slot].hollow:
        return (
            not c.store.uses[slot].used or c.store.uses[slot].copy or c.store.uses[slot].number != 0
            or (c.store.claims[slot] == 0 and not c.store.uses[slot].lost)
        )
    if c.store.uses[slot].idle:
        return not c.store.uses[slot].used or store_block_sharers(&c.store, slot) != 0
    return c.store.claims[slot] != 0 and not c.store.uses[slot].used


cdef int _check_slots(engine_core* c, const uint32_t* n_sharers, const uint32_t* n_over) noexcept nogil:
    cdef uint32_t slot, n_used = 0, n_shared = 0, n_dead = 0, n_idle = 0, n_hollow = 0
    for slot in range(1, c.store.top):
        n_idle += c.store.uses[slot].idle
        n_hollow += c.store.uses[slot].hollow
        # Of a file that has gone nobody counts them.
        if (
            c.store.claims[slot] != n_over[slot]
            and c.store.segments[slot // c.store.slots_per_segment].view != NULL
        ):
            return 29
        if _is_odd(c, slot):
            return 30
        if store_is_dead(&c.store, slot):
            if n_sharers[slot] != 0 or store_file_of(&c.store, slot).made == c.store.seen_forks:
                return 15
            n_used += 1
            n_dead += 1
            continue
        if store_is_pending(&c.store, slot):
            return 13
        if store_sharers(&c.store, slot) != n_sharers[slot]:
            return 14
        if n_sharers[slot] != 0 and not c.store.uses[slot].used:
            return 15
        if c.store.uses[slot].used and _is_hidden(c, slot):
            return 20
        n_used += c.store.uses[slot].used
        n_shared += n_sharers[slot] != 0
    if n_used != c.store.n_used or n_shared != c.store.n_shared:
        return 16
    if n_dead != c.store.n_dead:
        return 16
    if n_idle != c.store.n_idle or n_hollow != c.store.n_hollow:
        return 30
    return _check_files(c, n_used, n_dead, n_shared, n_hollow)


cdef int _check_files(
    engine_core* c, uint32_t n_used, uint32_t n_dead, uint32_t n_shared, uint32_t n_hollow
) noexcept nogil:
    """What the files count comes to what there is."""
    cdef uint32_t i, n_open = 0
    for i in range(c.store.n_files):
        n_used -= c.store.files[i].n_used
        n_dead -= c.store.files[i].n_dead
        n_shared -= c.store.files[i].n_shared
        n_hollow -= c.store.files[i].n_hollow
        n_open += c.store.files[i].file.fd >= 0
    return 0 if n_used == n_dead == n_shared == n_hollow == 0 and n_open == c.store.n_open else 28


cdef int _check_stable(engine_core* c, bint are_filed) noexcept nogil:
    """Every node of the stable tree is the first slot of a block, and its checksum is that of its bytes, if that is
    asked."""
    cdef const uint8_t* page
    cdef uint32_t digest
    cdef uint32_t slot = forest_first(&c.stable)
    while slot != 0:
        if not c.store.uses[slot].used or c.store.uses[slot].copy or c.store.uses[slot].orphan:
            return 17
        if are_filed:
            page = store_page(&c.store, slot)
            c.checksum(&page, 1, c.page_bytes, &digest)
            if digest != c.store.nodes[slot].digest:
                return 18
        slot = forest_next(&c.stable, slot)
    return 0


cdef bint _in_region(engine_core* c, uint64_t page_no) noexcept nogil:
    cdef uintptr_t addr = <uintptr_t>(page_no * c.page_bytes)
    cdef const region_t* region = regions_at(&c.regions, addr)
    return region != NULL and region.addr <= addr


cdef int check_engine(engine_core* c, bint are_filed) noexcept nogil:
    """0, or the number of the first broken invariant; -1 without memory to look."""
    cdef uint32_t item, n_unstable = 0, n_quiet = 0
    cdef uint64_t page_no
    cdef int rc
    cdef uint32_t* n_sharers
    cdef uint32_t* n_over
    rc = forest_check(&c.stable, True)
    if rc != 0:
        return rc
    # Only its shape: pages may have changed since they were put there.
    rc = forest_check(&c.unstable, False)
    if rc != 0:
        return 20 + rc
    rc = forest_check(&c.quiet, False)
    if rc != 0:
        return 40 + rc
    rc = rmap_check(&c.rmap)
    if rc != 0:
        return 30 + rc
    n_sharers = <uint32_t*>calloc(2 * <size_t>c.store.top, sizeof(uint32_t))
    if n_sharers == NULL:
        return -1
    n_over = n_sharers + c.store.top
    for item in range(1, c.rmap.top):
        page_no = c.rmap.tags[item].page_no
        if page_no == 0:
            continue
        if not _in_region(c, page_no):
            rc = 11
        n_over[rmap_slot(&c.rmap, item)] += 1
        if c.rmap.tags[item].state == PAGE_SHARED:
            n_sharers[rmap_slot(&c.rmap, item)] += 1
            if not c.rmap.tags[item].over_store:
                rc = 12
        n_unstable += c.rmap.tags[item].state == PAGE_UNSHARED and c.rmap.tags[item].epoch == c.epoch
        if c.rmap.tags[item].quiet:
            n_quiet += 1
            if c.rmap.tags[item].state != PAGE_UNSHARED or c.rmap.tags[item].epoch == c.epoch:
                rc = 10
    if rc == 0 and (n_unstable != c.unstable.n_nodes or n_quiet != c.quiet.n_nodes):
        rc = 19
    if rc == 0:
        rc = _check_slots(c, n_sharers, n_over)
    if rc == 0:
        rc = _check_stable(c, are_filed)
    free(n_sharers)
    return rc
