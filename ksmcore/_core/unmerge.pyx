"""The way back: merged pages become plain private memory again, and regions are forgotten.

What it gives back of the map budget counts at once, not only from the next pass on.

Nothing here needs the GIL; the caller holds the engine's lock.
"""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t, uintptr_t

from ksmcore._core.census cimport census_of_range
from ksmcore._core.release cimport release_if_worth
from ksmcore._guard.merge cimport merge_empty_range, merge_restore_range, run_t
from ksmcore._guard.window cimport guard_kind
from ksmcore._kernel.pagemap cimport PAGE_OF_FILE, PAGE_PRESENT, PAGE_UNSURE, SPAN_PAGES, pagemap_query
from ksmcore._kernel.syscalls cimport sys_error, sys_error_clear
from ksmcore._pass.batch cimport batch_drop_sharer, batch_lie_over
from ksmcore._pass.look cimport look_at_room, look_before_restoring, look_flags
from ksmcore._pass.match cimport match_forget_item
from ksmcore._pass.state cimport engine_core
from ksmcore._records.budget cimport budget_affords
from ksmcore._records.claims cimport claims_lose
from ksmcore._records.costs cimport costs_of_mapping, costs_of_restoring
from ksmcore._records.regions cimport region_t, regions_end_of
from ksmcore._records.rmap cimport PAGE_SHARED, rmap_find, rmap_slot, rmap_step, rmap_walk, rmap_walk_over


cdef void _settle_restored(engine_core* c, uint64_t page_no, size_t n_pages) noexcept nogil:
    """These pages are plain memory now: their items no longer map the store."""
    cdef size_t i
    cdef uint32_t item = 0
    if n_pages != 0:
        c.budget.used += costs_of_restoring(&c.rmap, page_no, n_pages)
    for i in range(n_pages):
        item = rmap_find(&c.rmap, page_no + i, item)
        if c.rmap.tags[item].state == PAGE_SHARED:
            batch_drop_sharer(&c.b, item)
        batch_lie_over(&c.b, item, 0)


