"""A batch: the intents of one span (this page -> that shared page), and the shared pages to be made for them.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memset

from ksmcore._kernel.syscalls cimport sys_error_clear
from ksmcore._records.claims cimport claims_add, claims_drop
from ksmcore._records.forest cimport forest_erase, forest_holds, forest_put
from ksmcore._records.rmap cimport (
    PAGE_SHARED, PAGE_UNSHARED, PAGE_VOLATILE, rmap_set_left_out, rmap_set_slot, rmap_set_state, rmap_slot,
)
from ksmcore._records.store cimport (
    store_block, store_idle, store_is_live, store_is_orphan, store_is_pending, store_page, store_pending, store_share,
    store_sharers, store_unshare,
)


cdef int batch_init(batch* b, uint32_t capacity) noexcept nogil:
    b.capacity = capacity
    b.n_intents = b.n_pendings = b.n_doubted = 0
    b.has_set_aside = False
    sys_error_clear(&b.err)
    b.intents = <intent*>malloc(capacity * sizeof(intent))
    b.pendings = <pending_block*>malloc((capacity // 2) * sizeof(pending_block))
    b.slots = <uint32_t*>malloc(capacity * sizeof(uint32_t))
    b.outcomes = <uint8_t*>malloc(capacity)
    b.doubted = <uint32_t*>malloc(capacity * sizeof(uint32_t))
    b.planned = <planned_sharers*>calloc(2 * capacity, sizeof(planned_sharers))
    if (
        b.planned == NULL or b.intents == NULL or b.pendings == NULL or b.slots == NULL or b.outcomes == NULL
        or b.doubted == NULL
    ):
        batch_destroy(b)
        return -1
    return 0


cdef void batch_destroy(batch* b) noexcept nogil:
    free(b.intents)
    free(b.pendings)
    free(b.slots)
    free(b.outcomes)
    free(b.doubted)
    free(b.planned)
    b.intents = NULL
    b.pendings = NULL
    b.slots = NULL
    b.outcomes = NULL
    b.doubted = NULL
    b.planned = NULL


cdef planned_sharers* _planned(const batch* b, uint32_t slot) noexcept nogil:
    """The entry of a slot, or the one where it belongs. The table is never more than half full."""
    cdef uint32_t at = slot % (2 * b.capacity)
    while b.planned[at].slot != slot and b.planned[at].slot != 0:
        at = (at + 1) % (2 * b.capacity)
    return &b.planned[at]


cdef uint32_t batch_sharers(const batch* b, uint32_t slot) noexcept nogil:
    """Pages that map a slot, or will once the batch is carried out."""
    cdef const planned_sharers* planned = _planned(b, slot)
    return store_sharers(b.store, slot) + planned.n


cdef void batch_clear(batch* b) noexcept nogil:
    if b.n_intents != 0:
        memset(b.planned, 0, 2 * b.capacity * sizeof(planned_sharers))
    b.n_intents = b.n_pendings = 0
    b.has_set_aside = False


cdef const uint8_t* batch_stable_page(void* owner, uint32_t slot) noexcept nogil:
    """Bytes of a stable tree node. Those of a pending slot are its candidate's, which may change until
    the slot is written; a match with them is only a guess, and the guard compares with the slot."""
    cdef batch* b = <batch*>owner
    if store_is_pending(b.store, slot):
        return b.pendings[store_pending(b.store, slot)].source
    return store_page(b.store, slot)


cdef void batch_add(
    batch* b, intent_kind kind, uint64_t page_no, uint32_t item, uint32_t slot, int flags, bint founder
) noexcept nogil:
    """Note an intent. The item is in no tree, but for INTENT_PLAIN; the caller flushes before `capacity` is
    reached."""
    cdef intent* new = &b.intents[b.n_intents]
    cdef planned_sharers* planned
    new.page_no = page_no
    new.item = item
    new.slot = slot
    new.kind = kind
    new.flags = <uint8_t>flags
    new.is_huge = <uint8_t>b.rmap.tags[item].huge
    new.over_store = <uint8_t>b.rmap.tags[item].over_store
    new.founder = founder
    new.fate = OPEN
    b.n_intents += 1
    if slot != 0:
        planned = _planned(b, slot)
        planned.slot = slot
        planned.n += 1


cdef void batch_leave(batch* b, intent* left, uint64_t* reason) noexcept nogil:
    """This page is not merged now: count why, in a field of `b.counters.skipped`, and let its item wait for the
    next pass."""
    cdef bint is_left_out
    left.fate = LEFT
    if left.kind == INTENT_PLAIN:
        return                   # nothing was to be saved
    reason[0] += 1
    is_left_out = reason == &b.counters.skipped.map_budget
    rmap_set_state(
        b.rmap, left.item, PAGE_VOLATILE if reason == &b.counters.skipped.changed else PAGE_UNSHARED
    )
    rmap_set_left_out(b.rmap, left.item, is_left_out)
    if is_left_out:
        # No guard has compared it with what it may only share the checksum of. The next search does.
        b.rmap.tags[left.item].doubted = 1


cdef void batch_doubt(batch* b, uint32_t item) noexcept nogil:
    """A page did not have the bytes that its checksum promised: it was written meanwhile, or another one has the same
    checksum. From now on searches for it compare."""
    if not b.rmap.tags[item].doubted and not b.stable.one.by_content:
        b.rmap.tags[item].doubted = 1
        b.doubted[b.n_doubted] = item
        b.n_doubted += 1


cdef void batch_set_aside(batch* b, uint32_t first) noexcept nogil:
    """Take a block that is full, or will be, out of the stable tree: another with its bytes stands there, and
    searches would look at this one in vain."""
    forest_erase(b.stable, first)
    b.has_set_aside = True


cdef void batch_offer(batch* b, uint32_t slot) noexcept nogil:
    """If the block of this slot was set aside, have searches find it again."""
    cdef uint32_t n_copies, first
    if forest_holds(b.stable, slot) or store_is_orphan(b.store, slot):
        return
    first = store_block(b.store, slot, &n_copies)
    if not forest_holds(b.stable, first):
        forest_put(b.stable, first, store_page(b.store, first))


cdef void batch_lie_over(batch* b, uint32_t item, uint32_t slot) noexcept nogil:
    """The mapping of a page points at this slot from now on; 0: at no slot."""
    cdef uint32_t before = rmap_slot(b.rmap, item)
    if slot == before:
        return
    rmap_set_slot(b.rmap, item, slot)
    if slot != 0:
        claims_add(b.store, slot)
    if before != 0:
        claims_drop(b.store, before)


cdef bint batch_adopt(batch* b, uint32_t item) noexcept nogil:
    """The page shows what it lies over, though it was taken for a private copy: it is a sharer again. The item is in no
    tree. False where the slot is none that could be shared."""
    cdef uint32_t slot = rmap_slot(b.rmap, item)
    if not store_is_live(b.store, slot):
        return False
    store_share(b.store, slot)
    rmap_set_state(b.rmap, item, PAGE_SHARED)
    b.rmap.nodes[item].digest = b.store.nodes[slot].digest
    b.rmap.tags[item].age = 0
    return True


cdef void batch_drop_sharer(batch* b, uint32_t item) noexcept nogil:
    """Forget that a page shares its slot. Its mapping still points there. Where it was the last the shared page is
    idle: nothing is released on the word of one look at one page."""
    cdef uint32_t slot = rmap_slot(b.rmap, item)
    cdef uint32_t first = store_unshare(b.store, slot)
    rmap_set_state(b.rmap, item, PAGE_VOLATILE)
    # With fewer than that before, the block had room, so was not set aside.
    if store_sharers(b.store, slot) == b.max_page_sharing[0] - 1:
        batch_offer(b, slot)
    if first != 0:
        store_idle(b.store, first)
