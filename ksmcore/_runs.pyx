"""From intents to runs: the batch of pages that are to be merged next, and how it is carried out.

Called by: _scan, _unmerge. Calls: _budget, _merge, _store, _rmap, _forest.

The scanner collects intents (this page -> that shared page). `batch_flush` sorts them by address and
cuts them into runs, pages that are neighbours both in memory and in the store, so that one mapping
serves a run. Then, in order: the map budget takes or leaves each run; shared pages that are still
wanted get their bytes; what is left, neighbours in memory together, goes through the merge protocol; what
became of each page is accounted. A shared page with fewer than two sharers at the end is undone. A batch
writes at most capacity / 2 pages to the store before it gives the merged pages back.
"""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport free, malloc, qsort

from ksmcore._budget cimport budget_affords, map_budget
from ksmcore._forest cimport forest_erase, forest_find, forest_insert, forest_insert_before, forest_t
from ksmcore._merge cimport PAGES_HUGE, REGION_WATCHED, merge_run, reshare_run, restore_range, run_t, zero_run
from ksmcore._rmap cimport (
    PAGE_SHARED, PAGE_UNSHARED, PAGE_VOLATILE, PAGE_ZERO, rmap_find, rmap_set_over_store,
    rmap_set_state,
)
from ksmcore._store cimport (
    store_alloc, store_block, store_page, store_release, store_share, store_trim,
    store_unshare, store_write,
)
from ksmcore._sys cimport error_clear, sys_error
from ksmcore._trees cimport rb_place
from ksmcore._window cimport CHANGED, DONE, PINNED

cdef enum:
    WRITE_PAGES = 256          # most pages of one write to the store: 1 MiB of 4 KiB pages
    HASH_PAGES = 64            # pages whose written copies are checked together
    UNKNOWN_SLOT = 0xffffffff  # what lies under the page is of the store, and its slot is not known

cdef enum fate:
    OPEN                       # to be carried out
    LEFT                       # not carried out; already counted
    MERGED                     # carried out


