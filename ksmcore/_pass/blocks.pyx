"""Blocks: new shared pages and their copies, from being wanted to having bytes.

A block has its place in the stable tree as soon as it is wanted, so that further pages of the span find it. Its
bytes come later, in long pieces, and only if enough pages still want it then: in the order in which the functions
stand here.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from ksmcore._kernel.syscalls cimport sys_error, sys_error_clear
from ksmcore._pass.batch cimport (
    LEFT, OPEN, batch, batch_leave, batch_no_room, batch_offer, intent, pending_block,
)
from ksmcore._records.forest cimport forest_erase, forest_holds, forest_put
from ksmcore._records.store cimport (
    store_alloc, store_block_sharers, store_is_dead, store_is_pending, store_page, store_pending, store_release,
    store_set_pending, store_settle, store_write,
)

cdef enum:
    WRITE_PAGES = 256          # most pages of one write to the store: 1 MiB of 4 KiB pages


cdef uint32_t blocks_new(
    batch* b, uint32_t n_copies, const uint8_t* source, uint32_t digest, bint goes_on
) noexcept nogil:
    """Slots for a new shared page and its copies, to be written from `source`; 0 without room for it.
    `goes_on`: the stretch is long, and its end has not been seen.

    The caller puts the first slot into the stable tree.
    """
    cdef uint32_t i, slot
    cdef sys_error err
    sys_error_clear(&err)
    slot = store_alloc(b.store, n_copies, &err)
    if slot == 0:
        b.refusal = err.code
        if b.err.code == 0:
            b.err = err
        return 0
    for i in range(n_copies):
        b.store.nodes[slot + i].digest = digest
        store_set_pending(b.store, slot + i, b.n_pendings)
    b.pendings[b.n_pendings].slot = slot
    b.pendings[b.n_pendings].n_copies = n_copies
    b.pendings[b.n_pendings].source = source
    b.pendings[b.n_pendings].n_accepted = 0
    b.pendings[b.n_pendings].n_in_run = b.pendings[b.n_pendings].founders = 0
    b.pendings[b.n_pendings].alone = False
    b.pendings[b.n_pendings].goes_on = goes_on
    b.pendings[b.n_pendings].fate = OPEN
    b.n_pendings += 1
    return slot


cdef pending_block* blocks_pending(batch* b, const intent* wanted) noexcept nogil:
    """The pending block that an intent leads to, or NULL for a shared page that existed before."""
    if wanted.slot == 0 or not store_is_pending(b.store, wanted.slot):
        return NULL
    return &b.pendings[store_pending(b.store, wanted.slot)]


cdef void _leave_all_of(batch* b, uint64_t* reason) noexcept nogil:
    """Leave the intents whose pending block was given up."""
    cdef uint32_t i
    cdef pending_block* block
    for i in range(b.n_intents):
        block = blocks_pending(b, &b.intents[i])
        if block != NULL and block.fate == LEFT and b.intents[i].fate == OPEN:
            batch_leave(b, &b.intents[i], reason)


cdef void blocks_give_up_unwanted(batch* b, uint64_t* reason) noexcept nogil:
    """A block that no more pages will map than it has slots saves nothing. `reason`: why others that wanted it were
    left, so that these are as well."""
    cdef uint32_t i
    cdef pending_block* block
    for i in range(b.n_pendings):
        b.pendings[i].n_accepted = 0
    for i in range(b.n_intents):
        block = blocks_pending(b, &b.intents[i])
        if block != NULL and b.intents[i].fate == OPEN:
            block.n_accepted += 1
    for i in range(b.n_pendings):
        if b.pendings[i].n_accepted <= (0 if b.pendings[i].goes_on else b.pendings[i].n_copies):
            b.pendings[i].fate = LEFT
    _leave_all_of(b, reason)


cdef void blocks_write(batch* b) noexcept nogil:
    """Give the pending blocks their bytes, neighbours in memory and store in one call."""
    cdef uint32_t i = 0, n, copy
    cdef pending_block* block
    cdef sys_error err
    cdef int rc, code = 0
    while i < b.n_pendings:
        block = &b.pendings[i]
        n = 1
        if block.fate != OPEN:
            i += 1
            continue
        sys_error_clear(&err)
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
            code = err.code
            for copy in range(n):
                b.pendings[i + copy].fate = LEFT
        i += n
    _leave_all_of(b, batch_no_room(b, code))


cdef void blocks_settle(batch* b) noexcept nogil:
    """From here on written slots are shared pages without sharers, and the given up ones are released.

    The place of a slot in the stable tree was found by comparing candidates, which could change. Now
    that its bytes are fixed it is given the place that they ask for. Where checksums come first that
    matters only for the few nodes with equal ones, which a search for the slot itself then misses. One that was
    set aside has no place that could be wrong. The checksum is the one that its source had when it was looked at: if
    that was written since, whoever comes by the checksum is told from it under the guard.
    """
    cdef uint32_t i, copy, slot
    cdef bint is_held
    # All are taken out before the first is put back: among misplaced ones it would be misplaced again.
    for i in range(b.n_pendings):
        slot = b.pendings[i].slot
        is_held = forest_holds(b.stable, slot)
        b.pendings[i].moves = b.pendings[i].fate == OPEN and (
            b.stable.one.by_content or (is_held and not b.pendings[i].alone)
        )
        if is_held and (b.pendings[i].moves or b.pendings[i].fate != OPEN):
            forest_erase(b.stable, slot)
        for copy in range(b.pendings[i].n_copies):
            store_settle(b.store, slot + copy)
        if b.pendings[i].fate != OPEN:
            store_release(b.store, slot)
    for i in range(b.n_pendings):
        if b.pendings[i].moves:
            forest_put(b.stable, b.pendings[i].slot, store_page(b.store, b.pendings[i].slot))


cdef void blocks_release_unmapped(batch* b) noexcept nogil:
    """Release the new shared pages that nobody was mapped to after all."""
    cdef uint32_t i
    for i in range(b.n_pendings):
        if b.pendings[i].fate == OPEN and store_block_sharers(b.store, b.pendings[i].slot) == 0:
            if forest_holds(b.stable, b.pendings[i].slot):
                forest_erase(b.stable, b.pendings[i].slot)
            store_release(b.store, b.pendings[i].slot)


cdef void blocks_offer(batch* b) noexcept nogil:
    """What was set aside because the batch would have filled it, and was not filled after all, is offered again."""
    cdef uint32_t i
    if not b.has_set_aside:
        return
    for i in range(b.n_intents):
        if (
            b.intents[i].fate == LEFT and b.intents[i].slot != 0 and not store_is_dead(b.store, b.intents[i].slot)
            and store_block_sharers(b.store, b.intents[i].slot) != 0
        ):
            batch_offer(b, b.intents[i].slot)


cdef void blocks_offer_all(batch* b) noexcept nogil:
    """More pages than before may map a shared page: offer all that were set aside. Between two batches."""
    cdef uint32_t slot
    for slot in range(1, b.store.top):
        if (
            b.store.uses[slot].used and not b.store.uses[slot].copy and not b.store.uses[slot].hollow
            and not store_is_dead(b.store, slot)
        ):
            batch_offer(b, slot)
