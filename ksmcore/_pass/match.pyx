"""Matching: what becomes of a page that was looked at, by the trees and by what is known of it.

Nothing is merged here: what is to be merged becomes an intent of the batch. Whoever has the checksum of a shared page,
or of zeros, is taken to have its bytes, since the guard compares them anyway: a wrong guess costs a window that fails,
and from then on the page is doubted, and compared with what is found. So such a page is read twice until it is merged:
for its checksum, and under the guard. Two that are to become a new shared page are compared with each other before.
"""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t, uintptr_t

from ksmcore._kernel.pagemap cimport SPAN_PAGES
from ksmcore._kernel.syscalls cimport sys_error
from ksmcore._pages cimport page_compare, page_is_zero
from ksmcore._pass.batch cimport (
    INTENT_MERGE, INTENT_PLAIN, INTENT_RESHARE, INTENT_ZERO, batch_add, batch_drop_sharer, batch_lie_over,
    batch_no_room, batch_set_aside, batch_sharers, batch_stable_page, pending_block,
)
from ksmcore._pass.blocks cimport blocks_new
from ksmcore._pass.quiet cimport quiet_disarm_item, quiet_is_still
from ksmcore._pass.state cimport HAS_STOOD, IS_ARMED, IS_HUGE, IS_NEW, WAS_BROKEN, engine_core, state_page_of
from ksmcore._pass.stretch cimport stretch_follow
from ksmcore._records.forest cimport forest_erase, forest_find, forest_insert, forest_next, forest_put
from ksmcore._records.regions cimport NOT_BARRED, region_t, regions_at
from ksmcore._records.rmap cimport (
    PAGE_SHARED, PAGE_UNSHARED, PAGE_VOLATILE, PAGE_ZERO, rmap_add, rmap_find, rmap_remove, rmap_set_left_out,
    rmap_set_state, rmap_slot,
)
from ksmcore._records.store cimport store_align, store_block, store_is_shared_block, store_page
from ksmcore._trees cimport rb_place

cdef enum:
    LONG_REST = 32             # pages of a stretch that are worth a block of their own where the other is full
    OLDEST = 7                 # what rmap_tag.age can hold


# ---- items ----------------------------------------------------------------------------------

cdef void match_leave_tree(engine_core* c, uint32_t item) noexcept nogil:
    """Take an item out of the unstable or the quiet tree if it stands there. Its links are void in any case."""
    if c.rmap.tags[item].state != PAGE_UNSHARED:
        return
    if c.rmap.tags[item].quiet:
        forest_erase(&c.quiet, item)
        c.rmap.tags[item].quiet = 0
    elif c.rmap.tags[item].epoch == c.epoch:
        forest_erase(&c.unstable, item)
    c.rmap.tags[item].epoch = 0


cdef void match_forget_item(engine_core* c, uint32_t item) noexcept nogil:
    """Drop all that is known of a page, its share included; not its mapping."""
    if c.rmap.tags[item].state == PAGE_SHARED:
        batch_drop_sharer(&c.b, item)
    match_leave_tree(c, item)
    batch_lie_over(&c.b, item, 0)
    rmap_remove(&c.rmap, item)


cdef void _wait(engine_core* c, uint32_t item, uint32_t digest) noexcept nogil:
    """The page is volatile until the next pass shows the same checksum."""
    c.rmap.tags[item].age = 0
    c.rmap.nodes[item].digest = digest
    rmap_set_state(&c.rmap, item, PAGE_VOLATILE)


# ---- searching --------------------------------------------------------------------------------

cdef inline const uint8_t* _bytes_to_compare(const engine_core* c, uint32_t item, const uint8_t* page) noexcept nogil:
    """What searches for this page compare beside its checksum; NULL: nothing."""
    return page if c.by_content or c.rmap.tags[item].doubted else NULL


cdef inline bint _are_equal(const engine_core* c, const uint8_t* compared, const uint8_t* other) noexcept nogil:
    """Of two pages with one checksum. `compared`: see _bytes_to_compare."""
    return compared == NULL or page_compare(compared, other, c.page_bytes) == 0


