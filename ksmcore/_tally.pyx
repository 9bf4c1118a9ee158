"""The pages of one region by what they are.

Called by: _core, which holds the engine's lock for `core_tally` and not for `tally_as_dict`. Calls: _rmap, _store
(reads both).
"""

from libc.stdint cimport uint32_t, uint64_t

from ksmcore._engine cimport engine_core
from ksmcore._regions cimport region_t
from ksmcore._rmap cimport N_STATES, PAGE_SHARED, PAGE_UNSHARED, PAGE_VOLATILE, PAGE_ZERO, rmap_find


cdef void core_tally(engine_core* c, const region_t* region, region_tally* tally) noexcept nogil:
    """Add up a region into *tally, which is zero before. Visits every page's record."""
    cdef uint64_t first_no = region.addr // c.page_bytes
    cdef size_t page
    cdef uint32_t item = 0, hint = 0
    tally.n_pages = region.n_pages
    tally.cow_breaks = region.cow_breaks
    for page in range(region.n_pages):
        item = rmap_find(&c.rmap, first_no + page, hint)
        if item == 0:
            continue
        hint = item
        tally.n_by_state[<int>c.rmap.tags[item].state] += 1
        tally.n_quiet += c.rmap.tags[item].quiet
        if c.rmap.tags[item].state == PAGE_SHARED:
            tally.pages_saved += 1 - 1.0 / c.store.uses[c.rmap.nodes[item].left].n_sharers
        elif c.rmap.tags[item].state == PAGE_ZERO:
            tally.pages_saved += 1


cdef dict tally_as_dict(const region_tally* tally):
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
