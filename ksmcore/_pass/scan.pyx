"""The pass: the one place that knows the whole path of a page.

    which pages are present, written, still shared   pagemap_survey, _classify
    -> protection, if they seem to be quiet          quiet_arm
    -> checksum                                      core.checksum
    -> rmap item                                     match_prepare
    -> stable, quiet, unstable tree, intent          match_page
    -> runs, and which of them the map budget allows runs_choose
    -> what the program has advised                  look_at_intents
    -> guard, store, account                         runs_carry_out

A span, what one survey answers, goes through each stage before the next stage begins, and the lock is held that long.
Nothing here needs the GIL; the caller holds the engine's lock.

What becomes of a page, in the order of the questions asked (rules of design section 2):
  - not present: passed over. What was known of it is forgotten, unless its mapping is of the store.
  - still shared, or still the zero page: nothing to do.
  - its sharing was broken by a write: the membership is forgotten, and the page waits for the next pass.
  - changed since the last pass: volatile, waits. So no window is ever opened on a page that changed.
  - equal to a shared page: an intent to merge with that. A page seen for the first time as well.
  - all zero: an intent to give it back.
  - unchanged and equal to another such page: both are to be merged into a new shared page.
  - else it stands in the unstable tree for the rest of the pass.
A page that stood there, and still did not change, moves to the quiet tree (see quiet); a private copy over
the store becomes plain memory first.

`immediate` (dedup) leaves the waiting out. `patient` (the background scanner) leaves alone what is free, or young: most
of that is written, or gone, before a second look could have come. Only what such memory was merged with before is
forgotten once it was written.

With smart_scan, pages that were looked at in vain again and again are looked at less often, down to every eighth
pass. Whatever their ages, the passes in which they are looked at fall together every eighth time, and then they
all meet. So do the pages that the map budget left out, while it has no more room: one of them may be part of a long
run by then.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t, uintptr_t
from libc.string cimport memset

from ksmcore._kernel.pagemap cimport (
    PAGE_HUGE, PAGE_OF_FILE, PAGE_OWNED, PAGE_PRESENT, PAGE_SWAPPED, PAGE_UNSURE, SPAN_PAGES, page_range,
    pagemap_survey,
)
from ksmcore._kernel.pool cimport pool_finish, pool_hand_out, pool_has_threads
from ksmcore._kernel.reader cimport ksm_reader
from ksmcore._kernel.syscalls cimport sys_error, sys_error_clear, sys_now_ns, sys_pause
from ksmcore._pages cimport checksum_safely, checksum_with, page_compare, page_is_zero
from ksmcore._pass.batch cimport batch_adopt, batch_end_stage
from ksmcore._pass.look cimport look_at_intents, look_at_room
from ksmcore._pass.match cimport (
    match_forget_item, match_leave_store, match_leave_tree, match_page, match_prepare, match_trust_changed,
)
from ksmcore._pass.quiet cimport quiet_after_flush, quiet_arm, quiet_disarm_changed, quiet_disarm_others
from ksmcore._pass.runs cimport runs_carry_out, runs_choose
from ksmcore._pass.state cimport IS_HUGE, IS_NEW, engine_core, state_page_of, stretch_t
from ksmcore._pass.still cimport WALKED_PER_LOOK, still_note_survey, still_pass_over
from ksmcore._pass.stretch cimport stretch_begin_span, stretch_guess
from ksmcore._records.forest cimport forest_prefetch
from ksmcore._records.ranges cimport ranges_at
from ksmcore._records.regions cimport (
    BARRED_ALTERED, BARRED_WATCHED, REGION_WATCHED, region_t, regions_at, regions_end_of,
)
from ksmcore._records.rmap cimport (
    PAGE_SHARED, PAGE_UNSHARED, PAGE_VOLATILE, PAGE_ZERO, rmap_find, rmap_has_copies, rmap_set_state, rmap_slot,
    rmap_step, rmap_walk, rmap_walk_over,
)
from ksmcore._records.store cimport store_page

cdef enum:
    PREFETCH = 16              # pages that searches are prepared for ahead
    STEP_PAGES = 16384       # that are passed over at once when none needs a look: the lock is held meanwhile
    YOUNG = 3                  # pages of a lower age are looked at in every pass
    HASH_PAGES = 32            # that one thread takes at once: some microseconds
    PAGES_TO_SHARE = 128       # that are worth waking another thread


# ---- stage 1: which pages need a look -----------------------------------------------------------

cdef bint _rests(engine_core* c, uint32_t item) noexcept nogil:
    """smart_scan: has this page found no partner so often that it is passed over in this pass? Every second one
    from age 3 on, three of four from 5, seven of eight from 7; a change or a merge makes it young again."""
    cdef uint32_t age = c.rmap.tags[item].age
    return (
        age >= <uint32_t>YOUNG and c.rmap.tags[item].state == PAGE_UNSHARED and not c.rmap.tags[item].quiet
        and c.counters.full_scans % (<uint64_t>1 << ((age - 1) // 2)) != 0
    )


cdef uint64_t* _reason_to_rest(engine_core* c, uint32_t item) noexcept nogil:
    """Why a page that could be looked at is not, as a field of the counters; or NULL."""
    if c.rmap.tags[item].left_out:
        if c.left_out_rests:
            return &c.counters.skipped.map_budget
    elif c.smart_scan and _rests(c, item):
        return &c.counters.skipped.smart_scan
    return NULL


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
        return page_compare(page, store_page(&c.store, rmap_slot(&c.rmap, item)), c.page_bytes) != 0
    if c.rmap.tags[item].state == PAGE_ZERO:
        return flag & PAGE_OWNED or not page_is_zero(page, c.page_bytes)
    return not flag & PAGE_OF_FILE or not _adopt(c, item)


cdef bint _adopt(engine_core* c, uint32_t item) noexcept nogil:
    """A page over the store that was taken for a private copy, and is none: the program has thrown the copy away, or
    has moved another mapping of the same slot there."""
    match_leave_tree(c, item)
    if batch_adopt(&c.b, item):
        return True
    rmap_set_state(&c.rmap, item, PAGE_VOLATILE)
    return False


cdef bint _is_left_alone(
    engine_core* c, uint32_t item, const uint8_t* page, uintptr_t* until, int* answer
) noexcept nogil:
    """Is this page unsettled, and not known as merged? *answer holds before *until; pages come by address."""
    if <uintptr_t>page >= until[0]:
        answer[0] = ranges_at(&c.unsettled, <uintptr_t>page, until)
    return answer[0] != 0 and (item == 0 or c.rmap.tags[item].state not in (PAGE_SHARED, PAGE_ZERO))


cdef size_t _classify(engine_core* c, bint immediate, bint patient, size_t most) noexcept nogil:
    """Fill c.items, c.pages and c.marks with the pages of the survey that need a look; returns how many. Where
    there are more than `most`, the survey ends before the next one."""
    cdef uint32_t item = 0, hint = 0
    cdef uintptr_t until = 0
    cdef int is_unsettled = 0
    cdef const page_range* there
    cdef const uint8_t* page
    cdef size_t k, i, n_gone, n_look = 0
    cdef uint64_t* reason
    for k in range(c.survey.n_ranges):
        there = &c.survey.ranges[k]
        if not there.flags & PAGE_PRESENT:
            n_gone = _absent_range(c, there)
            c.counters.pages_scanned -= n_gone
            c.counters.skipped.away += n_gone if there.flags == PAGE_SWAPPED else 0
            if n_gone < there.n_pages:
                c.survey.next = there.addr + n_gone * c.page_bytes
                return n_look
            continue
        for i in range(there.n_pages):
            page = <const uint8_t*>(there.addr + i * c.page_bytes)
            if n_look == most:
                c.survey.next = <uintptr_t>page
                return n_look
            item = rmap_find(&c.rmap, <uintptr_t>page // c.page_bytes, hint)
            if item != 0:
                hint = item
            if patient and _is_left_alone(c, item, page, &until, &is_unsettled):
                c.counters.skipped.young += 1
                continue
            if not _wants_look(c, item, page, there.flags):
                continue
            reason = NULL if immediate or item == 0 else _reason_to_rest(c, item)
            if reason != NULL:
                reason[0] += 1
                continue
            c.items[n_look] = item
            c.pages[n_look] = page
            c.marks[n_look] = IS_HUGE if there.flags & PAGE_HUGE else 0
            n_look += 1
    return n_look


cdef size_t _absent_range(engine_core* c, const page_range* gone) noexcept nogil:
    """How many of these pages, from the first on, it has seen to: a hole may reach far, but so may what is merged there
    and was not read since."""
    cdef rmap_walk walk = rmap_walk_over(gone.addr // c.page_bytes, gone.n_pages)
    cdef size_t n_tracked = 0
    while n_tracked < <size_t>STEP_PAGES and rmap_step(&c.rmap, &walk):
        _absent(c, walk.item, gone.flags)
        n_tracked += 1
    return walk.next_no - gone.addr // c.page_bytes


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
    if c.rmap.tags[item].over_store and flag & PAGE_SWAPPED:
        # Kept, so that the mapping can be put right when the region is removed.
        match_leave_tree(c, item)
        rmap_set_state(&c.rmap, item, PAGE_VOLATILE)
    elif c.rmap.tags[item].over_store:
        _adopt(c, item)
    else:
        match_forget_item(c, item)


# ---- stage 2: checksums -------------------------------------------------------------------------

cdef void _hash_piece(void* context, uint32_t piece, ksm_reader* reader) noexcept nogil:
    """A pool_work."""
    cdef engine_core* c = <engine_core*>context
    cdef size_t done = piece * <size_t>HASH_PAGES
    cdef size_t start = c.hashing_from + done
    checksum_with(
        reader, c.checksum, c.pages + start, min(<size_t>HASH_PAGES, c.n_hashing - done), c.page_bytes,
        c.digests + start
    )


cdef void _hash(engine_core* c, size_t start, size_t n_look) noexcept nogil:
    """Fill c.digests for c.pages, from `start` on."""
    cdef size_t n = n_look - start
    cdef uint32_t n_pieces = <uint32_t>((n + HASH_PAGES - 1) // HASH_PAGES)
    c.counters.pages_hashed += n
    if n < <size_t>PAGES_TO_SHARE or not pool_has_threads(c.pool):
        checksum_safely(c.checksum, c.pages + start, n, c.page_bytes, c.digests + start)
        return
    c.hashing_from = start
    c.n_hashing = n
    c.hashing.work = _hash_piece
    c.hashing.context = c
    pool_hand_out(c.pool, &c.hashing, n_pieces)
    pool_finish(c.pool, &c.hashing, n_pieces)


# ---- the stages, one after the other ------------------------------------------------------------

cdef int _scan_span(
    engine_core* c, region_t* region, uintptr_t addr, uintptr_t end, uintptr_t limit, bint immediate, bint patient,
    size_t* n_looked, sys_error* err
) noexcept nogil:
    """Take the next pages in [addr, end) of a region that need a look, SPAN_PAGES at most, all the way;
    c.survey.next tells where to go on, at `limit` at most, where there is a hole. -1 with *err when the kernel did
    not answer, or when a guard could not be closed."""
    cdef size_t i, n_look
    cdef int rc
    cdef uint64_t begun = sys_now_ns()
    # Else a page of a file is one of the store.
    cdef bint with_files = rmap_has_copies(&c.rmap)
    if pagemap_survey(&c.pm, addr, end, limit, region.flags & REGION_WATCHED, with_files, &c.survey, err) != 0:
        return -1
    if immediate and _has_swapped(c):
        # Most likely the kernel is moving some pages just now; there is no next pass to wait for.
        sys_pause()
        if pagemap_survey(&c.pm, addr, end, limit, region.flags & REGION_WATCHED, with_files, &c.survey, err) != 0:
            return -1
    n_look = n_looked[0] = _classify(
        c, immediate, patient, <size_t>min(<uint64_t>SPAN_PAGES, c.merges_left)
    )
    c.counters.pages_scanned += (c.survey.next - addr) // c.page_bytes
    if n_look == 0:
        batch_end_stage(&c.counters.stage_ns.pagemap, begun)
        return 0
    c.stretch.more_follows = c.survey.next < regions_end_of(&c.regions, region)
    quiet_arm(c, region, n_look)
    begun = batch_end_stage(&c.counters.stage_ns.pagemap, begun)
    _hash(c, stretch_guess(c, n_look), n_look)
    begun = batch_end_stage(&c.counters.stage_ns.checksum, begun)
    match_prepare(c, region, n_look, err)
    quiet_disarm_changed(c, n_look)
    stretch_begin_span(c)
    for i in range(n_look):
        forest_prefetch(&c.stable, c.digests + i, min(n_look - i, <size_t>PREFETCH))
        forest_prefetch(&c.unstable, c.digests + i, min(n_look - i, <size_t>PREFETCH))
        forest_prefetch(&c.quiet, c.digests + i, min(n_look - i, <size_t>PREFETCH))
        match_page(c, region, i, n_look, immediate)
    quiet_disarm_others(c, n_look)
    if not immediate:
        match_leave_store(c, region, n_look)
    batch_end_stage(&c.counters.stage_ns.trees, begun)
    sys_error_clear(&c.b.err)
    rc = _flush(c)
    if rc == 0 and c.b.n_doubted != 0:
        rc = _look_closer(c, n_look, immediate)
    quiet_after_flush(c)
    if rc != 0:
        err[0] = c.b.err
    return rc


cdef int _flush(engine_core* c) noexcept nogil:
    """Carry out the intents that are worth it. First what is worth it: where that is nothing, nobody need know what was
    advised, which may take longer than all else."""
    if c.b.n_intents != 0:
        look_at_room(c)
    runs_choose(&c.b)
    look_at_intents(c)
    return runs_carry_out(&c.b)


cdef uint8_t _was_new(const engine_core* c, uint32_t item, size_t n_look) noexcept nogil:
    """IS_NEW if this page was seen for the first time, in this span; else 0."""
    cdef size_t i
    for i in range(n_look):
        if c.items[i] == item:
            return c.marks[i] & IS_NEW
    return 0


cdef int _look_closer(engine_core* c, size_t n_look, bint immediate) noexcept nogil:
    """Pages that came to be doubted just now are matched once more, by their bytes: there may be no next pass."""
    cdef stretch_t stretch = c.stretch
    cdef const region_t* region
    cdef uint8_t marks[<int>SPAN_PAGES]
    cdef size_t i, n = min(<uint64_t>min(c.b.n_doubted, <uint32_t>SPAN_PAGES), c.merges_left)
    cdef int rc
    for i in range(n):
        marks[i] = _was_new(c, c.b.doubted[i], n_look)
    for i in range(n):
        c.items[i] = c.b.doubted[i]
        c.pages[i] = state_page_of(c, c.items[i])
        c.marks[i] = marks[i]
    _hash(c, 0, n)
    match_trust_changed(c, n)
    memset(&c.stretch, 0, sizeof(stretch_t))
    for i in range(n):
        region = regions_at(&c.regions, <uintptr_t>c.pages[i])
        match_page(c, region, i, n, immediate)
    rc = _flush(c)
    c.stretch = stretch
    # Where its pages were a guess, so might be the next ones.
    c.stretch.n_pages = 0
    return rc


cdef bint _has_swapped(const engine_core* c) noexcept nogil:
    cdef size_t k
    for k in range(c.survey.n_ranges):
        if c.survey.ranges[k].flags == PAGE_SWAPPED:
            return True
    return False


cdef bint scan_pass_over(engine_core* c, uintptr_t* cursor, uintptr_t end, size_t* n_pages) noexcept nogil:
    """One step of a walk over what nobody wrote, which needs no guard, no thread, and no look at a page. False: scan_at
    has to go on. Arguments as there."""
    cdef region_t* region = regions_at(&c.regions, cursor[0])
    if region == NULL or region.addr >= end:
        cursor[0] = end
        return False
    return still_pass_over(c, region, cursor, end, 1, n_pages)


cdef int scan_at(
    engine_core* c, uintptr_t* cursor, uintptr_t end, bint immediate, bint patient, size_t* n_pages, sys_error* err
) noexcept nogil:
    """One step of a walk: the next pages from *cursor on that need a look, SPAN_PAGES at most, or all of
    a region that is passed over, or several. Moves *cursor on, to `end` when there is nothing left, and adds to
    *n_pages what it cost, in pages that are looked at. Fails as _scan_span does."""
    cdef region_t* region = regions_at(&c.regions, cursor[0])
    cdef uintptr_t from_here, to_here
    cdef size_t n, n_looked = 0
    cdef uint64_t n_scanned = c.counters.pages_scanned
    cdef int rc = 0
    if region == NULL or region.addr >= end:
        cursor[0] = end
        return 0
    # In one region alone, all of it watched, the survey tells as much.
    if (cursor[0] <= region.addr or region.is_settled) and still_pass_over(c, region, cursor, end, 2, n_pages):
        return 0
    from_here = max(cursor[0], region.addr)
    to_here = min(regions_end_of(&c.regions, region), end)
    n = (to_here - from_here) // c.page_bytes
    cursor[0] = to_here
    if n == 0:
        cursor[0] = end
    elif region.being_made:
        pass
    elif region.n_holds != 0:
        c.counters.skipped.held += n
    elif region.altered or region.bar == BARRED_ALTERED:
        c.counters.skipped.altered += n
    elif region.bar == BARRED_WATCHED:
        c.counters.skipped.refused += n
    else:
        n = min(n, <size_t>STEP_PAGES)
        cursor[0] = from_here + n * c.page_bytes
        rc = _scan_span(c, region, from_here, cursor[0], to_here, immediate, patient, &n_looked, err)
        if rc == 0:
            cursor[0] = c.survey.next
            n = (cursor[0] - from_here) // c.page_bytes
            still_note_survey(c, region, from_here, cursor[0], n_looked, n - (c.counters.pages_scanned - n_scanned))
            n = n_looked + n // WALKED_PER_LOOK
    n_pages[0] += n
    return rc
