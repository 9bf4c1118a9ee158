"""The pass: the one place that knows the whole path of a page.

Called by: _core, _unmerge. Calls: _engine, _regions, _pagemap, _quiet, _pages, _rmap, _forest, _stretch, _store,
_batch, _blocks, _runs.

    which pages are present, written, still shared   pagemap_survey, _classify
    -> protection, if they seem to be quiet          quiet_arm
    -> checksum                                      core.checksum
    -> rmap item                                     _settle_items
    -> stable, quiet, unstable tree                  _match_stable, _match_unshared
    -> intent, runs, guard, account                  batch_add, batch_flush

A span, the pages of one block that need a look, goes through each stage before the next stage begins. Nothing here
needs the GIL; the caller holds the engine's lock.

What becomes of a page, in the order of the questions asked (rules of design section 2):
  - not present: passed over. What was known of it is forgotten, unless its mapping is of the store.
  - still shared, or still the zero page: nothing to do.
  - its sharing was broken by a write: the membership is forgotten, and the page waits for the next pass.
  - changed since the last pass: volatile, waits. So no window is ever opened on a page that changed.
  - equal to a shared page: an intent to merge with that. A page seen for the first time as well.
  - all zero: an intent to give it back.
  - unchanged and equal to another such page: both are to be merged into a new shared page.
  - else it stands in the unstable tree for the rest of the pass.
A page that stood there, and still did not change, moves to the quiet tree (see _quiet); a private copy over
the store becomes plain memory first.

`immediate` (dedup) leaves the waiting out.
"""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t, uintptr_t

from ksmcore._batch cimport (
    INTENT_MERGE, INTENT_PLAIN, INTENT_RESHARE, INTENT_ZERO, SKIP_ALTERED, SKIP_AWAY, SKIP_HELD, SKIP_MAX_SHARED,
    SKIP_STORE, batch_add, batch_sharers, drop_sharer, stable_page_of,
)
from ksmcore._blocks cimport block_new
from ksmcore._engine cimport engine_core, page_of_item
from ksmcore._forest cimport (
    forest_erase, forest_find, forest_insert, forest_insert_before, forest_next, forest_prefetch,
)
from ksmcore._merge cimport REGION_WATCHED
from ksmcore._pagemap cimport (
    BLOCK_PAGES, PAGE_OF_FILE, PAGE_OWNED, PAGE_PRESENT, PAGE_SWAPPED, PAGE_UNSURE, page_range, pagemap_survey,
)
from ksmcore._pages cimport checksum_safely, page_compare, page_is_zero
from ksmcore._quiet cimport (
    HAS_STOOD, IS_ARMED, IS_HUGE, quiet_arm, quiet_disarm_changed, quiet_disarm_item, quiet_disarm_others,
    quiet_is_still,
)
from ksmcore._regions cimport region_end, region_t, regions_at
from ksmcore._rmap cimport (
    PAGE_SHARED, PAGE_UNSHARED, PAGE_VOLATILE, PAGE_ZERO, rmap_add, rmap_find, rmap_remove,
    rmap_set_state,
)
from ksmcore._runs cimport batch_flush
from ksmcore._store cimport store_align, store_block, store_page
from ksmcore._stretch cimport block_is_shared, stretch_copies, stretch_go_on
from ksmcore._sys cimport error_clear, sys_error, sys_pause
from ksmcore._trees cimport rb_place

cdef enum:
    LONG_REST = 32             # pages of a stretch that are worth a block of their own where the other is full
    PREFETCH = 16              # pages that searches are prepared for ahead
    SURVEY_PAGES = 16384       # that are passed over at once when none needs a look: the lock is held meanwhile
    WALKED_PER_LOOK = 64       # pages that are passed over in the time of looking at one

# In c.flags, of a page that is looked at; with those of _quiet.
cdef enum:
    IS_NEW = 1
    WAS_BROKEN = 2             # shared or zero, and written since


# ---- items ----------------------------------------------------------------------------------