cdef bint unmerge_is_due(engine_core* c, const region_t* region) noexcept nogil:
    """Does any page of a region lie over the store?"""
    cdef rmap_walk walk = rmap_walk_over(region.addr // c.page_bytes, region.n_pages)
    while rmap_step(&c.rmap, &walk):
        if c.rmap.tags[walk.item].over_store:
            return True
    return False


cdef int unmerge_region(
    engine_core* c, const region_t* region, guard_kind guard, sys_error* err
) noexcept nogil:
    """Make every page of a region plain private anonymous memory, with the bytes it shows. `guard`, which may be
    another than the engine's, has been entered.

    Atomic for concurrent writers, window by window. -1 with *err when there is not enough memory or
    too few mappings: then some pages may be plain again, the others are still merged, all are right.
    """
    cdef rmap_walk walk = rmap_walk_over(region.addr // c.page_bytes, region.n_pages)
    cdef size_t n_restored
    cdef uint32_t item
    cdef uintptr_t end
    cdef bint has_looked = False
    cdef int rc = 0
    cdef run_t run
    run.guard = guard
    run.page_bytes = c.page_bytes
    run.over_store = True
    run.tracker = &c.tracker
    while rc == 0 and rmap_step(&c.rmap, &walk):
        item = walk.item
        if not c.rmap.tags[item].over_store:
            continue
        if not has_looked:
            look_before_restoring(c)
            has_looked = True
        run.addr = walk.page_no * c.page_bytes
        run.flags = look_flags(c, region, run.addr, &end)
        end = min(end, regions_end_of(&c.regions, region))
        walk.next_no = walk.page_no
        while item != 0 and c.rmap.tags[item].over_store and walk.next_no * c.page_bytes < end:
            walk.next_no += 1
            item = rmap_find(&c.rmap, walk.next_no, item)
        run.n_pages = walk.next_no - walk.page_no
        rc = merge_restore_range(&run, True, &n_restored, err)
        _settle_restored(c, walk.page_no, n_restored)
    return rc


cdef void _forget_pages(engine_core* c, uint64_t page_no, size_t n_pages) noexcept nogil:
    cdef rmap_walk walk = rmap_walk_over(page_no, n_pages)
    while rmap_step(&c.rmap, &walk):
        match_forget_item(c, walk.item)


cdef void unmerge_forget(engine_core* c, const region_t* region) noexcept nogil:
    """Drop all items of a region, none of which lies over the store any more, but by the records."""
    cdef int64_t cost
    if c.rmap.n_over_store != 0:
        cost = costs_of_mapping(&c.rmap, region.addr // c.page_bytes, region.n_pages, 0)
        # A census counts no end where nothing follows.
        c.budget.used = max(c.budget.used + cost, <int64_t>0)
    _forget_pages(c, region.addr // c.page_bytes, region.n_pages)


cdef void unmerge_lose(engine_core* c, const region_t* region) noexcept nogil:
    """Of a region whose memory went elsewhere, or may have: whatever maps its slots, somewhere, goes on seeing the same
    bytes. Nothing else changes."""
    cdef rmap_walk walk = rmap_walk_over(region.addr // c.page_bytes, region.n_pages)
    while rmap_step(&c.rmap, &walk):
        if rmap_slot(&c.rmap, walk.item) != 0:
            claims_lose(&c.store, rmap_slot(&c.rmap, walk.item))


cdef void unmerge_abandon(engine_core* c, const region_t* region) noexcept nogil:
    """Drop all items of such a region."""
    unmerge_lose(c, region)
    _forget_pages(c, region.addr // c.page_bytes, region.n_pages)


cdef void unmerge_settle(engine_core* c, region_t* region) noexcept nogil:
    """See which shares of a region that is passed over are broken: to lock memory copies all of it."""
    cdef uint8_t flags[<int>SPAN_PAGES]
    cdef uint64_t first_no = region.addr // c.page_bytes
    cdef size_t page = 0, n, i
    cdef uint32_t item, hint = 0
    cdef sys_error ignored
    if c.rmap.n_by_state[<int>PAGE_SHARED] == 0:
        return
    sys_error_clear(&ignored)
    while page < region.n_pages:
        n = min(region.n_pages - page, <size_t>SPAN_PAGES)
        if pagemap_query(&c.pm, region.addr + page * c.page_bytes, n, flags, &ignored) != 0:
            return
        for i in range(n):
            if flags[i] & (PAGE_PRESENT | PAGE_OF_FILE | PAGE_UNSURE) != PAGE_PRESENT:
                continue
            item = rmap_find(&c.rmap, first_no + page + i, hint)
            hint = item if item != 0 else hint
            if item != 0 and c.rmap.tags[item].state == PAGE_SHARED:
                c.counters.cow_breaks += 1
                region.cow_breaks += 1
                batch_drop_sharer(&c.b, item)
        page += n


cdef bint _lies_over_store(engine_core* c, uint64_t page_no, uint32_t* hint) noexcept nogil:
    cdef uint32_t item = rmap_find(&c.rmap, page_no, hint[0])
    if item != 0:
        hint[0] = item
    return item != 0 and c.rmap.tags[item].over_store


cdef bint unmerge_discard(engine_core* c, const region_t* region, uintptr_t addr, size_t n_pages) noexcept nogil:
    """Empty pages of a region whose bytes nobody needs any more, and forget them: they hold no memory, show
    zeros and are passed over, until they are written again. No window is needed, since nobody writes there.

    False: some of them hold what they held, and may still be merged, because the kernel refused, or because a hole
    in a merged run takes two mappings, which the map budget does not have; or it is not known what is mapped there.
    """
    cdef uint64_t first_no = addr // c.page_bytes
    cdef size_t page = 0, start
    cdef uint32_t hint = 0
    cdef int64_t cost
    cdef bint all_emptied = True, is_plain = False
    cdef size_t n_blocked
    cdef sys_error ignored
    cdef run_t run
    sys_error_clear(&ignored)
    # What is given up in place shows what lies there, and what is forgotten is released.
    if c.rmap.n_over_store != 0:
        if (
            census_of_range(c, addr, addr + n_pages * c.page_bytes, &is_plain, &n_blocked, &ignored) < 0
            or not is_plain
        ):
            return False
        look_at_room(c)
    run.page_bytes = c.page_bytes
    run.flags = region.flags
    run.tracker = &c.tracker
    while page < n_pages:
        start = page
        run.over_store = _lies_over_store(c, first_no + page, &hint)
        while page < n_pages and _lies_over_store(c, first_no + page, &hint) == run.over_store:
            page += 1
        run.addr = addr + start * c.page_bytes
        run.n_pages = page - start
        cost = costs_of_mapping(&c.rmap, first_no + start, run.n_pages, 0) if run.over_store else 0
        if budget_affords(&c.budget, cost, <uint32_t>run.n_pages) and merge_empty_range(&run, &ignored) == 0:
            c.budget.used += cost
            _forget_pages(c, first_no + start, run.n_pages)
        else:
            all_emptied = False
    release_if_worth(c, False)
    return all_emptied
