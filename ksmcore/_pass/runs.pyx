"""From intents to runs: the batch of pages that are to be merged next, and how it is carried out.

The scanner collects intents (this page -> that shared page). `runs_choose` sorts them by address and
cuts them into runs, pages that are neighbours both in memory and in the store, so that one mapping
serves a run; the map budget takes or leaves each run. `runs_carry_out` then, in order: shared pages that are still
wanted get their bytes; what is left, neighbours in memory together, goes through the merge protocol; what
became of each page is accounted. A shared page with fewer than two sharers at the end is undone. A batch
writes at most capacity / 2 pages to the store before it gives the merged pages back, but for what the guard keeps of
them for a while (_guard/scratch).
"""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport qsort
from libc.string cimport memchr, memset

from ksmcore._guard.guard cimport guard_is_barred
from ksmcore._guard.merge cimport merge_restore_range, merge_run, merge_zero_run, run_t
from ksmcore._guard.window cimport BARRED, CHANGED, DONE, IN_CALL, PINNED, REFUSED
from ksmcore._kernel.syscalls cimport sys_error, sys_error_clear, sys_now_ns
from ksmcore._pass.batch cimport (
    INTENT_MERGE, INTENT_PLAIN, INTENT_RESHARE, INTENT_ZERO, MERGED, OPEN, batch, batch_clear, batch_drop_sharer,
    batch_doubt, batch_end_stage, batch_leave, batch_lie_over, batch_sharers, intent, pending_block,
)
from ksmcore._pass.blocks cimport (
    blocks_give_up_unwanted, blocks_offer, blocks_pending, blocks_release_unmapped, blocks_settle, blocks_write,
)
from ksmcore._records.budget cimport budget_affords, map_budget
from ksmcore._records.costs cimport costs_slot_under, costs_splits
from ksmcore._records.rmap cimport PAGE_SHARED, PAGE_ZERO, rmap_set_state
from ksmcore._records.store cimport store_block_sharers, store_share, store_trim

cdef enum:
    LONG_RUN = 4               # pages whose mappings cost little for each
    MAPS_OF_HOLE = 2           # what was to be mapped is cut in two, by pages that were left as they are


# ---- runs -----------------------------------------------------------------------------------

cdef int _by_page(const void* a, const void* b) noexcept nogil:
    cdef uint64_t left = (<const intent*>a).page_no
    cdef uint64_t right = (<const intent*>b).page_no
    return (left > right) - (left < right)


cdef bint _are_alike(const intent* first, const intent* other) noexcept nogil:
    """Is the same to happen to this page as to the one so many intents before it, its neighbour in memory?"""
    return (
        other.fate == OPEN and other.page_no == first.page_no + (other - first) and other.kind == first.kind
        and other.flags == first.flags and other.is_huge == first.is_huge
    )


cdef uint32_t _run_end(batch* b, uint32_t start) noexcept nogil:
    """End of the run of open intents that begins at `start`, itself open."""
    cdef intent* first = &b.intents[start]
    cdef uint32_t end = start + 1, n
    cdef intent* other
    while end < b.n_intents:
        n = end - start
        other = &b.intents[end]
        if (
            not _are_alike(first, other)
            or (first.slot == 0 and other.over_store != first.over_store)
            or (first.slot != 0 and other.slot != first.slot + n)
        ):
            break
        end += 1
    return end


# ---- what a run costs -----------------------------------------------------------------------

cdef int64_t _cost(batch* b, uint32_t start, uint32_t end) noexcept nogil:
    """Mappings more (or, negative, fewer) once the intents [start, end), all neighbours of one kind, are
    carried out. What is still open before them goes first."""
    cdef intent* first = &b.intents[start]
    cdef intent* last = first - 1 if start > 0 else first
    cdef uint32_t left = (
        last.slot if last.page_no + 1 == first.page_no and last.fate == OPEN
        else costs_slot_under(b.rmap, first.page_no - 1, 0)
    )
    cdef uint32_t right = costs_slot_under(b.rmap, b.intents[end - 1].page_no + 1, 0)
    cdef uint32_t before = left, after = left, under, i
    cdef int64_t cost = 0
    for i in range(start, end):
        under = costs_slot_under(b.rmap, b.intents[i].page_no, b.intents[i].item)
        cost += <int>costs_splits(after, b.intents[i].slot) - <int>costs_splits(before, under)
        before = under
        after = b.intents[i].slot
    if first.kind == INTENT_PLAIN:
        cost += (left == 0) + (right == 0)       # see costs_of_restoring
    return cost + <int>costs_splits(after, right) - <int>costs_splits(before, right)