cdef void _leave_tree(engine_core* c, uint32_t item) noexcept nogil:
    """Take an item out of the unstable or the quiet tree if it stands there. Its links are void in any case."""
    if c.rmap.tags[item].state != PAGE_UNSHARED:
        return
    if c.rmap.tags[item].quiet:
        forest_erase(&c.quiet, item)
        c.rmap.tags[item].quiet = 0
    elif c.rmap.tags[item].epoch == c.epoch:
        forest_erase(&c.unstable, item)
    c.rmap.tags[item].epoch = 0
    c.rmap.nodes[item].left = 0


cdef void core_forget_item(engine_core* c, uint32_t item) noexcept nogil:
    """Drop all that is known of a page, its share included; not its mapping."""
    if c.rmap.tags[item].state == PAGE_SHARED:
        drop_sharer(&c.b, item)
    _leave_tree(c, item)
    rmap_remove(&c.rmap, item)


cdef void _wait(engine_core* c, uint32_t item, uint32_t digest) noexcept nogil:
    """The page is volatile until the next pass shows the same checksum."""
    c.rmap.nodes[item].digest = digest
    rmap_set_state(&c.rmap, item, PAGE_VOLATILE)


# ---- stage 1: which pages need a look -----------------------------------------------------------

cdef bint _wants_look(engine_core* c, uint32_t item, const uint8_t* page, uint8_t flag) noexcept nogil:
    """Must the bytes of this present page be looked at? `item`: 0 when it has none."""
    if flag & PAGE_OF_FILE and (item == 0 or not c.rmap.tags[item].over_store):
        return False             # something that was mapped here behind our back: not ours to touch
    if item == 0:
        # The kernel's own zero page, read but never written: there is no memory to save.
        return flag & (PAGE_OWNED | PAGE_UNSURE) or not page_is_zero(page, c.page_bytes)
    if c.rmap.tags[item].state == PAGE_SHARED:
        if not flag & PAGE_UNSURE:
            return not flag & PAGE_OF_FILE
        return page_compare(page, store_page(&c.store, c.rmap.nodes[item].left), c.page_bytes) != 0
    if c.rmap.tags[item].state == PAGE_ZERO:
        return flag & PAGE_OWNED or not page_is_zero(page, c.page_bytes)
    return True


