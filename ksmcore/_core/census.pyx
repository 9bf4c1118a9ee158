"""The census: what is mapped in this process, against what the engine takes for mapped.

A program can unmap, move, protect or replace memory that it has registered, without telling anybody. An
engine that went on from what it remembers would crash on such memory, change what is another's by now, or
hand out a shared page that is still mapped elsewhere. So:

  - A region that is not plain private memory, readable and writable throughout, is `altered`: no pass
    looks at it, for as long as it is so.
  - Where the store is not mapped although the item says so, the mapping has been moved away or is gone.
    The item is forgotten, and the slot lost: it is never released, since whoever has it mapped now must
    go on seeing its bytes.
  - Where the store is mapped although no item says so, the slot is lost as well.

To find that out the records of all pages over the store are compared with what is mapped; only where one differs
are the mappings of each region put down page by page.
The caller holds the engine's lock.
"""

from libc.stdint cimport int64_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free

from ksmcore._kernel.maps cimport maps_each, maps_each_in, maps_is_private_data, vma_t
from ksmcore._kernel.syscalls cimport sys_error
from ksmcore._pass.batch cimport batch_drop_sharer
from ksmcore._pass.state cimport engine_core
from ksmcore._records.budget cimport MAPS_WATCHED, budget_refresh
from ksmcore._records.regions cimport REGION_WATCHED, region_t, regions_at, regions_end_of, regions_next
from ksmcore._records.rmap cimport (
    PAGE_SHARED, PAGE_UNSHARED, PAGE_VOLATILE, rmap_find, rmap_set_over_store, rmap_set_slot, rmap_set_state,
    rmap_slot,
)
from ksmcore._records.store cimport store_lose, store_slot_at
from ksmcore._records.store_files cimport store_files_begin_census, store_files_end_census


# All mappings, and the regions in them.
ctypedef struct counting:
    engine_core* c
    int64_t n_maps
    int64_t n_ours               # mappings of stores, what they cut off, and what watching does
    uintptr_t end_of_store       # where the last mapping of a store ends, 0 when another followed
    size_t n_store_pages         # in regions
    size_t n_astray              # of those: taken to map something else

# The mappings of whole pages of one region.
ctypedef struct looking:
    engine_core* c
    uintptr_t addr
    uintptr_t end
    uint32_t* under              # slot at each page, or NULL
    size_t n_store_pages
    size_t n_blocked             # store pages that cannot be read and written
    size_t n_astray              # store pages that are taken to map something else
    uintptr_t covered            # up to here they are mapped as they should be


cdef bint _is_our_store(engine_core* c, const vma_t* vma, uint32_t* slot) noexcept nogil:
    """*slot: the one at the beginning of the mapping."""
    return store_slot_at(&c.store, vma.dev_major, vma.dev_minor, vma.inode, vma.offset, slot)


cdef bint _is_plain(const vma_t* vma, bint is_our_store) noexcept nogil:
    """Private memory that can be read and written, of no file but ours."""
    return maps_is_private_data(vma) and (vma.inode == 0 or is_our_store)


cdef size_t _n_astray(engine_core* c, uintptr_t addr, uint32_t slot, size_t n_pages) noexcept nogil:
    """How many of these pages, which map the store from `slot` on, are taken to map something else. Two merged
    pages that have changed places leave every number of pages as it was, so each is looked at."""
    cdef size_t i, n = 0
    cdef uint32_t item, remembered, hint = 0
    cdef uint64_t first_no = addr // c.page_bytes
    for i in range(n_pages):
        item = rmap_find(&c.rmap, first_no + i, hint)
        if item == 0 or not c.rmap.tags[item].over_store:
            n += 1
            continue
        hint = item
        remembered = rmap_slot(&c.rmap, item)
        n += remembered != 0 and remembered != slot + <uint32_t>i
    return n


# ---- all mappings -----------------------------------------------------------------------------------