cdef uint32_t _new_block(
    engine_core* c, uint32_t* n_copies, uint32_t least, const uint8_t* source, uint32_t digest
) noexcept nogil:
    """A pending block of *n_copies slots, or of what the limit leaves if that is `least`; or 0, with the
    reason counted if a single slot would have done (else the page has another shared page to join)."""
    cdef uint32_t slot
    cdef int64_t room
    if c.max_shared_pages >= 0:
        room = c.max_shared_pages - <int64_t>(
            c.store.n_used - c.store.n_dead - c.store.n_hollow - c.store.n_idle
        )
        if room < <int64_t>least:
            c.counters.skipped.max_shared_pages += least == 1
            return 0
        n_copies[0] = <uint32_t>min(<int64_t>n_copies[0], room)
    slot = blocks_new(&c.b, n_copies[0], source, digest, least > 1 and c.stretch.end_unseen)
    if slot == 0:
        batch_no_room(&c.b, c.b.refusal)[0] += least == 1
    return slot


cdef uint32_t _next_in_store(engine_core* c, uint32_t digest, const uint8_t* compared) noexcept nogil:
    """The shared page behind that of the last match, if this page equals it and may map it; or 0."""
    cdef uint32_t slot = c.stretch.next_slot
    if (
        store_is_shared_block(&c.store, slot, digest)
        and _are_equal(c, compared, store_page(&c.store, slot))
        and batch_sharers(&c.b, slot) < c.max_page_sharing
    ):
        return slot
    return 0


cdef uint32_t _match_stable(
    engine_core* c, const uint8_t* page, const uint8_t* compared, uint32_t digest, uint32_t n_wanted,
    uint32_t* first, rb_place* place
) noexcept nogil:
    """The slot that this page should map, or 0 when no more pages can map an equal one.

    *first: the first shared page that is equal, full or not, if it is known; then it is not searched for. Set
    to 0 when there is none, and then *place is where one belongs.

    Within a block the page number chooses the copy, so that neighbours in a
    stretch of equal pages map neighbouring slots. A stretch that has outgrown its block, or filled it, gets a
    further one, which is found first from then on.
    """
    cdef uint32_t n_copies, larger, slot
    cdef uint64_t page_no = <uintptr_t>page // c.page_bytes, left
    cdef bint is_full
    if first[0] == 0:
        first[0] = forest_find(&c.stable, digest, compared, place)
    if first[0] == 0:
        return 0
    if first[0] != c.stretch.block_slot:
        c.stretch.block_slot = first[0]
        store_block(&c.store, first[0], &c.stretch.block_copies)
    n_copies = c.stretch.block_copies
    slot = first[0] + <uint32_t>(page_no % n_copies)
    is_full = batch_sharers(&c.b, slot) >= c.max_page_sharing
    left = c.stretch.end - page_no
    if (n_wanted >= 2 * n_copies and left >= n_wanted) or (is_full and left >= <uint64_t>LONG_REST):
        larger = _new_block(c, &n_wanted, 1 if is_full else 2 * n_copies, page, digest)
        if larger != 0:
            forest_put(&c.stable, larger, compared)
            first[0] = larger
            c.stretch.block_slot = larger
            c.stretch.block_copies = n_copies = n_wanted
            slot = first[0] + <uint32_t>(page_no % n_copies)
            is_full = False
    c.stretch.slot = first[0]
    c.stretch.next_slot = first[0] + n_copies
    return _with_room(c, digest, compared) if is_full else slot


cdef bint _is_equal(engine_core* c, uint32_t first, uint32_t digest, const uint8_t* compared) noexcept nogil:
    """Has this node of the stable tree, if any, the bytes of the page?"""
    if first == 0 or c.store.nodes[first].digest != digest:
        return False
    c.stable.one.n_compares += compared != NULL
    return _are_equal(c, compared, batch_stable_page(&c.b, first))


