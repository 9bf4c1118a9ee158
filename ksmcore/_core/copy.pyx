"""Copies of registered pages into fresh registered memory, which map the shared pages that their sources map.

The caller holds the engine's lock, for one span at a time.

No window is needed. The target is known to nobody yet, no pass looks at it, and a shared page does not change; that the
source still shows it is asked of the kernel. The caller takes a census of the source before, and another after: where
mappings of it have been moved meanwhile all bytes are copied. A write to the source meanwhile comes before or after the
copy of that page, as with any copy that is made while somebody writes.
"""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uintptr_t
from libc.string cimport memcpy

from ksmcore._guard.merge cimport merge_share_range, run_t
from ksmcore._kernel.pagemap cimport PAGE_OF_FILE, PAGE_PRESENT, PAGE_SWAPPED, PAGE_UNSURE, SPAN_PAGES, pagemap_query
from ksmcore._kernel.syscalls cimport sys_error, sys_error_clear
from ksmcore._pages cimport page_compare, page_is_zero
from ksmcore._pass.batch cimport batch_lie_over
from ksmcore._pass.look cimport look_at_room
from ksmcore._pass.state cimport engine_core
from ksmcore._records.budget cimport budget_affords
from ksmcore._records.costs cimport costs_of_mapping
from ksmcore._records.regions cimport region_t, regions_at, regions_end_of
from ksmcore._records.rmap cimport (
    PAGE_SHARED, rmap_add, rmap_find, rmap_remove, rmap_set_state, rmap_slot,
)
from ksmcore._records.store cimport store_is_orphan, store_is_there, store_page, store_share, store_sharers

cdef uint32_t PLAIN = 0        # instead of a slot: the bytes are to be copied
cdef uint32_t NOTHING = 0xffffffff   # instead of a slot: there is nothing but zeros


cdef bint _has_room(const engine_core* c, uint32_t slot) noexcept nogil:
    return store_sharers(&c.store, slot) < c.max_page_sharing and not store_is_orphan(&c.store, slot)


cdef uint32_t _shown(
    engine_core* c, const region_t* region, const uint8_t* page, uint8_t flag, uint32_t item
) noexcept nogil:
    """The slot that this page shows, if another page may map it; or PLAIN, or NOTHING."""
    cdef bint over_store = item != 0 and c.rmap.tags[item].over_store
    cdef uint32_t slot
    if region.altered:
        return PLAIN
    if not over_store and not flag & (PAGE_PRESENT | PAGE_SWAPPED | PAGE_UNSURE):
        return NOTHING
    if not over_store or c.rmap.tags[item].state != PAGE_SHARED or flag & PAGE_SWAPPED:
        return PLAIN
    slot = rmap_slot(&c.rmap, item)
    if not _has_room(c, slot):
        return PLAIN
    if flag & PAGE_UNSURE:
        return slot if page_compare(page, store_page(&c.store, slot), c.page_bytes) == 0 else PLAIN
    # Not there: not read since it was merged. A written one would be there, or swapped out.
    return slot if flag & PAGE_OF_FILE or not flag & PAGE_PRESENT else PLAIN


