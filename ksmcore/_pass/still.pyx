"""Still memory: where nobody wrote, and so no page needs a look. It is passed over, by one question to the kernel for
many regions, instead of being surveyed by the span.

The questions, by what is known of a region:

  its pages were all there, and protected          ASK_WRITTEN
  it is settled: hardly a page needed a look       ASK_PRIVATE. What is merged shows as pages of a file, or not at all
  it is watched, but which pages are there is      ASK_GONE
  not known, or not since CAREFUL passes

The first two show every private page that was written since it was protected, or that was never protected: all that
can need a look. What they do not show is that a page has gone, so one that the program has given up may be remembered
for CAREFUL passes. Nothing depends on that but some counters, since a page that comes back is a written one.

The caller holds the engine's lock.
"""

from libc.stdint cimport uint64_t, uintptr_t

from ksmcore._kernel.pagemap cimport ASK_GONE, ASK_PRIVATE, ASK_WRITTEN, page_question, pagemap_first
from ksmcore._pass.state cimport engine_core
from ksmcore._records.regions cimport NOT_BARRED, REGION_WATCHED, region_t, regions_end_of, regions_next
from ksmcore._records.rmap cimport rmap_has_copies

cdef enum:
    NEIGHBOURS = 256           # regions that are passed over at once, ...
    ASKED_PAGES = 131072       # ... and pages: a quarter of a millisecond
    CAREFUL = 8                # passes of which one asks whether all pages are there
    SETTLED_SHARE = 16         # one page in so many may need a look where the others are settled


cdef inline bint _were_there(const engine_core* c, const region_t* region, uintptr_t end) noexcept nogil:
    return end <= region.addr + region.n_there * c.page_bytes


cdef void _note_there(const engine_core* c, region_t* region, uintptr_t start, uintptr_t end) noexcept nogil:
    """All pages in [start, end) are there; of the one at `end`, where that lies in the region, it is not known."""
    cdef uintptr_t known = region.addr + region.n_there * c.page_bytes
    if max(start, region.addr) > known:
        return
    if region.addr <= end <= regions_end_of(&c.regions, region) or end > known:
        known = max(region.addr, min(end, regions_end_of(&c.regions, region)))
    region.n_there = (known - region.addr) // c.page_bytes


cdef size_t _take_absent(region_t* region, uintptr_t start, size_t n_most) noexcept nogil:
    """Of the pages that were not there when all of the region was surveyed last, n_most are taken by this step of a
    walk, from `start` on, or what earlier steps have left; returns how many."""
    if start == region.addr:
        region.n_absent_left = region.n_absent
    n_most = min(n_most, region.n_absent_left)
    region.n_absent_left -= n_most
    return n_most


cdef bint _choose(const engine_core* c, region_t* region, uintptr_t end, page_question* asked) noexcept nogil:
    """What to ask of a region up to `end`. False: it has to be surveyed, or to be counted why it is not."""
    cdef bint is_watched = region.flags & REGION_WATCHED
    if region.n_holds != 0 or region.being_made or region.altered or region.bar != NOT_BARRED:
        return False
    if region.careful_pass != c.n_passes and c.n_passes - region.seen_pass < <uint64_t>CAREFUL:
        if is_watched and _were_there(c, region, end):
            asked[0] = ASK_WRITTEN
            return True
        if region.is_settled and not rmap_has_copies(&c.rmap):
            asked[0] = ASK_PRIVATE
            return True
    # In the rest of this pass as well, and until a walk has come through all of the region so.
    region.careful_pass = c.n_passes
    asked[0] = ASK_GONE
    return is_watched


cdef bint _can_join(page_question* asked, page_question other) noexcept nogil:
    """One question for both, in *asked: pages that are there and protected are what all three ask for."""
    if asked[0] == other or other == ASK_WRITTEN:
        return True
    if asked[0] == ASK_WRITTEN:
        asked[0] = other
        return True
    return False


cdef uintptr_t _end_of_still(
    engine_core* c, region_t* region, uintptr_t start, uintptr_t end, size_t least
) noexcept nogil:
    """Where the first page that may need a look lies, from `start` on in this region and those that it touches, can be
    asked of with it, and end before `end`; or where they end. One question for all of them, ASKED_PAGES and NEIGHBOURS
    at most; none, and the answer `start`, where they are fewer than `least` and nothing of them is settled."""
    cdef region_t* following = regions_next(&c.regions, region)
    cdef uintptr_t most = start + ASKED_PAGES * c.page_bytes, found
    cdef uintptr_t stop = min(regions_end_of(&c.regions, region), end, most), from_here, to_here
    cdef page_question asked, other
    cdef size_t n = 1
    if not _choose(c, region, stop, &asked):
        return start
    while (
        following != NULL and following.addr == stop and regions_end_of(&c.regions, following) <= min(end, most)
        and n < <size_t>NEIGHBOURS and _choose(c, following, regions_end_of(&c.regions, following), &other)
        and _can_join(&asked, other)
    ):
        n += 1
        stop = regions_end_of(&c.regions, following)
        following = regions_next(&c.regions, following)
    if n < least and asked != ASK_PRIVATE:
        return start
    found = pagemap_first(&c.pm, start, stop, asked)
    while region != following:
        if asked == ASK_GONE or (asked == ASK_WRITTEN and found < stop):
            _note_there(c, region, start, found)
        from_here = max(start, region.addr)
        to_here = min(found, regions_end_of(&c.regions, region))
        if asked == ASK_GONE and from_here < to_here:
            still_note_survey(c, region, from_here, to_here, 0, 0)
        elif asked == ASK_PRIVATE and from_here < to_here:
            # Pages without memory do not count as scanned: so many, if not just these.
            c.counters.pages_scanned -= _take_absent(region, from_here, (to_here - from_here) // c.page_bytes)
        region = regions_next(&c.regions, region)
    return found


cdef bint still_pass_over(
    engine_core* c, region_t* region, uintptr_t* cursor, uintptr_t end, size_t least, size_t* n_pages
) noexcept nogil:
    """Move *cursor, which is in this region or before it, over the pages that need no look because nobody wrote there;
    False where there are none. `least`: see _end_of_still."""
    cdef uintptr_t start = max(cursor[0], region.addr)
    cdef uintptr_t found = _end_of_still(c, region, start, end, least)
    cdef size_t n = (found - start) // c.page_bytes
    if n == 0:
        return False
    cursor[0] = found
    c.counters.pages_scanned += n
    n_pages[0] += n // WALKED_PER_LOOK
    return True


cdef void still_note_survey(
    const engine_core* c, region_t* region, uintptr_t start, uintptr_t end, size_t n_looked, size_t n_absent
) noexcept nogil:
    """[start, end) of a region was surveyed, or asked of with care: n_looked pages needed a look, n_absent were not
    there. Once a walk has come from one end of the region to the other it is known whether it is settled."""
    _take_absent(region, start, n_absent)
    if start == region.addr:
        region.n_surveyed = region.n_looked = region.n_away = 0
    elif start != region.addr + region.n_surveyed * c.page_bytes:
        return
    region.n_surveyed = (end - region.addr) // c.page_bytes
    region.n_looked += n_looked
    region.n_away += n_absent
    if region.n_surveyed == region.n_pages:
        region.seen_pass = c.n_passes
        region.is_settled = region.n_looked * SETTLED_SHARE <= region.n_pages
        region.n_absent = region.n_away