cdef uint32_t _with_room(engine_core* c, uint32_t digest, const uint8_t* compared) noexcept nogil:
    """A slot of any block equal to this page that takes one more sharer, or 0.

    Equal blocks stand next to each other in the stable tree, the newest first. Each that is found full is set
    aside until a sharer leaves it, but for the last, which tells later searches that there are such. So however
    many there are, each is looked at once for every time that it was filled.
    """
    cdef uint32_t first = forest_find(&c.stable, digest, compared, NULL), n_copies, i, following
    while first != 0:
        store_block(&c.store, first, &n_copies)
        for i in range(n_copies):
            if batch_sharers(&c.b, first + i) < c.max_page_sharing:
                return first + i
        following = forest_next(&c.stable, first)
        if not _is_equal(c, following, digest, compared):
            return 0
        batch_set_aside(&c.b, first)
        first = following
    return 0


cdef uint32_t _beside(engine_core* c, uint64_t page_no, uint32_t digest) noexcept nogil:
    """The item as far from this page as the last partner was from its own, where a stretch of pages may come again:
    if it waits for a partner, and has the same checksum. Else 0."""
    cdef uint32_t item
    if c.stretch.n_further == 0:
        return 0
    item = rmap_find(&c.rmap, page_no + c.stretch.n_further, c.stretch.beside)
    c.stretch.beside = item
    if item == 0 or c.rmap.tags[item].state != PAGE_UNSHARED or c.rmap.nodes[item].digest != digest:
        return 0
    return item


cdef uint32_t _left_out_beside(engine_core* c, uint64_t page_no, uint32_t digest, const uint8_t* page) noexcept nogil:
    """An equal page that goes on the run which this page is in, and which the map budget left out; or 0.

    Both together are no new mapping, where to join the shared page that is there would be two for either. So a long
    stretch that comes again stays one run, whatever of it is found elsewhere, too."""
    cdef uint32_t item = _beside(c, page_no, digest)
    cdef const region_t* home
    if item == 0 or not c.rmap.tags[item].left_out:
        return 0
    home = regions_at(&c.regions, <uintptr_t>state_page_of(c, item))
    if home.altered or home.bar != NOT_BARRED or home.being_made or home.n_holds != 0:
        return 0
    return item if page_compare(page, state_page_of(c, item), c.page_bytes) == 0 else 0