cdef bint _share(
    engine_core* c, const region_t* home, uintptr_t addr, const uint32_t* slots, const uint32_t* digests,
    size_t n_pages
) noexcept nogil:
    """Map slots that follow each other over fresh pages of a region, and enter those as sharers; False where that
    cannot be, or where the map budget does not allow it."""
    cdef sys_error ignored
    cdef size_t i, n_items = 0
    cdef uint32_t item = 0
    cdef int64_t cost = costs_of_mapping(&c.rmap, addr // c.page_bytes, n_pages, slots[0])
    cdef run_t run
    if not budget_affords(&c.budget, cost, <uint32_t>n_pages) or not store_is_there(&c.store, slots[0]):
        return False
    sys_error_clear(&ignored)
    run.addr = addr
    run.n_pages = n_pages
    run.page_bytes = c.page_bytes
    run.flags = home.flags
    # The items first: once a slot is mapped somewhere that must be known. None of them is known so far.
    while n_items < n_pages and (
        rmap_find(&c.rmap, addr // c.page_bytes + n_items, 0) == 0
        and rmap_add(&c.rmap, addr // c.page_bytes + n_items, &ignored) != 0
    ):
        n_items += 1
    if n_items < n_pages or merge_share_range(&c.store, &run, slots[0], &ignored) != 0:
        for i in range(n_items):
            rmap_remove(&c.rmap, rmap_find(&c.rmap, addr // c.page_bytes + i, 0))
        return False
    for i in range(n_pages):
        item = rmap_find(&c.rmap, addr // c.page_bytes + i, item)
        store_share(&c.store, slots[i])
        rmap_set_state(&c.rmap, item, PAGE_SHARED)
        batch_lie_over(&c.b, item, slots[i])
        c.rmap.nodes[item].digest = digests[i]
    c.counters.pages_merged += n_pages
    c.budget.used += cost
    return True


cdef void copy_span(
    engine_core* c, uintptr_t source, uintptr_t target, size_t n_pages, bint may_share, size_t* n_plain
) noexcept nogil:
    """Copy at most SPAN_PAGES registered pages into registered pages that were never touched. *n_plain grows by the
    pages whose bytes were copied, because they are not shared.

    The source may be any memory that can be read. `may_share`: its regions' census was taken. Where not, and where the
    kernel does not tell which pages are there, the bytes are copied.
    """
    cdef sys_error ignored
    cdef uint8_t flags[<int>SPAN_PAGES]
    cdef uint32_t slots[<int>SPAN_PAGES]
    cdef uint32_t digests[<int>SPAN_PAGES]
    cdef const region_t* region
    cdef const uint8_t* page
    cdef size_t i, start
    cdef uint32_t item, hint = 0
    cdef const region_t* home = regions_at(&c.regions, target)
    cdef bint can_share = home != NULL and home.addr <= target
    sys_error_clear(&ignored)
    if may_share:
        look_at_room(c)
    if pagemap_query(&c.pm, source, n_pages, flags, &ignored) != 0:
        may_share = False
    region = NULL
    for i in range(n_pages):
        page = <const uint8_t*>(source + i * c.page_bytes)
        if region == NULL or regions_end_of(&c.regions, region) <= <uintptr_t>page:
            region = regions_at(&c.regions, <uintptr_t>page)
        item = rmap_find(&c.rmap, <uintptr_t>page // c.page_bytes, hint)
        hint = item if item != 0 else hint
        slots[i] = PLAIN
        if may_share and region != NULL and region.addr <= <uintptr_t>page:
            slots[i] = _shown(c, region, page, flags[i], item)
        digests[i] = c.rmap.nodes[item].digest if item != 0 else 0
        if may_share and slots[i] == PLAIN and flags[i] == PAGE_PRESENT and page_is_zero(page, c.page_bytes):
            slots[i] = NOTHING       # the kernel's zero page, or a page shared with a forked child
    i = 0
    while i < n_pages:
        start = i
        i += 1
        if slots[start] == NOTHING:
            continue
        if slots[start] != PLAIN and not _has_room(c, slots[start]):
            slots[start] = PLAIN     # others of this span have taken it
        if slots[start] != PLAIN:
            while i < n_pages and slots[i] == slots[i - 1] + 1 and _has_room(c, slots[i]):
                i += 1
            if can_share and _share(
                c, home, target + start * c.page_bytes, slots + start, digests + start, i - start
            ):
                continue
        else:
            while i < n_pages and slots[i] == PLAIN:
                i += 1
            n_plain[0] += i - start
        memcpy(
            <void*>(target + start * c.page_bytes), <const void*>(source + start * c.page_bytes),
            (i - start) * c.page_bytes
        )
