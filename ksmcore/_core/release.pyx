"""The release: shared pages that nobody shares any more give their memory back.

A page that is found to be a private copy gives up its share, and the shared page that loses its last one is idle. It is
not released on that ground: another mapping of the same slot, that somebody reads, may have been moved there and away
again. So, for all idle ones together, in this order:

  1. Every page that lies over one of them is asked for again, those that were found private long ago too. One that is
     not a private copy is a sharer.
  2. All mappings are looked at (census). If each is where it is remembered to be, and no other is anywhere, these pages
     were all that lie over the idle ones.
  3. The kernel is asked how many page table entries show the slot (claims_unshown). It is released only where none does
     but that of our own view.

The first two are looks at one thing after the other. A thread that moves mappings without pause can show the first a
private copy, and the second the mapping that it changed places with. The third does not depend on where anything
lies: whatever was read since it was mapped counts, wherever it is on its way to. What is left is a mapping that nobody
has read yet, and that changed places twice between two looks, with one that is private.

Whatever is not certain stays idle, and is asked again in the next pass. What is released and still lies under private
copies is not handed out again (see the store): so not even a wrong answer shows anybody another's bytes.

The caller holds the engine's lock.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t, uintptr_t

from ksmcore._core.census cimport census_agrees
from ksmcore._kernel.pagemap cimport (
    PAGE_OF_FILE, PAGE_PRESENT, PAGE_SWAPPED, PAGE_UNSURE, SPAN_PAGES, pagemap_query,
)
from ksmcore._kernel.syscalls cimport sys_error, sys_error_clear
from ksmcore._pages cimport page_compare
from ksmcore._pass.batch cimport batch_adopt
from ksmcore._pass.match cimport match_leave_tree
from ksmcore._pass.state cimport engine_core, state_page_of
from ksmcore._records.claims cimport claims_unshown
from ksmcore._records.forest cimport forest_erase, forest_holds
from ksmcore._records.rmap cimport rmap_slot
from ksmcore._records.store cimport store_block, store_page, store_release, store_trim, store_wake
from ksmcore._records.store_files cimport store_file_of

cdef enum:
    MAPS_PER_IDLE = 2          # mappings that are read, and items passed over, in the time of restoring a page
    ITEMS_PER_IDLE = 512


cdef bint _is_private(engine_core* c, uint32_t item, uint8_t flag) noexcept nogil:
    if flag & PAGE_UNSURE:
        return page_compare(state_page_of(c, item), store_page(&c.store, rmap_slot(&c.rmap, item)), c.page_bytes) != 0
    return flag & PAGE_SWAPPED or (flag & PAGE_PRESENT and not flag & PAGE_OF_FILE)


cdef int _ask(engine_core* c, uint32_t n_items, bint may_read, sys_error* err) noexcept nogil:
    """Neighbours, whose items are in c.items: those that are no private copies share their slots. -1 where that
    cannot be told."""
    cdef uint8_t flags[<int>SPAN_PAGES]
    cdef uint32_t i
    if n_items == 0:
        return 0
    if pagemap_query(&c.pm, <uintptr_t>state_page_of(c, c.items[0]), n_items, flags, err) != 0:
        return -1
    for i in range(n_items):
        if flags[i] & PAGE_UNSURE and not may_read:
            return -1
        if not _is_private(c, c.items[i], flags[i]):
            match_leave_tree(c, c.items[i])
            batch_adopt(&c.b, c.items[i])
    return 0


cdef int _ask_all(engine_core* c, bint may_read, sys_error* err) noexcept nogil:
    cdef uint32_t item, slot, n = 0
    cdef uint64_t page_no
    for item in range(1, c.rmap.top):
        slot = rmap_slot(&c.rmap, item)
        if slot == 0 or not c.store.uses[slot].idle:
            continue
        page_no = c.rmap.tags[item].page_no
        if n == <uint32_t>SPAN_PAGES or (n > 0 and c.rmap.tags[c.items[n - 1]].page_no + 1 != page_no):
            if _ask(c, n, may_read, err) != 0:
                return -1
            n = 0
        c.items[n] = item
        n += 1
    return _ask(c, n, may_read, err)


cdef void _release_block(engine_core* c, uint32_t first, uint32_t n_copies, bint is_shown) noexcept nogil:
    cdef uint32_t i
    cdef bint is_lost = False
    for i in range(n_copies):
        is_lost |= c.store.uses[first + i].lost
    if is_lost:
        store_wake(&c.store, first)
    elif store_file_of(&c.store, first).is_frozen or not is_shown:
        # A frozen one may be shown by children: it is dead then, and asked for again when they are gone.
        if forest_holds(&c.stable, first):
            forest_erase(&c.stable, first)
        store_wake(&c.store, first)
        store_release(&c.store, first)


cdef void _release_run(engine_core* c, uint32_t slot, uint32_t end) noexcept nogil:
    """Idle blocks that follow each other. They are asked for together, as long as that brings something."""
    cdef uint32_t n_copies, n_asked = SPAN_PAGES, n_unshown
    while slot < end:
        store_block(&c.store, slot, &n_copies)
        n_unshown = claims_unshown(&c.store, &c.pm, slot, min(max(n_asked, n_copies), end - slot))
        n_asked = 1 if n_unshown < n_copies else 2 * n_asked
        _release_block(c, slot, n_copies, n_unshown < n_copies)
        while n_unshown > n_copies:
            slot += n_copies
            n_unshown -= n_copies
            store_block(&c.store, slot, &n_copies)
            if n_unshown < n_copies:
                n_copies = 0     # of this one not all is known
                break
            _release_block(c, slot, n_copies, False)
        slot += n_copies


cdef void release_idle(engine_core* c, bint may_read) noexcept nogil:
    """`may_read`: whoever calls has got ready to read memory that the program may take away, which is the way to tell
    private copies where there is no page map."""
    cdef sys_error ignored
    cdef uint32_t slot = 1, end
    sys_error_clear(&ignored)
    if c.store.n_idle == 0:
        return
    if _ask_all(c, may_read, &ignored) != 0 or c.store.n_idle == 0 or census_agrees(c, &ignored) != 1:
        return
    while slot < c.store.top:
        # Files come and go, a new one after each fork: the numbers of those that have gone are passed over at once.
        if c.store.segments[slot // c.store.slots_per_segment].view == NULL:
            slot += c.store.slots_per_segment - slot % c.store.slots_per_segment
            continue
        end = slot
        while end < c.store.top and c.store.uses[end].idle:
            end += 1
        _release_run(c, slot, end)
        slot = end + 1
    store_trim(&c.store)
    c.n_idle_left = c.store.n_idle


cdef void release_if_worth(engine_core* c, bint may_read) noexcept nogil:
    """The same, in between, if it does not take longer than what has made so many more idle."""
    cdef size_t n_worth = c.n_maps // MAPS_PER_IDLE + c.rmap.top // ITEMS_PER_IDLE
    if c.store.n_idle > c.n_idle_left and (
        c.rmap.n_over_store == 0 or c.store.n_idle - c.n_idle_left >= n_worth
    ):
        c.n_idle_left = c.store.n_idle
        release_idle(c, may_read)