cdef uint32_t _partner(
    engine_core* c, uint32_t item, const uint8_t* page, uint32_t digest, bint may_be_quiet, bint immediate
) noexcept nogil:
    """An equal page of the quiet or the unstable tree, or 0: then this page stands there itself. Where a
    stretch of pages comes again, the next partner is beside the last one.

    Here bytes are compared in any case: a wrong guess would have the partner mapped to a new shared page and brought
    back, which leaves pieces, and of n different pages some n * n / 2**33 pairs have one checksum."""
    cdef uint64_t page_no = <uintptr_t>page // c.page_bytes
    cdef rb_place place, quiet_place
    cdef uint32_t partner, written = 0
    if c.quiet.n_nodes != 0 or may_be_quiet:
        partner = forest_find(&c.quiet, digest, page, &quiet_place)
        if partner != 0 and (immediate or quiet_is_still(c, partner)):
            return partner
        # One that was written has its turn still to come. It may have been written with the same bytes.
        written = partner
    partner = _beside(c, page_no, digest)
    if (
        partner == 0 or c.rmap.tags[partner].epoch != c.epoch
        or page_compare(page, state_page_of(c, partner), c.page_bytes) != 0
    ):
        partner = forest_find(&c.unstable, digest, page, &place)
    if partner != 0:
        c.stretch.beside = partner
        c.stretch.n_further = c.rmap.tags[partner].page_no - page_no
        return partner
    rmap_set_state(&c.rmap, item, PAGE_UNSHARED)
    if c.rmap.tags[item].age < <uint32_t>OLDEST:
        c.rmap.tags[item].age += 1
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

    The new one goes to stable_place, or before its equals in the tree where `full` is one that takes no more
    sharers."""
    cdef uint32_t partner = _partner(
        c, c.items[i], c.pages[i], c.digests[i], c.marks[i] & IS_ARMED != 0, immediate
    )
    if partner != 0:
        _found(c, region, i, partner, n_wanted, full != 0, stable_place)
    else:
        c.counters.skipped.max_page_sharing += full != 0


cdef const uint8_t* _source(const engine_core* c, uint64_t page_no, uint64_t partner_no) noexcept nogil:
    """Which of two equal pages a new shared page is written from: long pieces are written together, so that which goes
    on the last piece. If neither does, or both, the one that was looked at just now, and may be in a cache."""
    cdef const pending_block* last
    cdef uint64_t next_no
    if c.b.n_pendings != 0:
        last = &c.b.pendings[c.b.n_pendings - 1]
        next_no = <uintptr_t>last.source // c.page_bytes + 1
        if last.n_copies == 1 and next_no == partner_no and next_no != page_no:
            page_no = partner_no
    return <const uint8_t*><uintptr_t>(page_no * c.page_bytes)


cdef void _found(
    engine_core* c, const region_t* region, size_t i, uint32_t partner, uint32_t n_wanted, bint has_equals,
    rb_place stable_place
) noexcept nogil:
    """Have page i and an equal one become a new shared page. `has_equals`: there are such already, else it belongs to
    that place of the stable tree."""
    cdef uint32_t item = c.items[i], digest = c.digests[i], slot
    cdef uint64_t page_no = <uintptr_t>c.pages[i] // c.page_bytes, partner_no
    cdef const region_t* home
    partner_no = c.rmap.tags[partner].page_no
    home = regions_at(&c.regions, <uintptr_t>(partner_no * c.page_bytes))
    if home.n_holds != 0:
        c.counters.skipped.held += 1
        rmap_set_state(&c.rmap, item, PAGE_UNSHARED)
        return
    if (
        c.marks[i] & IS_HUGE and c.rmap.tags[partner].huge
        and page_no % SPAN_PAGES == partner_no % SPAN_PAGES == 0
    ):
        store_align(&c.store, SPAN_PAGES)
    slot = _new_block(c, &n_wanted, 1, _source(c, page_no, partner_no), digest)
    if slot == 0:
        rmap_set_state(&c.rmap, item, PAGE_UNSHARED)
        return
    if has_equals:
        forest_put(&c.stable, slot, _bytes_to_compare(c, item, c.pages[i]))
    else:
        forest_insert(&c.stable, slot, stable_place)
        c.b.pendings[c.b.n_pendings - 1].alone = stable_place.alone
    if c.rmap.tags[partner].quiet:
        quiet_disarm_item(c, partner)    # if it is not merged after all it must be looked at again
    match_leave_tree(c, partner)
    rmap_set_state(&c.rmap, partner, PAGE_VOLATILE)
    batch_add(
        &c.b, INTENT_MERGE, partner_no, partner, slot + <uint32_t>(partner_no % n_wanted),
        home.flags, True
    )
    batch_add(&c.b, INTENT_MERGE, page_no, item, slot + <uint32_t>(page_no % n_wanted), region.flags, True)
    c.merges_left -= 1


cdef void match_trust_changed(engine_core* c, size_t n_look) noexcept nogil:
    """A page with another checksum than before is doubted no more."""
    cdef size_t i
    for i in range(n_look):
        if c.items[i] != 0 and c.rmap.nodes[c.items[i]].digest != c.digests[i]:
            c.rmap.tags[c.items[i]].doubted = 0


cdef void match_prepare(engine_core* c, region_t* region, size_t n_look, sys_error* err) noexcept nogil:
    """Give every page that is looked at an item that is in no tree and no sharer; 0 without memory. c.marks[i] tells
    from here on also what page i was."""
    cdef size_t i
    cdef uint32_t item
    for i in range(n_look):
        item = c.items[i]
        if item == 0:
            c.items[i] = rmap_add(&c.rmap, <uintptr_t>c.pages[i] // c.page_bytes, err)
            c.marks[i] |= IS_NEW
        elif c.rmap.tags[item].state == PAGE_SHARED:
            c.counters.cow_breaks += 1
            region.cow_breaks += 1
            c.marks[i] |= WAS_BROKEN
            batch_drop_sharer(&c.b, item)
        elif c.rmap.tags[item].state == PAGE_ZERO:
            c.marks[i] |= WAS_BROKEN
            rmap_set_state(&c.rmap, item, PAGE_VOLATILE)
        else:
            match_leave_tree(c, item)
        if c.items[i] != 0:
            c.rmap.tags[c.items[i]].huge = c.marks[i] & IS_HUGE != 0
            rmap_set_left_out(&c.rmap, c.items[i], False)
    match_trust_changed(c, n_look)


cdef void match_page(
    engine_core* c, const region_t* region, size_t i, size_t n_look, bint immediate
) noexcept nogil:
    """One page that needs a look: wait, merge, or stand in the unstable tree."""
    cdef const uint8_t* page = c.pages[i]
    cdef uint32_t digest = c.digests[i]
    cdef uint64_t page_no = <uintptr_t>page // c.page_bytes
    cdef uint32_t n_wanted = stretch_follow(c, i, n_look)
    cdef uint32_t item = c.items[i], slot, partner, first
    cdef const uint8_t* compared
    cdef rb_place place
    cdef bint unchanged
    if item == 0:
        return
    compared = _bytes_to_compare(c, item, page)
    unchanged = not c.marks[i] & (IS_NEW | WAS_BROKEN) and c.rmap.nodes[item].digest == digest
    if not unchanged and not c.marks[i] & IS_NEW and not immediate:
        _wait(c, item, digest)
        return
    c.rmap.nodes[item].digest = digest
    first = c.stretch.slot if compared == NULL else 0
    if first == 0:
        # Where a stretch of different pages comes again, its shared pages follow each other in the store.
        first = _next_in_store(c, digest, compared)
    if first == 0 and n_wanted == 1 and (unchanged or immediate) and c.counters.skipped.map_budget != 0:
        partner = _left_out_beside(c, page_no, digest, page)
        if partner != 0:
            _found(c, region, i, partner, n_wanted, True, place)
            return
    slot = _match_stable(c, page, compared, digest, n_wanted, &first, &place)
    if slot != 0:
        # A broken share that became equal to the slot still under it needs no new mapping.
        batch_add(
            &c.b, INTENT_RESHARE if c.rmap.tags[item].over_store and rmap_slot(&c.rmap, item) == slot
            else INTENT_MERGE, page_no, item, slot, region.flags, False
        )
        c.merges_left -= 1
    elif not unchanged and not immediate:
        _wait(c, item, digest)
    elif (
        c.use_zero_pages and digest == c.zero_digest and (compared == NULL or page_is_zero(page, c.page_bytes))
    ):
        batch_add(&c.b, INTENT_ZERO, page_no, item, 0, region.flags, False)
        c.merges_left -= 1
    else:
        _match_unshared(c, region, i, n_wanted, first, place, immediate)


cdef void match_leave_store(engine_core* c, const region_t* region, size_t n_look) noexcept nogil:
    """Private copies over the store that stay what they are, and equal to no other: they become plain memory
    again, whose writes can be tracked."""
    cdef size_t i
    cdef uint32_t item
    for i in range(n_look):
        item = c.items[i]
        if (
            c.marks[i] & HAS_STOOD and c.rmap.tags[item].over_store and c.rmap.tags[item].epoch == c.epoch
            and c.rmap.tags[item].state == PAGE_UNSHARED
        ):
            batch_add(
                &c.b, INTENT_PLAIN, <uintptr_t>c.pages[i] // c.page_bytes, item, 0, region.flags, False
            )