cdef int batch_init(batch* b, uint32_t capacity) noexcept nogil:
    b.capacity = capacity
    b.n_intents = b.n_pendings = 0
    error_clear(&b.err)
    b.intents = <intent*>malloc(capacity * sizeof(intent))
    b.pendings = <pending_block*>malloc((capacity // 2) * sizeof(pending_block))
    b.slots = <uint32_t*>malloc(capacity * sizeof(uint32_t))
    b.outcomes = <uint8_t*>malloc(capacity)
    if b.intents == NULL or b.pendings == NULL or b.slots == NULL or b.outcomes == NULL:
        batch_destroy(b)
        return -1
    return 0


cdef void batch_destroy(batch* b) noexcept nogil:
    free(b.intents)
    free(b.pendings)
    free(b.slots)
    free(b.outcomes)
    b.intents = NULL
    b.pendings = NULL
    b.slots = NULL
    b.outcomes = NULL


cdef const uint8_t* stable_page_of(void* owner, uint32_t slot) noexcept nogil:
    """Bytes of a stable tree node. Those of a pending slot are its candidate's, which may change until
    the slot is written; a match with them is only a guess, and the guard compares with the slot."""
    cdef batch* b = <batch*>owner
    if b.store.uses[slot].pending:
        return b.pendings[b.store.uses[slot].n_sharers].source
    return store_page(b.store, slot)


cdef uint32_t batch_new_block(
    batch* b, uint32_t n_copies, const uint8_t* source, uint32_t digest, bint goes_on
) noexcept nogil:
    """Slots for a new shared page and its copies, to be written from `source`; 0 without room for it.
    `goes_on`: the stretch is long, and its end has not been seen.

    The caller puts the first slot into the stable tree.
    """
    cdef uint32_t i, slot
    cdef sys_error err
    error_clear(&err)
    slot = store_alloc(b.store, n_copies, &err)
    if slot == 0:
        if b.err.code == 0:
            b.err = err
        return 0
    for i in range(n_copies):
        b.store.nodes[slot + i].digest = digest
        b.store.uses[slot + i].pending = 1
        b.store.uses[slot + i].n_sharers = b.n_pendings
    b.pendings[b.n_pendings].slot = slot
    b.pendings[b.n_pendings].n_copies = n_copies
    b.pendings[b.n_pendings].source = source
    b.pendings[b.n_pendings].n_accepted = 0
    b.pendings[b.n_pendings].alone = False
    b.pendings[b.n_pendings].goes_on = goes_on
    b.pendings[b.n_pendings].fate = OPEN
    b.n_pendings += 1
    return slot


cdef void batch_add(
    batch* b, intent_kind kind, uint64_t page_no, uint32_t item, uint32_t slot, int flags, bint founder
) noexcept nogil:
    """Note an intent. The item is in no tree; the caller flushes before `capacity` is reached."""
    cdef intent* new = &b.intents[b.n_intents]
    new.page_no = page_no
    new.item = item
    new.slot = slot
    new.kind = kind
    new.flags = <uint8_t>(flags | (PAGES_HUGE if b.rmap.tags[item].huge else 0))
    new.over_store = <uint8_t>b.rmap.tags[item].over_store
    new.founder = founder
    new.fate = OPEN
    b.n_intents += 1


cdef void _leave(batch* b, intent* left, skip_reason reason) noexcept nogil:
    """This page is not merged now: count why, and let its item wait for the next pass."""
    left.fate = LEFT
    b.counters.skips[<int>reason] += 1
    rmap_set_state(b.rmap, left.item, PAGE_VOLATILE if reason == SKIP_CHANGED else PAGE_UNSHARED)


cdef void drop_sharer(batch* b, uint32_t item) noexcept nogil:
    """Forget that a page shares its slot; the slot goes when it was the last. The item keeps the
    number of the slot, because the page's mapping still points there."""
    cdef uint32_t first = store_unshare(b.store, b.rmap.nodes[item].left)
    rmap_set_state(b.rmap, item, PAGE_VOLATILE)
    if first != 0:
        forest_erase(b.stable, first)
        store_release(b.store, first)


# ---- runs -----------------------------------------------------------------------------------

cdef int _by_page(const void* a, const void* b) noexcept nogil:
    cdef uint64_t left = (<const intent*>a).page_no
    cdef uint64_t right = (<const intent*>b).page_no
    return (left > right) - (left < right)


cdef uint32_t _run_end(batch* b, uint32_t start) noexcept nogil:
    """End of the run of open intents that begins at `start`, itself open."""
    cdef intent* first = &b.intents[start]
    cdef uint32_t end = start + 1, n
    cdef intent* other
    while end < b.n_intents:
        n = end - start
        other = &b.intents[end]
        if (
            other.fate != OPEN or other.page_no != first.page_no + n or other.kind != first.kind
            or other.flags != first.flags
            or (first.kind == INTENT_ZERO and other.over_store != first.over_store)
            or (first.kind != INTENT_ZERO and other.slot != first.slot + n)
        ):
            break
        end += 1
    return end


# ---- what a run costs -----------------------------------------------------------------------

cdef uint32_t _slot_under(batch* b, uint64_t page_no, uint32_t item) noexcept nogil:
    """What lies under a page: 0 for anonymous memory, a slot, or UNKNOWN_SLOT."""
    if item == 0:
        item = rmap_find(b.rmap, page_no, 0)
    if item == 0 or not b.rmap.tags[item].over_store:
        return 0
    if b.rmap.tags[item].state == PAGE_UNSHARED or b.rmap.nodes[item].left == 0:
        return UNKNOWN_SLOT
    return b.rmap.nodes[item].left


cdef bint _splits(uint32_t left, uint32_t right) noexcept nogil:
    """Does a mapping end between two neighbouring pages with these slots under them?"""
    if left == 0 and right == 0:
        return False
    return left == 0 or left == UNKNOWN_SLOT or right != left + 1


cdef bint _splits_surely(uint32_t left, uint32_t right) noexcept nogil:
    """The same, but no where it is not known: what is taken off the cost must really be there."""
    if left == UNKNOWN_SLOT or right == UNKNOWN_SLOT:
        return left == 0 or right == 0
    return _splits(left, right)


cdef int64_t _cost(batch* b, uint32_t start, uint32_t end) noexcept nogil:
    """Mappings more (or, negative, fewer) once the intents [start, end), all neighbours of one kind, are
    carried out."""
    cdef intent* first = &b.intents[start]
    cdef uint32_t left = _slot_under(b, first.page_no - 1, 0)
    cdef uint32_t right = _slot_under(b, b.intents[end - 1].page_no + 1, 0)
    cdef uint32_t before = left, after = left, under, i
    cdef int64_t cost = 0
    for i in range(start, end):
        under = _slot_under(b, b.intents[i].page_no, b.intents[i].item)
        cost += <int>_splits(after, b.intents[i].slot) - <int>_splits_surely(before, under)
        before = under
        after = b.intents[i].slot
    return cost + <int>_splits(after, right) - <int>_splits_surely(before, right)


cdef bint _makes_mappings(const intent* first) noexcept nogil:
    """Dropping memory makes no mapping."""
    return first.kind == INTENT_MERGE or (first.kind == INTENT_ZERO and first.over_store)


cdef void _choose(batch* b) noexcept nogil:
    """Take each run that the budget allows, leave the others.

    What the runs that are taken cost together is only put down when they are carried out: some may
    still be given up for want of a partner.
    """
    cdef uint32_t start = 0, end, i
    cdef int64_t cost
    cdef map_budget budget = b.budget
    while start < b.n_intents:
        if b.intents[start].fate != OPEN:
            start += 1
            continue
        end = _run_end(b, start)
        if _makes_mappings(&b.intents[start]):
            cost = _cost(b, start, end)
            if budget_affords(&budget, cost, end - start):
                budget.used += cost
            else:
                for i in range(start, end):
                    _leave(b, &b.intents[i], SKIP_MAP_BUDGET)
        start = end


# ---- pending shared pages -----------------------------------------------------------------------

cdef pending_block* _pending_of(batch* b, const intent* wanted) noexcept nogil:
    """The pending block that an intent leads to, or NULL for a shared page that existed before. (A page
    can be over a released slot that is used again: then even INTENT_RESHARE leads to a pending one.)"""
    if wanted.kind == INTENT_ZERO or not b.store.uses[wanted.slot].pending:
        return NULL
    return &b.pendings[b.store.uses[wanted.slot].n_sharers]


cdef void _leave_all_of(batch* b, skip_reason reason) noexcept nogil:
    """Leave the intents whose pending block was given up."""
    cdef uint32_t i
    cdef pending_block* block
    for i in range(b.n_intents):
        block = _pending_of(b, &b.intents[i])
        if block != NULL and block.fate == LEFT and b.intents[i].fate == OPEN:
            _leave(b, &b.intents[i], reason)


cdef void _give_up_unwanted(batch* b) noexcept nogil:
    """A block that no more pages will map than it has slots saves nothing."""
    cdef uint32_t i
    cdef pending_block* block
    for i in range(b.n_intents):
        block = _pending_of(b, &b.intents[i])
        if block != NULL and b.intents[i].fate == OPEN:
            block.n_accepted += 1
    for i in range(b.n_pendings):
        if b.pendings[i].n_accepted <= (0 if b.pendings[i].goes_on else b.pendings[i].n_copies):
            b.pendings[i].fate = LEFT
    # Both halves are accepted but for the budget, so it is the reason for the other half too.
    _leave_all_of(b, SKIP_MAP_BUDGET)


cdef void _write_pendings(batch* b) noexcept nogil:
    """Give the pending blocks their bytes, neighbours in memory and store in one call."""
    cdef uint32_t i = 0, n, copy
    cdef pending_block* block
    cdef sys_error err
    cdef int rc
    while i < b.n_pendings:
        block = &b.pendings[i]
        n = 1
        if block.fate != OPEN:
            i += 1
            continue
        error_clear(&err)
        if block.n_copies == 1:
            while (
                i + n < b.n_pendings and n < <uint32_t>WRITE_PAGES and b.pendings[i + n].fate == OPEN
                and b.pendings[i + n].n_copies == 1 and b.pendings[i + n].slot == block.slot + n
                and b.pendings[i + n].source == block.source + n * b.page_bytes
            ):
                n += 1
            rc = store_write(b.store, block.slot, block.source, n, &err)
        else:
            # The copies are made from the first slot, not from the source, which may change meanwhile.
            rc = store_write(b.store, block.slot, block.source, 1, &err)
            for copy in range(1, block.n_copies):
                if rc == 0:
                    rc = store_write(b.store, block.slot + copy, store_page(b.store, block.slot), 1, &err)
        if rc != 0:
            if b.err.code == 0:
                b.err = err
            for copy in range(n):
                b.pendings[i + copy].fate = LEFT
        i += n
    _leave_all_of(b, SKIP_STORE)


cdef void _check_written(batch* b) noexcept nogil:
    """Give up the blocks whose source changed before it was copied: their place in the stable tree was
    chosen for other bytes."""
    cdef const uint8_t* pages[HASH_PAGES]
    cdef uint32_t digests[HASH_PAGES]
    cdef uint32_t which[HASH_PAGES]
    cdef uint32_t i = 0, n, k
    while i < b.n_pendings:
        n = 0
        while i < b.n_pendings and n < <uint32_t>HASH_PAGES:
            if b.pendings[i].fate == OPEN:
                pages[n] = store_page(b.store, b.pendings[i].slot)
                which[n] = i
                n += 1
            i += 1
        b.checksum(pages, n, b.page_bytes, digests)
        for k in range(n):
            if digests[k] != b.store.nodes[b.pendings[which[k]].slot].digest:
                b.pendings[which[k]].fate = LEFT
    _leave_all_of(b, SKIP_CHANGED)


cdef void _stable_insert(forest_t* stable, uint32_t slot, uint32_t digest, const uint8_t* page) noexcept nogil:
    """Put a slot into the stable tree; before those with an equal key, so that it is found first."""
    cdef rb_place place
    cdef uint32_t same = forest_find(stable, digest, page, &place)
    if same != 0:
        forest_insert_before(stable, slot, same)
    else:
        forest_insert(stable, slot, place)


cdef void _settle_pendings(batch* b) noexcept nogil:
    """From here on written slots are shared pages without sharers, and the given up ones are released.

    The place of a slot in the stable tree was found by comparing candidates, which could change. Now
    that its bytes are fixed it is given the place that they ask for. Where checksums come first that
    matters only for the few nodes with equal ones, which a search for the slot itself then misses.
    """
    cdef uint32_t i, copy, slot, digest
    for i in range(b.n_pendings):
        slot = b.pendings[i].slot
        if b.stable.one.by_content or b.pendings[i].fate != OPEN:
            forest_erase(b.stable, slot)
        for copy in range(b.pendings[i].n_copies):
            b.store.uses[slot + copy].pending = 0
            b.store.uses[slot + copy].n_sharers = 0
        if b.pendings[i].fate != OPEN:
            store_release(b.store, slot)
    for i in range(b.n_pendings):
        if b.pendings[i].fate != OPEN:
            continue
        slot = b.pendings[i].slot
        digest = b.store.nodes[slot].digest
        if not b.stable.one.by_content:
            if b.pendings[i].alone or forest_find(b.stable, digest, store_page(b.store, slot), NULL) == slot:
                continue
            forest_erase(b.stable, slot)
        _stable_insert(b.stable, slot, digest, store_page(b.store, slot))


# ---- carrying out ---------------------------------------------------------------------------

cdef void _account(batch* b, intent* done) noexcept nogil:
    """One page was merged: its item and its slot say so from now on."""
    cdef uint32_t item = done.item
    done.fate = MERGED
    if done.kind == INTENT_ZERO:
        b.counters.pages_zeroed += 1
        rmap_set_over_store(b.rmap, item, False)
        b.rmap.nodes[item].left = 0
        rmap_set_state(b.rmap, item, PAGE_ZERO)
        return
    b.counters.pages_merged += 1
    if done.kind == INTENT_RESHARE:
        b.counters.pages_reshared += 1
    store_share(b.store, done.slot)
    rmap_set_state(b.rmap, item, PAGE_SHARED)
    rmap_set_over_store(b.rmap, item, True)
    b.rmap.nodes[item].left = done.slot


cdef skip_reason _reason(uint8_t outcome) noexcept nogil:
    return SKIP_CHANGED if outcome == CHANGED else SKIP_PINNED if outcome == PINNED else SKIP_REFUSED


cdef int _carry_out_run(batch* b, uint32_t start, uint32_t end) noexcept nogil:
    """Neighbours of one kind; what lies under them is alike, for the guard's sake."""
    cdef intent* first = &b.intents[start]
    cdef uint32_t i
    cdef run_t run
    cdef sys_error err
    cdef int rc
    error_clear(&err)
    run.guard = b.guard
    run.addr = <uintptr_t>(first.page_no * b.page_bytes)
    run.n_pages = end - start
    run.page_bytes = b.page_bytes
    run.over_store = first.over_store
    run.flags = first.flags
    run.tracker_fd = b.tracker_fd if first.flags & REGION_WATCHED else -1
    for i in range(end - start):
        b.slots[i] = b.intents[start + i].slot
    if first.kind == INTENT_MERGE:
        rc = merge_run(b.store, &run, b.slots, b.outcomes, &err)
    elif first.kind == INTENT_RESHARE:
        rc = reshare_run(b.store, &run, b.slots, b.outcomes, &err)
    else:
        rc = zero_run(&run, b.outcomes, &err)
    if err.code != 0 and b.err.code == 0:
        b.err = err
    for i in range(end - start):
        if b.outcomes[i] == DONE:
            _account(b, &b.intents[start + i])
        else:
            _leave(b, &b.intents[start + i], _reason(b.outcomes[i]))
    return rc


cdef bint _go_together(const intent* first, const intent* next) noexcept nogil:
    """Neighbours that one window can serve, though they may lead to different places of the store."""
    return (
        next.fate == OPEN and next.page_no == first.page_no + (next - first) and next.kind == first.kind
        and next.flags == first.flags and next.over_store == first.over_store
    )


cdef int _carry_out(batch* b) noexcept nogil:
    cdef uint32_t start = 0, end
    cdef int rc = 0
    while start < b.n_intents and rc == 0:
        if b.intents[start].fate != OPEN:
            start += 1
            continue
        end = start + 1
        while end < b.n_intents and _go_together(&b.intents[start], &b.intents[end]):
            end += 1
        if _makes_mappings(&b.intents[start]):
            b.budget.used += _cost(b, start, end)
        rc = _carry_out_run(b, start, end)
        start = end
    return rc


cdef void _undo_halves(batch* b) noexcept nogil:
    """A new shared page that only one of its two founders could be mapped to saves nothing: give that
    page its own memory back. Where even this fails it stays, right and shared by one."""
    cdef uint32_t i, k, first, n_copies
    cdef uint64_t n_sharers
    cdef size_t n_restored
    cdef intent* founder
    cdef run_t run
    for i in range(b.n_intents):
        founder = &b.intents[i]
        if not founder.founder or founder.fate != MERGED or b.store.uses[founder.slot].n_sharers != 1:
            continue
        first = store_block(b.store, founder.slot, &n_copies)
        n_sharers = 0
        for k in range(n_copies):
            n_sharers += b.store.uses[first + k].n_sharers
        if n_sharers != 1:
            continue
        run.guard = b.guard
        run.addr = <uintptr_t>(founder.page_no * b.page_bytes)
        run.n_pages = 1
        run.page_bytes = b.page_bytes
        run.over_store = True
        run.flags = founder.flags
        run.tracker_fd = b.tracker_fd if founder.flags & REGION_WATCHED else -1
        if restore_range(&run, &n_restored, &b.err) == 0:
            drop_sharer(b, founder.item)
            rmap_set_over_store(b.rmap, founder.item, False)
            b.rmap.nodes[founder.item].left = 0
            b.counters.skips[<int>SKIP_PARTNER] += 1


cdef void _release_unmapped(batch* b) noexcept nogil:
    """Release the new shared pages that nobody was mapped to after all."""
    cdef uint32_t i, k
    cdef uint64_t n_sharers
    for i in range(b.n_pendings):
        if b.pendings[i].fate != OPEN:
            continue
        n_sharers = 0
        for k in range(b.pendings[i].n_copies):
            n_sharers += b.store.uses[b.pendings[i].slot + k].n_sharers
        if n_sharers == 0:
            forest_erase(b.stable, b.pendings[i].slot)
            store_release(b.store, b.pendings[i].slot)


cdef int batch_flush(batch* b) noexcept nogil:
    """Carry out all intents. -1 when the guard failed to give a permission back (see b.err)."""
    cdef int rc
    qsort(b.intents, b.n_intents, sizeof(intent), _by_page)
    _choose(b)
    _give_up_unwanted(b)
    _write_pendings(b)
    _check_written(b)
    _settle_pendings(b)
    rc = _carry_out(b)
    _release_unmapped(b)
    _undo_halves(b)
    store_trim(b.store)
    b.n_intents = b.n_pendings = 0
    return rc