cdef bint _makes_mappings(const intent* first) noexcept nogil:
    """Anonymous memory that is given back costs none."""
    return first.kind != INTENT_ZERO or first.over_store


cdef void _note_runs(batch* b) noexcept nogil:
    """Have each new block know its founders, and how long the runs are that they are in."""
    cdef uint32_t start = 0, end, i
    cdef pending_block* block
    while start < b.n_intents:
        end = _run_end(b, start)
        for i in range(start, end):
            if b.intents[i].founder:
                block = blocks_pending(b, &b.intents[i])
                block.n_in_run = max(block.n_in_run, end - start)
                block.founders += i
        start = end


cdef uint32_t _halves_saved(batch* b, uint32_t start, uint32_t end) noexcept nogil:
    """How many halves of a page a run saves. Two founders save one page: half of it each, but all of it where the other
    one costs little, being in a long run."""
    cdef uint32_t i, n_halves = 0
    for i in range(start, end):
        n_halves += 1 if b.intents[i].founder and blocks_pending(b, &b.intents[i]).n_in_run < <uint32_t>LONG_RUN else 2
    return n_halves


cdef uint32_t _other_founder(batch* b, uint32_t i) noexcept nogil:
    """The other of two founders, where nobody else wants the new shared page and it was not left; else this one."""
    cdef uint32_t other
    if not b.intents[i].founder or batch_sharers(b, b.intents[i].slot) != 2:
        return i
    other = blocks_pending(b, &b.intents[i]).founders - i
    return other if b.intents[other].fate == OPEN else i


cdef void _leave_run(batch* b, uint32_t start, uint32_t end) noexcept nogil:
    """The map budget does not allow it. Where one founder is left and nobody else wants the new shared page, the other
    one is left as well: what remains of its run is worth less."""
    cdef uint32_t i, other
    for i in range(start, end):
        if b.intents[i].fate != OPEN:
            continue
        batch_leave(b, &b.intents[i], &b.counters.skipped.map_budget)
        other = _other_founder(b, i)
        if other != i:
            batch_leave(b, &b.intents[other], &b.counters.skipped.map_budget)


cdef uint32_t _other_of_pair(batch* b, uint32_t start, uint32_t end) noexcept nogil:
    """Of a run that is one founder, which saves nothing without the other, and that is alone as well: the other one.
    Else the first of the run."""
    cdef uint32_t other = _other_founder(b, start) if end - start == 1 else start
    return other if other != start and blocks_pending(b, &b.intents[start]).n_in_run == 1 else start


cdef void _choose_runs(batch* b) noexcept nogil:
    """Take each run that the budget allows, leave the others; all, where no window may be opened. Pairs of single pages
    are taken or left as pairs: else the first ones would use up what the others cost.

    What the runs that are taken cost together is only put down when they are carried out: some may
    still be given up for want of a partner.
    """
    cdef uint32_t start = 0, end, i, other, n_halves
    cdef int64_t cost
    cdef map_budget budget = b.budget[0]
    _note_runs(b)
    if b.n_intents != 0 and guard_is_barred(b.guard[0]):
        for i in range(b.n_intents):
            if b.intents[i].fate == OPEN:
                batch_leave(b, &b.intents[i], &b.counters.skipped.sigsegv_blocked)
    while start < b.n_intents:
        if b.intents[start].fate != OPEN:
            start += 1
            continue
        end = _run_end(b, start)
        other = _other_of_pair(b, start, end)
        # The second of a pair, which has not been left, was paid for with the first.
        if _makes_mappings(&b.intents[start]) and other >= start:
            cost = _cost(b, start, end)
            n_halves = _halves_saved(b, start, end)
            if other != start:
                cost += _cost(b, other, other + 1)
                n_halves *= 2
            if budget_affords(&budget, cost, n_halves):
                budget.used += cost
            else:
                _leave_run(b, start, end)
        start = end


# ---- carrying out ---------------------------------------------------------------------------

cdef void _account(batch* b, intent* done) noexcept nogil:
    """One page was merged: its item and its slot say so from now on."""
    cdef uint32_t item = done.item
    done.fate = MERGED
    b.rmap.tags[item].age = 0
    if done.kind == INTENT_PLAIN:
        batch_lie_over(b, item, 0)
        return
    if done.kind == INTENT_ZERO:
        b.counters.pages_zeroed += 1
        batch_lie_over(b, item, 0)
        rmap_set_state(b.rmap, item, PAGE_ZERO)
        return
    b.counters.pages_merged += 1
    if done.kind == INTENT_RESHARE:
        b.counters.pages_reshared += 1
    store_share(b.store, done.slot)
    rmap_set_state(b.rmap, item, PAGE_SHARED)
    batch_lie_over(b, item, done.slot)


