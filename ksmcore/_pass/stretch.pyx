"""Stretches of one repeated page: over how many copies they lie, and how they go on from span to span.

Were all pages of a stretch mapped to one shared page, each would be a mapping of its own. Over a block of k
copies, which follow each other in the store, k of them are one mapping.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t, uintptr_t

from ksmcore._pages cimport page_compare
from ksmcore._pass.state cimport IS_HUGE, engine_core, stretch_t
from ksmcore._records.budget cimport map_budget
from ksmcore._records.store cimport MAX_SHARERS, store_is_shared_block, store_page
from ksmcore._records.store_files cimport store_t

cdef enum:
    # A stretch of n equal pages costs n / k mappings over a block of k copies, and k pages of memory. A
    # mapping is worth about 1/16 of a page, which makes sqrt(n / 16) the best k.
    PAGES_PER_COPY = 16
    # It is worth more where there are few for the pages that are registered: k is what it takes for all of them to
    # be served, but no more than this part of the stretch.
    MOST_KEPT = 20
    MAX_COPIES = 512
    COPIES_PAY = 32            # pages for each copy: so many, and a block as long as a huge page costs little
    GOES_ON = 2                # times as long as it has been, if its end has not been seen
    LONG = 512                 # pages of a stretch that are worth a guess that the next ones belong to it, too
    END_BYTES = 64


cdef uint32_t _copies_for(const map_budget* budget, uint64_t n_pages, uint32_t least) noexcept nogil:
    """Copies that make a stretch of n_pages equal pages cheapest."""
    cdef uint32_t k = least
    k = max(k, <uint32_t>min(<uint64_t>budget.pages_per_map, n_pages // MOST_KEPT, <uint64_t>MAX_COPIES))
    while k < <uint32_t>MAX_COPIES and <uint64_t>(k + 1) * (k + 1) * PAGES_PER_COPY <= n_pages:
        k += 1
    return k


cdef inline bint _is_another(const engine_core* c, size_t i) noexcept nogil:
    """Is this page doubted, and rightly so: has its neighbour before it, with the same checksum, other bytes?"""
    return (
        c.items[i] != 0 and c.rmap.tags[c.items[i]].doubted
        and page_compare(c.pages[i], c.pages[i] - c.page_bytes, c.page_bytes) != 0
    )


cdef uint32_t stretch_follow(engine_core* c, size_t i, size_t n_look) noexcept nogil:
    """Go on to page i of the span: c.stretch is the stretch that it is in. Returns the copies that are best for it:
    for its length as far as it has been seen, or, where it reaches the end of the span, for what it may be expected
    to become. A page that is doubted may begin a new one."""
    cdef stretch_t* stretch = &c.stretch
    cdef uint64_t page_no = <uintptr_t>c.pages[i] // c.page_bytes
    cdef size_t end = i
    if stretch.start <= page_no < stretch.end and c.digests[i] == stretch.digest:
        return stretch.n_copies
    if page_no != stretch.end or c.digests[i] != stretch.digest or _is_another(c, i):
        stretch.n_pages = 0
        stretch.slot = 0
        stretch.digest = c.digests[i]
    while (
        end < n_look and c.digests[end] == c.digests[i]
        and c.pages[end] == c.pages[i] + (end - i) * c.page_bytes and not (end > i and _is_another(c, end))
    ):
        end += 1
    stretch.n_pages += end - i
    stretch.start = page_no
    stretch.end = page_no + (end - i)
    stretch.end_unseen = end == n_look and stretch.more_follows
    # At least as many as max_page_sharing asks for, of the pages in this span.
    stretch.n_copies = _copies_for(
        &c.budget, stretch.n_pages * (GOES_ON if stretch.end_unseen else 1),
        <uint32_t>((end - i + c.max_page_sharing - 1) // c.max_page_sharing)
    )
    if c.marks[i] & IS_HUGE and stretch.n_pages >= <uint64_t>COPIES_PAY * MAX_COPIES:
        stretch.n_copies = MAX_COPIES
    return stretch.n_copies


cdef size_t stretch_guess(const engine_core* c, size_t n_look) noexcept nogil:
    """How many pages, from the first one on, seem to go on the stretch that the span before ended in: it is long, they
    are seen for the first time, and their ends are those of its page. They need not be read for a checksum, since
    the guard compares all of them: who is told apart there is looked at closer."""
    cdef const stretch_t* stretch = &c.stretch
    cdef const uint8_t* next = <const uint8_t*><uintptr_t>(stretch.end * c.page_bytes)
    cdef const uint8_t* shared
    cdef size_t last = c.page_bytes - END_BYTES, i = 0
    # With room for all of them: none is to be filed under a checksum that is a guess.
    if (
        stretch.n_pages < <uint64_t>LONG or c.by_content or c.max_page_sharing < <uint32_t>MAX_SHARERS
        or not store_is_shared_block(&c.store, stretch.slot, stretch.digest)
    ):
        return 0
    shared = store_page(<store_t*>&c.store, stretch.slot)
    while (
        i < n_look and c.items[i] == 0 and c.pages[i] == next + i * c.page_bytes
        and page_compare(c.pages[i], shared, END_BYTES) == 0
        and page_compare(c.pages[i] + last, shared + last, END_BYTES) == 0
    ):
        c.digests[i] = stretch.digest
        i += 1
    return i


cdef void stretch_begin_span(engine_core* c) noexcept nogil:
    """The lock was given up since the last span: is what its last page was matched with still shared?"""
    c.stretch.block_slot = 0
    if not store_is_shared_block(&c.store, c.stretch.slot, c.stretch.digest):
        c.stretch.slot = 0
