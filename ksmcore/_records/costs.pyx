"""What it costs in memory mappings to map something else over pages, told from what lies under them and their
neighbours.

What is carried out is put down in the map budget. The kernel makes one mapping of neighbours that lie over
neighbouring slots, and of neighbours in anonymous memory that was never moved.
"""

from libc.stdint cimport int64_t, uint32_t, uint64_t

from ksmcore._records.rmap cimport rmap_find, rmap_next, rmap_slot, rmap_table


cdef uint32_t costs_slot_under(rmap_table* rmap, uint64_t page_no, uint32_t item) noexcept nogil:
    """What lies under a page: a slot, or 0 for anonymous memory. `item`: 0 when it is not at hand."""
    if item == 0:
        item = rmap_find(rmap, page_no, 0)
    return rmap_slot(rmap, item) if item != 0 else 0


cdef int64_t costs_of_mapping(rmap_table* rmap, uint64_t page_no, size_t n_pages, uint32_t slot) noexcept nogil:
    """Mappings more (or, negative, fewer) once n_pages > 0 neighbours lie over as many slots from `slot` on, or, with
    slot 0, are anonymous memory or not mapped at all."""
    cdef uint32_t left = costs_slot_under(rmap, page_no - 1, 0)
    cdef uint32_t right = costs_slot_under(rmap, page_no + n_pages, 0)
    cdef uint32_t before = left, after = left, under, item, hint = 0
    cdef int64_t cost = 0
    cdef uint64_t end_no = page_no + n_pages
    while page_no < end_no:
        item = rmap_find(rmap, page_no, hint)
        hint = item if item != 0 else hint
        under = rmap_slot(rmap, item) if item != 0 else 0
        cost += <int>costs_splits(after, slot) - <int>costs_splits(before, under)
        page_no += 1
        if slot == 0 and before == 0 and under == 0 and item == 0:
            # So it stays as far as nothing is known of the pages.
            rmap_next(rmap, &page_no, end_no, hint)
        before = under
        after = slot
        slot += slot != 0
    return cost + <int>costs_splits(after, right) - <int>costs_splits(before, right)


cdef int64_t costs_of_restoring(rmap_table* rmap, uint64_t page_no, size_t n_pages) noexcept nogil:
    """The same of pages that are restored: moved memory is one mapping, and does not fuse with what lies beside it."""
    return (
        costs_of_mapping(rmap, page_no, n_pages, 0)
        + (costs_slot_under(rmap, page_no - 1, 0) == 0) + (costs_slot_under(rmap, page_no + n_pages, 0) == 0)
    )