cdef size_t _classify(engine_core* c) noexcept nogil:
    """Fill c.items, c.pages and c.flags with the pages of the survey that need a look; returns how many."""
    cdef uint32_t item = 0, hint = 0
    cdef const page_range* there
    cdef const uint8_t* page
    cdef size_t k, i, n_look = 0
    for k in range(c.survey.n_ranges):
        there = &c.survey.ranges[k]
        for i in range(there.n_pages):
            page = <const uint8_t*>(there.addr + i * c.page_bytes)
            item = rmap_find(&c.rmap, <uintptr_t>page // c.page_bytes, hint)
            if item != 0:
                hint = item
            if not there.flags & PAGE_PRESENT:
                c.counters.pages_scanned -= 1
                c.counters.skips[<int>SKIP_AWAY] += there.flags == PAGE_SWAPPED
                if item != 0:
                    _absent(c, item, there.flags)
                continue
            if not _wants_look(c, item, page, there.flags):
                continue
            c.items[n_look] = item
            c.pages[n_look] = page
            c.flags[n_look] = there.flags
            n_look += 1
    return n_look


cdef void _absent(engine_core* c, uint32_t item, uint8_t flag) noexcept nogil:
    """A tracked page that is not there to be read: not touched since it was merged, swapped out, being
    moved by the kernel, or given up by the program.

    A sharer stays one: its share is broken only when a private page is seen in its place. To forget a
    sharer whose mapping still shows the slot would let the slot be released under it; to keep one whose
    private copy happens to be swapped out only delays that.
    """
    if c.rmap.tags[item].state == PAGE_SHARED:
        return
    if c.rmap.tags[item].state == PAGE_ZERO and not flag & PAGE_SWAPPED:
        return
    if c.rmap.tags[item].quiet and flag & PAGE_SWAPPED:
        return                   # its protection goes with it, and comes back with it
    if c.rmap.tags[item].over_store:
        # Kept, so that the mapping can be put right when the region is removed.
        _leave_tree(c, item)
        rmap_set_state(&c.rmap, item, PAGE_VOLATILE)
    else:
        core_forget_item(c, item)


# ---- stage 2: matching ----------------------------------------------------------------------

cdef uint32_t _new_block(
    engine_core* c, uint32_t* n_copies, uint32_t least, const uint8_t* source, uint32_t digest
) noexcept nogil:
    """A pending block of *n_copies slots, or of what the limit leaves if that is `least`; or 0, with the
    reason counted if a single slot would have done (else the page has another shared page to join)."""
    cdef uint32_t slot
    cdef int64_t room
    if c.max_shared_pages >= 0:
        room = c.max_shared_pages - <int64_t>(c.store.n_used - c.store.n_dead)
        if room < <int64_t>least:
            c.counters.skips[<int>SKIP_MAX_SHARED] += least == 1
            return 0
        n_copies[0] = <uint32_t>min(<int64_t>n_copies[0], room)
    slot = block_new(&c.b, n_copies[0], source, digest, least > 1 and c.stretch_end_unseen)
    if slot == 0:
        c.counters.skips[<int>SKIP_STORE] += least == 1
    return slot


cdef uint32_t _match_stable(
    engine_core* c, const uint8_t* page, uint32_t digest, uint64_t page_no, uint32_t n_wanted,
    uint32_t* first, rb_place* place
) noexcept nogil:
    """The slot that this page should map, or 0 when no more pages can map an equal one.

    *first: the first shared page that is equal, full or not, if it is known; then it is not searched for. Set
    to 0 when there is none, and then *place is where one belongs.

    Where a stretch of different pages comes again, its shared pages follow each other in the store, so the one
    after the last match is tried first. Within a block the page number chooses the copy, so that neighbours in a
    stretch of equal pages map neighbouring slots. A stretch that has outgrown its block, or filled it, gets a
    further one, which is found first from then on.
    """
    cdef uint32_t n_copies, larger, slot
    cdef uint64_t left
    cdef bint is_full
    if (
        first[0] == 0 and block_is_shared(c, c.next_slot, digest)
        and page_compare(page, store_page(&c.store, c.next_slot), c.page_bytes) == 0
        and batch_sharers(&c.b, c.next_slot) < c.max_page_sharing
    ):
        first[0] = c.next_slot
    if first[0] == 0:
        first[0] = forest_find(&c.stable, digest, page, place)
    if first[0] == 0:
        return 0
    if first[0] != c.block_slot:
        c.block_slot = first[0]
        store_block(&c.store, first[0], &c.block_copies)
    n_copies = c.block_copies
    slot = first[0] + <uint32_t>(page_no % n_copies)
    is_full = batch_sharers(&c.b, slot) >= c.max_page_sharing
    left = c.stretch_end - page_no
    if (n_wanted >= 2 * n_copies and left >= n_wanted) or (is_full and left >= <uint64_t>LONG_REST):
        larger = _new_block(c, &n_wanted, 1 if is_full else 2 * n_copies, page, digest)
        if larger != 0:
            forest_insert_before(&c.stable, larger, first[0])
            first[0] = larger
            c.block_slot = larger
            c.block_copies = n_copies = n_wanted
            slot = first[0] + <uint32_t>(page_no % n_copies)
            is_full = False
    c.stretch_slot = first[0]
    c.next_slot = first[0] + n_copies
    return _with_room(c, digest, page) if is_full else slot


cdef uint32_t _with_room(engine_core* c, uint32_t digest, const uint8_t* page) noexcept nogil:
    """A slot of any block equal to this page that takes one more sharer, or 0. Equal blocks stand next to each
    other in the stable tree, the largest first."""
    cdef uint32_t first = forest_find(&c.stable, digest, page, NULL), n_copies, i
    while (
        first != 0 and c.store.nodes[first].digest == digest
        and page_compare(page, stable_page_of(&c.b, first), c.page_bytes) == 0
    ):
        store_block(&c.store, first, &n_copies)
        for i in range(n_copies):
            if batch_sharers(&c.b, first + i) < c.max_page_sharing:
                return first + i
        first = forest_next(&c.stable, first)
    return 0


cdef uint32_t _partner(
    engine_core* c, uint32_t item, const uint8_t* page, uint32_t digest, bint may_be_quiet, bint immediate
) noexcept nogil:
    """An equal page of the quiet or the unstable tree, or 0: then this page stands there itself. Where a
    stretch of pages comes again, the next partner is the item after the last one."""
    cdef rb_place place, quiet_place
    cdef uint32_t partner, written = 0
    if c.quiet.n_nodes != 0 or may_be_quiet:
        partner = forest_find(&c.quiet, digest, page, &quiet_place)
        if partner != 0 and (immediate or quiet_is_still(c, partner)):
            return partner
        # One that was written has its turn still to come. It may have been written with the same bytes.
        written = partner
    partner = c.next_partner
    if not (
        0 < partner < c.rmap.top and c.rmap.nodes[partner].digest == digest
        and c.rmap.tags[partner].state == PAGE_UNSHARED and c.rmap.tags[partner].epoch == c.epoch
        and page_compare(page, page_of_item(c, partner), c.page_bytes) == 0
    ):
        partner = forest_find(&c.unstable, digest, page, &place)
    if partner != 0:
        c.next_partner = partner + 1
        return partner
    rmap_set_state(&c.rmap, item, PAGE_UNSHARED)
    if may_be_quiet and written == 0:
        c.rmap.tags[item].quiet = 1
        forest_insert(&c.quiet, item, quiet_place)
    else:
        c.rmap.tags[item].epoch = c.epoch
        forest_insert(&c.unstable, item, place)
    return 0


cdef void _match_unshared(
    engine_core* c, const region_t* region, size_t i, uint32_t n_wanted, uint32_t full, rb_place stable_place,
    bint immediate
) noexcept nogil:
    """Merge with an equal page that is not shared yet into a new shared page, or stand in its tree.

    The new one goes to stable_place, or before `full`, an equal one that takes no more sharers."""
    cdef uint32_t item = c.items[i], digest = c.digests[i], partner, slot
    cdef uint64_t page_no = <uintptr_t>c.pages[i] // c.page_bytes, partner_no
    cdef const region_t* home
    partner = _partner(c, item, c.pages[i], digest, c.flags[i] & IS_ARMED != 0, immediate)
    if partner == 0:
        return
    # The partner is the source: the pages in scan order were found first, so their copies are written
    # in long pieces.
    partner_no = c.rmap.tags[partner].page_no
    home = regions_at(&c.regions, <uintptr_t>(partner_no * c.page_bytes))
    if home.n_holds != 0:
        c.counters.skips[<int>SKIP_HELD] += 1
        rmap_set_state(&c.rmap, item, PAGE_UNSHARED)
        return
    if (
        c.flags[i] & IS_HUGE and c.rmap.tags[partner].huge
        and page_no % BLOCK_PAGES == partner_no % BLOCK_PAGES == 0
    ):
        store_align(&c.store, BLOCK_PAGES)
    slot = _new_block(c, &n_wanted, 1, <const uint8_t*><uintptr_t>(partner_no * c.page_bytes), digest)
    if slot == 0:
        rmap_set_state(&c.rmap, item, PAGE_UNSHARED)
        return
    if full != 0:
        forest_insert_before(&c.stable, slot, full)
    else:
        forest_insert(&c.stable, slot, stable_place)
        c.b.pendings[c.b.n_pendings - 1].alone = stable_place.alone
    if c.rmap.tags[partner].quiet:
        quiet_disarm_item(c, partner)    # if it is not merged after all it must be looked at again
    _leave_tree(c, partner)
    rmap_set_state(&c.rmap, partner, PAGE_VOLATILE)
    batch_add(
        &c.b, INTENT_MERGE, partner_no, partner, slot + <uint32_t>(partner_no % n_wanted),
        home.flags, True
    )
    batch_add(&c.b, INTENT_MERGE, page_no, item, slot + <uint32_t>(page_no % n_wanted), region.flags, True)


cdef void _settle_items(engine_core* c, size_t n_look, sys_error* err) noexcept nogil:
    """Give every page that is looked at an item that is in no tree and no sharer; 0 without memory.

    All of them before the first is matched: a slot may lose its last sharer here and be released, and
    no intent may lead to a slot that is. c.flags[i] tells from here on also what page i was.
    """
    cdef size_t i
    cdef uint32_t item
    for i in range(n_look):
        item = c.items[i]
        if item == 0:
            c.items[i] = rmap_add(&c.rmap, <uintptr_t>c.pages[i] // c.page_bytes, err)
            c.flags[i] |= IS_NEW
        elif c.rmap.tags[item].state == PAGE_SHARED:
            c.counters.cow_breaks += 1
            c.flags[i] |= WAS_BROKEN
            drop_sharer(&c.b, item)
        elif c.rmap.tags[item].state == PAGE_ZERO:
            c.flags[i] |= WAS_BROKEN
            rmap_set_state(&c.rmap, item, PAGE_VOLATILE)
        else:
            _leave_tree(c, item)
        if c.items[i] != 0:
            c.rmap.tags[c.items[i]].huge = c.flags[i] & IS_HUGE != 0


cdef void _match(
    engine_core* c, const region_t* region, size_t i, size_t n_look, bint goes_on, bint immediate
) noexcept nogil:
    """One page that needs a look: wait, merge, or stand in the unstable tree. `goes_on`: it is known to equal
    the shared page of its stretch."""
    cdef const uint8_t* page = c.pages[i]
    cdef uint32_t digest = c.digests[i]
    cdef uint64_t page_no = <uintptr_t>page // c.page_bytes
    cdef uint32_t n_wanted = stretch_copies(c, i, n_look)
    cdef uint32_t item = c.items[i], slot, first = c.stretch_slot if goes_on else 0
    cdef rb_place place
    cdef bint unchanged
    if item == 0:
        return
    unchanged = not c.flags[i] & (IS_NEW | WAS_BROKEN) and c.rmap.nodes[item].digest == digest
    if not unchanged and not c.flags[i] & IS_NEW and not immediate:
        _wait(c, item, digest)
        return
    c.rmap.nodes[item].digest = digest
    slot = _match_stable(c, page, digest, page_no, n_wanted, &first, &place)
    if slot != 0:
        # A broken share that became equal to the slot still under it needs no new mapping.
        batch_add(
            &c.b, INTENT_RESHARE if c.rmap.tags[item].over_store and c.rmap.nodes[item].left == slot
            else INTENT_MERGE, page_no, item, slot, region.flags, False
        )
    elif not unchanged and not immediate:
        _wait(c, item, digest)
    elif c.use_zero_pages and digest == c.zero_digest and page_is_zero(page, c.page_bytes):
        batch_add(&c.b, INTENT_ZERO, page_no, item, 0, region.flags, False)
    else:
        _match_unshared(c, region, i, n_wanted, first, place, immediate)


cdef void _leave_store(engine_core* c, const region_t* region, size_t n_look) noexcept nogil:
    """Private copies over the store that stay what they are, and equal to no other: they become plain memory
    again, whose writes can be tracked."""
    cdef size_t i
    cdef uint32_t item
    for i in range(n_look):
        item = c.items[i]
        if (
            c.flags[i] & HAS_STOOD and c.rmap.tags[item].over_store and c.rmap.tags[item].epoch == c.epoch
            and c.rmap.tags[item].state == PAGE_UNSHARED
        ):
            batch_add(
                &c.b, INTENT_PLAIN, <uintptr_t>c.pages[i] // c.page_bytes, item, 0, region.flags, False
            )


cdef int _scan_span(
    engine_core* c, region_t* region, uintptr_t addr, uintptr_t end, bint immediate, size_t* n_looked,
    sys_error* err
) noexcept nogil:
    """Take the next pages in [addr, end) of a region that need a look, SPAN_PAGES at most, all the way;
    c.survey.next tells where to go on. -1 with *err when the kernel did not answer, or when a guard could not
    be closed."""
    cdef size_t i, n_look, n_known
    cdef int rc
    # A page of a file is one of the store, unless an item over the store has lost its share of it.
    cdef bint with_files = c.rmap.n_over_store != c.rmap.n_by_state[<int>PAGE_SHARED]
    if pagemap_survey(&c.pm, addr, end, region.flags & REGION_WATCHED, with_files, &c.survey, err) != 0:
        return -1
    if immediate and _has_swapped(c):
        # Most likely the kernel is moving some pages just now; there is no next pass to wait for.
        sys_pause()
        if pagemap_survey(&c.pm, addr, end, region.flags & REGION_WATCHED, with_files, &c.survey, err) != 0:
            return -1
    c.counters.pages_scanned += (c.survey.next - addr) // c.page_bytes
    n_look = n_looked[0] = _classify(c)
    if n_look == 0:
        return 0
    c.block_slot = 0
    c.more_follows = c.survey.next < region_end(&c.regions, region)
    quiet_arm(c, region, n_look)
    n_known = stretch_go_on(c, n_look)
    checksum_safely(c.checksum, c.pages + n_known, n_look - n_known, c.page_bytes, c.digests + n_known)
    c.counters.pages_hashed += n_look - n_known
    _settle_items(c, n_look, err)
    quiet_disarm_changed(c, n_look)
    if not block_is_shared(c, c.stretch_slot, c.stretch_digest):
        n_known = 0              # the last that shared it were among these pages
    for i in range(n_look):
        forest_prefetch(&c.stable, c.digests + i, min(n_look - i, <size_t>PREFETCH))
        forest_prefetch(&c.unstable, c.digests + i, min(n_look - i, <size_t>PREFETCH))
        forest_prefetch(&c.quiet, c.digests + i, min(n_look - i, <size_t>PREFETCH))
        _match(c, region, i, n_look, i < n_known, immediate)
    quiet_disarm_others(c, n_look)
    if not immediate:
        _leave_store(c, region, n_look)
    error_clear(&c.b.err)
    rc = batch_flush(&c.b)
    if rc != 0:
        err[0] = c.b.err
    return rc


cdef bint _has_swapped(const engine_core* c) noexcept nogil:
    cdef size_t k
    for k in range(c.survey.n_ranges):
        if c.survey.ranges[k].flags == PAGE_SWAPPED:
            return True
    return False


cdef int core_scan_at(
    engine_core* c, uintptr_t* cursor, uintptr_t end, bint immediate, size_t* n_pages, sys_error* err
) noexcept nogil:
    """One step of a walk: the next pages from *cursor on that need a look, SPAN_PAGES at most, or all of
    a region that is passed over. Moves *cursor on, to `end` when there is nothing left, and adds to
    *n_pages what it cost, in pages that are looked at. Fails as _scan_span does."""
    cdef region_t* region = regions_at(&c.regions, cursor[0])
    cdef uintptr_t from_here, to_here
    cdef size_t n, n_looked = 0
    cdef int rc = 0
    if region == NULL or region.addr >= end:
        cursor[0] = end
        return 0
    from_here = max(cursor[0], region.addr)
    to_here = min(region_end(&c.regions, region), end)
    n = (to_here - from_here) // c.page_bytes
    cursor[0] = to_here
    if n == 0:
        cursor[0] = end
    elif region.n_holds != 0:
        c.counters.skips[<int>SKIP_HELD] += n
    elif region.altered:
        c.counters.skips[<int>SKIP_ALTERED] += n
    else:
        n = min(n, <size_t>SURVEY_PAGES)
        cursor[0] = from_here + n * c.page_bytes
        rc = _scan_span(c, region, from_here, cursor[0], immediate, &n_looked, err)
        if rc == 0:
            cursor[0] = c.survey.next
            n = n_looked + (cursor[0] - from_here) // c.page_bytes // WALKED_PER_LOOK
    n_pages[0] += n
    return rc