cdef void _count(const vma_t* vma, void* context) noexcept nogil:
    cdef counting* all = <counting*>context
    cdef engine_core* c = all.c
    cdef uint32_t slot
    cdef bint is_ours = _is_our_store(c, vma, &slot)
    cdef bint is_plain = _is_plain(vma, is_ours)
    cdef region_t* region
    cdef uintptr_t start, end
    all.n_maps += 1
    # A mapping of a store costs itself, and what it cut off behind it; those of other engines count as ours.
    if vma.is_store or all.end_of_store == vma.start:
        all.n_ours += 1
    all.end_of_store = vma.end if vma.is_store else 0
    region = regions_at(&c.regions, vma.start)
    while region != NULL and region.addr < vma.end:
        start = max(vma.start, region.addr)
        end = min(vma.end, regions_end_of(&c.regions, region))
        if is_plain:
            region.n_plain_pages += (end - start) // c.page_bytes
        if is_ours:
            region.n_store_pages += (end - start) // c.page_bytes
            all.n_store_pages += (end - start) // c.page_bytes
            all.n_astray += _n_astray(
                c, start, slot + <uint32_t>((start - vma.start) // c.page_bytes), (end - start) // c.page_bytes
            )
        region = regions_next(&c.regions, region)


cdef int census_take(engine_core* c, int64_t asked_maps, int64_t max_map_count, sys_error* err) noexcept nogil:
    """At the start of a pass: count the mappings for the map budget, and look for altered regions.

    -1 with *err when the mappings cannot be read: then the budget allows no more than is used, and what
    is known of the regions stays.
    """
    cdef counting all
    cdef size_t i, n_blocked
    cdef int rc
    all.c = c
    all.n_maps = all.n_ours = 0
    all.end_of_store = 0
    all.n_store_pages = all.n_astray = 0
    for i in range(c.regions.n):
        c.regions.all[i].n_plain_pages = c.regions.all[i].n_store_pages = 0
    store_files_begin_census(&c.store)
    if maps_each(_count, &all, err) != 0:
        budget_refresh(&c.budget, -1, -1, asked_maps, max_map_count)
        return -1
    store_files_end_census(&c.store)
    for i in range(c.regions.n):
        all.n_ours += MAPS_WATCHED if c.regions.all[i].flags & REGION_WATCHED else 0
    budget_refresh(&c.budget, all.n_maps, all.n_ours, asked_maps, max_map_count)
    for i in range(c.regions.n):
        c.regions.all[i].passed_over = False
        c.regions.all[i].altered = c.regions.all[i].n_plain_pages != c.regions.all[i].n_pages
    if all.n_store_pages != c.rmap.n_over_store or all.n_astray != 0:
        for i in range(c.regions.n):
            rc = census_of_region(c, &c.regions.all[i], &n_blocked, err)
            if rc != 0:
                return rc
    return 0


# ---- one region -------------------------------------------------------------------------------------

cdef void _look(const vma_t* vma, void* context) noexcept nogil:
    cdef looking* one = <looking*>context
    cdef size_t page_bytes = one.c.page_bytes
    cdef uint32_t first_slot
    cdef bint is_ours = _is_our_store(one.c, vma, &first_slot)
    cdef bint is_plain = _is_plain(vma, is_ours)
    cdef uintptr_t start = max(vma.start, one.addr)
    cdef uintptr_t end = min(vma.end, one.end)
    cdef size_t page, i
    if is_plain and one.covered == start:
        one.covered = end
    if not is_ours:
        return
    one.n_store_pages += (end - start) // page_bytes
    if not is_plain:
        one.n_blocked += (end - start) // page_bytes
    first_slot += <uint32_t>((start - vma.start) // page_bytes)
    if one.under == NULL:
        one.n_astray += _n_astray(one.c, start, first_slot, (end - start) // page_bytes)
    else:
        page = (start - one.addr) // page_bytes
        for i in range((end - start) // page_bytes):
            one.under[page + i] = first_slot + <uint32_t>i


cdef size_t _n_over_store(engine_core* c, uint64_t first_no, size_t n_pages) noexcept nogil:
    cdef size_t page, n = 0
    cdef uint32_t item, hint = 0
    for page in range(n_pages):
        item = rmap_find(&c.rmap, first_no + page, hint)
        if item != 0:
            hint = item
            n += c.rmap.tags[item].over_store
    return n


cdef int census_of_region(engine_core* c, region_t* region, size_t* n_blocked, sys_error* err) noexcept nogil:
    """Look at one region's mappings, and put right what is remembered of them.

    *n_blocked: pages that map the store and cannot be read and written now. -1 with *err when the
    mappings cannot be read (err.code 0: no memory for it).
    """
    cdef bint is_plain = not region.altered
    cdef int rc = census_of_range(c, region.addr, regions_end_of(&c.regions, region), &is_plain, n_blocked, err)
    region.altered = not is_plain or region.passed_over
    return rc


cdef int census_of_range(
    engine_core* c, uintptr_t addr, uintptr_t end, bint* is_plain, size_t* n_blocked, sys_error* err
) noexcept nogil:
    """The same of whole pages of one region. *is_plain: they are plain private memory throughout; not set when
    the mappings cannot be read."""
    cdef looking one
    cdef uint64_t first_no = addr // c.page_bytes
    cdef size_t n_pages = (end - addr) // c.page_bytes
    one.c = c
    one.addr = addr
    one.end = end
    one.under = NULL
    one.n_store_pages = one.n_blocked = one.n_astray = 0
    one.covered = addr
    n_blocked[0] = 0
    if maps_each_in(addr, end, _look, &one, err) != 0:
        return -1
    is_plain[0] = one.covered == end
    n_blocked[0] = one.n_blocked
    if one.n_astray == 0 and one.n_store_pages == _n_over_store(c, first_no, n_pages):
        return 0
    one.under = <uint32_t*>calloc(n_pages, sizeof(uint32_t))
    if one.under == NULL:
        return -1
    if maps_each_in(addr, end, _look, &one, err) != 0:
        free(one.under)
        return -1
    _put_right(c, first_no, n_pages, one.under)
    free(one.under)
    return 0


cdef void _put_right(engine_core* c, uint64_t first_no, size_t n_pages, const uint32_t* under) noexcept nogil:
    """under: the slot that is mapped at each page, 0 where the store is not."""
    cdef size_t page
    cdef uint32_t item, hint = 0, remembered
    cdef bint is_known
    for page in range(n_pages):
        item = rmap_find(&c.rmap, first_no + page, hint)
        if item != 0:
            hint = item
        is_known = item != 0 and c.rmap.tags[item].over_store
        # 0: the slot under the page is not remembered (it is not needed for a page that is not shared).
        remembered = rmap_slot(&c.rmap, item) if is_known else 0
        if is_known and under[page] != 0 and (remembered == 0 or under[page] == remembered):
            continue
        if under[page] != 0:
            store_lose(&c.store, under[page])
        if not is_known:
            continue
        if c.rmap.tags[item].state == PAGE_SHARED:
            store_lose(&c.store, remembered)
            batch_drop_sharer(&c.b, item)
        if c.rmap.tags[item].state != PAGE_UNSHARED:
            rmap_set_slot(&c.rmap, item, under[page])
            rmap_set_state(&c.rmap, item, PAGE_VOLATILE)
        rmap_set_over_store(&c.rmap, item, under[page] != 0)