cdef uint64_t* _reason(batch* b, uint8_t outcome) noexcept nogil:
    if outcome == CHANGED:
        return &b.counters.skipped.changed
    if outcome == BARRED:
        return &b.counters.skipped.sigsegv_blocked
    if outcome == IN_CALL:
        return &b.counters.skipped.in_call
    return &b.counters.skipped.pinned if outcome == PINNED else &b.counters.skipped.refused


cdef int _carry_out_run(batch* b, uint32_t start, uint32_t end) noexcept nogil:
    """Neighbours of one kind; what lies under them is alike, for the guard's sake."""
    cdef intent* first = &b.intents[start]
    cdef uint32_t i, n_holes = 0
    cdef run_t run
    cdef sys_error err
    cdef size_t n_restored
    cdef int rc = 0
    sys_error_clear(&err)
    run.guard = b.guard[0]
    run.addr = <uintptr_t>(first.page_no * b.page_bytes)
    run.n_pages = end - start
    run.page_bytes = b.page_bytes
    run.over_store = first.over_store
    run.is_huge = first.is_huge
    run.flags = first.flags
    run.tracker = b.tracker
    for i in range(end - start):
        b.slots[i] = b.intents[start + i].slot
    if first.kind == INTENT_MERGE or first.kind == INTENT_RESHARE:
        rc = merge_run(b.store, &run, b.slots, b.outcomes, &err)
    elif first.kind == INTENT_ZERO:
        rc = merge_zero_run(&run, b.outcomes, &err)
    else:
        # What fails stays as it is, and right; a stuck window is reported when the next one is opened.
        merge_restore_range(&run, False, &n_restored, &err)
        memset(b.outcomes, REFUSED, run.n_pages)
        memset(b.outcomes, DONE, n_restored)
    if err.code != 0 and b.err.code == 0:
        b.err = err
    for i in range(end - start):
        if b.outcomes[i] == DONE:
            _account(b, &b.intents[start + i])
        else:
            n_holes += i == 0 or b.outcomes[i - 1] == DONE
            if b.outcomes[i] == CHANGED:
                batch_doubt(b, b.intents[start + i].item)
            batch_leave(b, &b.intents[start + i], _reason(b, b.outcomes[i]))
    if _makes_mappings(first) and memchr(b.outcomes, DONE, end - start) != NULL:
        b.budget.used += MAPS_OF_HOLE * n_holes
    return rc


cdef bint _go_together(const intent* first, const intent* next) noexcept nogil:
    """Neighbours that one window can serve, though they may lead to different places of the store."""
    return _are_alike(first, next) and next.over_store == first.over_store


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
    cdef uint32_t i
    cdef uint64_t last_no = 0
    cdef size_t n_restored
    cdef intent* founder
    cdef run_t run
    for i in range(b.n_intents):
        founder = &b.intents[i]
        if not founder.founder or founder.fate != MERGED or store_block_sharers(b.store, founder.slot) != 1:
            continue
        run.guard = b.guard[0]
        run.addr = <uintptr_t>(founder.page_no * b.page_bytes)
        run.n_pages = 1
        run.page_bytes = b.page_bytes
        run.over_store = True
        run.flags = founder.flags
        run.tracker = b.tracker
        if merge_restore_range(&run, False, &n_restored, &b.err) == 0:
            batch_drop_sharer(b, founder.item)
            batch_lie_over(b, founder.item, 0)
            b.counters.skipped.partner += 1
            if founder.page_no != last_no + 1:
                b.budget.used += MAPS_OF_HOLE
            last_no = founder.page_no


cdef void runs_choose(batch* b) noexcept nogil:
    """Leave the intents that the map budget has no room for, or that no window may be opened for."""
    cdef uint64_t begun = sys_now_ns()
    qsort(b.intents, b.n_intents, sizeof(intent), _by_page)
    _choose_runs(b)
    blocks_give_up_unwanted(b, &b.counters.skipped.map_budget)
    batch_end_stage(&b.counters.stage_ns.store, begun)


cdef int runs_carry_out(batch* b) noexcept nogil:
    """Carry out what was chosen. -1 when the guard failed to give a permission back (see b.err)."""
    cdef int rc
    cdef uint64_t begun = sys_now_ns()
    b.n_doubted = 0
    blocks_write(b)
    blocks_settle(b)
    begun = batch_end_stage(&b.counters.stage_ns.store, begun)
    rc = _carry_out(b)
    blocks_release_unmapped(b)
    _undo_halves(b)
    blocks_offer(b)
    store_trim(b.store)
    batch_end_stage(&b.counters.stage_ns.guard, begun)
    batch_clear(b)
    return rc
