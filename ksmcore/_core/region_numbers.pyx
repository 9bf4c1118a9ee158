"""The pages of one region by what they are: added up, or one by one.

The caller holds the engine's lock for all but `region_numbers_as_dict`.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t, uintptr_t

from ksmcore._kernel.pagemap cimport PAGE_OF_FILE, PAGE_OWNED, PAGE_PRESENT, PAGE_UNSURE, SPAN_PAGES, pagemap_query
from ksmcore._kernel.syscalls cimport sys_error
from ksmcore._pass.state cimport engine_core
from ksmcore._records.regions cimport region_t
from ksmcore._records.rmap cimport (
    PAGE_SHARED, PAGE_UNSHARED, PAGE_VOLATILE, PAGE_ZERO, rmap_find, rmap_slot, rmap_step, rmap_walk, rmap_walk_over,
)
from ksmcore._records.store cimport store_sharers


cdef void region_numbers_read(engine_core* c, const region_t* region, region_counts* tally) noexcept nogil:
    """Add up a region into *tally, which is zero before. Visits every page's record."""
    cdef rmap_walk walk = rmap_walk_over(region.addr // c.page_bytes, region.n_pages)
    tally.n_pages = region.n_pages
    tally.cow_breaks = region.cow_breaks
    while rmap_step(&c.rmap, &walk):
        tally.n_by_state[<int>c.rmap.tags[walk.item].state] += 1
        tally.n_quiet += c.rmap.tags[walk.item].quiet
        if c.rmap.tags[walk.item].state == PAGE_SHARED:
            tally.pages_saved += 1 - 1.0 / store_sharers(&c.store, rmap_slot(&c.rmap, walk.item))
        elif c.rmap.tags[walk.item].state == PAGE_ZERO:
            tally.pages_saved += 1


cdef uint8_t _state_of(const engine_core* c, uint32_t item, uint8_t flag) noexcept nogil:
    """What the record says, corrected by what the kernel does: a write to a merged page shows here at once."""
    cdef uint32_t state = c.rmap.tags[item].state if item != 0 else <uint32_t>PAGE_VOLATILE
    cdef bint is_private = flag & PAGE_PRESENT and not flag & (PAGE_OF_FILE | PAGE_UNSURE)
    if item != 0 and state == PAGE_SHARED:
        return SHOWN_BROKEN if is_private else SHOWN_SHARED
    if item != 0 and state == PAGE_ZERO:
        return SHOWN_BROKEN if flag & PAGE_OWNED else SHOWN_ZERO
    if not flag & PAGE_PRESENT:
        return SHOWN_NOT_PRESENT
    return SHOWN_UNIQUE if state == PAGE_UNSHARED else SHOWN_VOLATILE


cdef int region_numbers_map(engine_core* c, const region_t* region, uint8_t* states, sys_error* err) noexcept nogil:
    """One enum shown_state for each page of a region. -1 with *err when the kernel does not answer."""
    cdef uint8_t flags[<int>SPAN_PAGES]
    cdef uintptr_t addr = region.addr
    cdef size_t done = 0, n, i
    cdef uint32_t item, hint = 0
    while done < region.n_pages:
        n = min(region.n_pages - done, <size_t>SPAN_PAGES)
        if pagemap_query(&c.pm, addr + done * c.page_bytes, n, flags, err) != 0:
            return -1
        for i in range(n):
            item = rmap_find(&c.rmap, addr // c.page_bytes + done + i, hint)
            if item != 0:
                hint = item
            states[done + i] = _state_of(c, item, flags[i])
        done += n
    return 0


cdef dict region_numbers_as_dict(const region_counts* tally):
    """The tally by the names that `ksmcore.RegionStats` gives it."""
    return {
        "pages": tally.n_pages,
        "pages_merged": tally.n_by_state[<int>PAGE_SHARED],
        "pages_unshared": tally.n_by_state[<int>PAGE_UNSHARED],
        "pages_quiet": tally.n_quiet,
        "pages_volatile": tally.n_by_state[<int>PAGE_VOLATILE],
        "ksm_zero_pages": tally.n_by_state[<int>PAGE_ZERO],
        "pages_saved": tally.pages_saved,
        "cow_breaks": tally.cow_breaks,
    }
