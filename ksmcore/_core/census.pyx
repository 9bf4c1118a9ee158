"""The census: what is mapped in this process, against what the engine takes for mapped.

A program can unmap, move, protect or replace memory that it has registered, without telling anybody. An
engine that went on from what it remembers would crash on such memory, change what is another's by now, or
hand out a shared page that is still mapped elsewhere. So:

  - A region that is not plain private memory, readable and writable throughout, is `altered`: no pass
    looks at it, for as long as it is so.
  - Which slot of the store lies under which page is asked of the kernel, and what is remembered is put right. A page
    that is found over another slot than remembered counts as a sharer of that one until it is seen to be a
    private copy.
  - A slot that lies under fewer registered pages than remembered, or under more, or anywhere else, is lost: it is not
    released, since whoever has it mapped now, by whatever means, must go on seeing its bytes. A later census that finds
    all pages where they are remembered to be, and that slot nowhere else, makes it one like all others again; then it
    is released as they are, by further looks (see release).

Counting would not do: two buffers that change places keep every count. So what is compared is the sum of the
identities of all (page, slot), which the records keep as they change, and which costs the same for a long run as for
a page (rmap_identity). Only where the sums differ is it looked for, page by page.

While another thread moves mappings they are read one after the other, and a mapping may be met twice, or not at all.
Then slots are lost that need not be; none is taken for unmapped that is not found to be. The caller holds the engine's
lock.
"""

from libc.stdint cimport INT32_MAX, UINTPTR_MAX, int32_t, int64_t, uint8_t, uint32_t, uint64_t, uintptr_t
from libc.string cimport memset

from ksmcore._kernel.maps cimport maps_answers, maps_each, maps_each_in, maps_is_private_data, vma_t
from ksmcore._kernel.syscalls cimport (
    sys_error, sys_error_clear, sys_grow, sys_map_anon, sys_now_ns, sys_page_bytes, sys_unmap,
)
from ksmcore._pass.batch cimport batch_adopt, batch_drop_sharer, batch_lie_over
from ksmcore._pass.look cimport look_n_maps, look_take_room, look_tally, maps_tally
from ksmcore._pass.match cimport match_leave_tree
from ksmcore._pass.state cimport engine_core
from ksmcore._records.claims cimport claims_lose
from ksmcore._records.regions cimport region_t, regions_at, regions_end_of, regions_next
from ksmcore._records.rmap cimport (
    PAGE_SHARED, PAGE_VOLATILE, rmap_add, rmap_find, rmap_identity, rmap_set_state, rmap_slot, rmap_step,
    rmap_walk, rmap_walk_over,
)
from ksmcore._records.store cimport store_find_again, store_slot_at
from ksmcore._records.store_files cimport SEGMENT_BYTES, store_files_begin_census, store_files_end_census


cdef enum:
    COUNTED_NS = 1000000000    # how long the number of all mappings is taken for the present one
    MOST_PLACES = 64           # that are asked about one by one, some microseconds each

# All mappings, and the regions in them.
ctypedef struct counting:
    engine_core* c
    uintptr_t start              # of the regions that are counted; a mapping may have more than these
    uintptr_t end
    maps_tally tally
    uint64_t placed              # identity of what lies over the store in regions
    bint is_all                  # not of regions only
    uint8_t* is_elsewhere        # of each slot: it is mapped outside of regions; NULL: nobody asks
    uint32_t n_slots             # that it has room for

# The mappings of whole pages of one region.
ctypedef struct looking:
    engine_core* c
    uintptr_t addr
    uintptr_t end
    uint64_t placed
    size_t n_blocked             # store pages that cannot be read and written
    uintptr_t covered            # up to here they are mapped as they should be

# Neighbours in a region that lie over neighbouring slots.
ctypedef struct found_run:
    uint64_t page_no
    uint64_t n_pages
    uint64_t slot

ctypedef struct finding:
    engine_core* c
    found_run* runs
    size_t n_runs
    size_t n_bytes               # of the array
    sys_error err


cdef bint _is_our_store(engine_core* c, const vma_t* vma, uint32_t* slot) noexcept nogil:
    """*slot: the one at the beginning of the mapping; 0: what is mapped there was never handed out."""
    return store_slot_at(&c.store, vma.dev_major, vma.dev_minor, vma.inode, vma.offset, slot)


cdef bint _is_plain(const vma_t* vma, bint is_our_store) noexcept nogil:
    """Private memory that can be read and written, of no file but ours."""
    return maps_is_private_data(vma) and (vma.inode == 0 or is_our_store)


cdef inline uint64_t _identity(
    const engine_core* c, const vma_t* vma, uint32_t slot, uintptr_t start, uintptr_t end
) noexcept nogil:
    """Of a part of a mapping that begins with this slot."""
    if slot == 0:
        return 0
    return rmap_identity(
        start // c.page_bytes, slot + (start - vma.start) // c.page_bytes, (end - start) // c.page_bytes
    )


# ---- all mappings -----------------------------------------------------------------------------------

cdef void _lose_between(
    counting* all, const vma_t* vma, uint32_t slot, uintptr_t addr, uintptr_t end
) noexcept nogil:
    """Pages of a mapping of the store that are in no region: moved there, or left there, by the program; or our own
    views."""
    cdef engine_core* c = all.c
    cdef uint32_t i, found
    cdef uintptr_t view
    while addr < end and slot != 0:
        for i in range(c.store.n_segments):
            view = <uintptr_t>c.store.segments[i].view
            if view != 0 and view <= addr < view + SEGMENT_BYTES:
                addr = view + SEGMENT_BYTES
                break
        else:
            found = slot + <uint32_t>((addr - vma.start) // c.page_bytes)
            claims_lose(&c.store, found)
            if all.is_elsewhere != NULL and found < all.n_slots:
                all.is_elsewhere[found] = True
            addr += c.page_bytes


cdef void _count(const vma_t* vma, void* context) noexcept nogil:
    cdef counting* all = <counting*>context
    cdef engine_core* c = all.c
    cdef uint32_t slot = 0
    cdef bint is_ours = _is_our_store(c, vma, &slot)
    cdef bint is_plain = _is_plain(vma, is_ours)
    cdef region_t* region
    cdef uintptr_t start, end, elsewhere = vma.start
    look_tally(&all.tally, vma)
    region = regions_at(&c.regions, max(vma.start, all.start))
    while region != NULL and region.addr < min(vma.end, all.end):
        start = max(vma.start, region.addr)
        end = min(vma.end, regions_end_of(&c.regions, region))
        if is_plain:
            region.n_plain_pages += (end - start) // c.page_bytes
        if is_ours:
            if all.is_all:
                _lose_between(all, vma, slot, elsewhere, start)
            all.placed += _identity(c, vma, slot, start, end)
        elsewhere = end
        region = regions_next(&c.regions, region)
    if is_ours and all.is_all:
        _lose_between(all, vma, slot, elsewhere, vma.end)


cdef int _read_all(engine_core* c, counting* all, uint8_t* is_elsewhere, sys_error* err) noexcept nogil:
    cdef size_t i
    memset(all, 0, sizeof(counting))
    all.c = c
    all.end = UINTPTR_MAX
    all.is_all = True
    all.is_elsewhere = is_elsewhere
    all.n_slots = c.store.top
    for i in range(c.regions.n):
        c.regions.all[i].n_plain_pages = 0
    store_files_begin_census(&c.store)
    if maps_each(_count, all, err) != 0:
        return -1
    store_files_end_census(&c.store)
    return 0


cdef bint _is_counted(
    const engine_core* c, int64_t asked_maps, int64_t max_map_count, uint64_t now_ns
) noexcept nogil:
    """Is it enough to look at the mappings of regions, and are they the smaller part? How many there are in all is
    asked before something is merged (look_at_room), and whether slots are mapped elsewhere by who releases them: all
    but those that were kept for children, which a pass gives back (store_begin_pass)."""
    return (
        maps_answers() and not c.store.has_lost and c.store.n_dead == 0
        and c.counted.at_ns != 0 and now_ns - c.counted.at_ns < <uint64_t>COUNTED_NS
        and 2 * c.budget.used <= look_n_maps(c)
        and c.counted.asked_maps == asked_maps and c.counted.max_map_count == max_map_count
    )


cdef int _read_regions(engine_core* c, counting* all, sys_error* err) noexcept nogil:
    """As _read_all, with no other mappings than those of regions: 1; 0 where these lie in too many places, and all are
    to be read; -1 with *err."""
    cdef const region_t* last
    cdef size_t i, first = 0, n_places = 0
    memset(all, 0, sizeof(counting))
    all.c = c
    for i in range(c.regions.n):
        c.regions.all[i].n_plain_pages = 0
        last = &c.regions.all[i]
        if i + 1 < c.regions.n and c.regions.all[i + 1].addr == regions_end_of(&c.regions, last):
            continue
        n_places += 1
        if n_places > <size_t>MOST_PLACES:
            return 0
        all.start = c.regions.all[first].addr
        all.end = regions_end_of(&c.regions, last)
        if maps_each_in(all.start, all.end, _count, all, err) != 0:
            return -1
        first = i + 1
    return 1


cdef int _take(
    engine_core* c, uint8_t* is_elsewhere, int64_t asked_maps, int64_t max_map_count, sys_error* err
) noexcept nogil:
    """1: all was where it was remembered to be; else as census_take."""
    cdef counting all
    cdef size_t i
    cdef int rc = 0
    if _is_counted(c, asked_maps, max_map_count, sys_now_ns()):
        rc = _read_regions(c, &all, err)
    c.counted.asked_maps = asked_maps
    c.counted.max_map_count = max_map_count
    c.counted.in_pass = rc == 0
    if rc == 0:
        rc = _read_all(c, &all, is_elsewhere, err)
        look_take_room(c, &all.tally if rc == 0 else NULL)
    if rc < 0:
        c.counted.at_ns = 0
        return -1
    for i in range(c.regions.n):
        c.regions.all[i].passed_over = False
        c.regions.all[i].altered = c.regions.all[i].n_plain_pages != c.regions.all[i].n_pages
    return 1 if all.placed == c.rmap.placed else _put_right(c, err)


cdef int census_take(engine_core* c, int64_t asked_maps, int64_t max_map_count, sys_error* err) noexcept nogil:
    """At the start of a pass: count the mappings for the map budget, look for altered regions, and put right what is
    remembered of the store.

    -1 with *err when the mappings cannot be read (err.code 0: no memory for it): then nothing is to be merged, and what
    is known of the regions stays.
    """
    cdef uint32_t n_slots = c.store.top
    cdef sys_error ignored
    cdef uint8_t* is_elsewhere = NULL
    cdef int rc
    sys_error_clear(&ignored)
    # Mapped memory and no malloc, as in _put_right; without it what is lost stays so.
    if c.store.has_lost:
        is_elsewhere = <uint8_t*>sys_map_anon(n_slots, &ignored)
    rc = _take(c, is_elsewhere, asked_maps, max_map_count, err)
    if is_elsewhere != NULL:
        if rc == 1:
            store_find_again(&c.store, is_elsewhere, n_slots)
        sys_unmap(<uintptr_t>is_elsewhere, n_slots, &ignored)
    return min(rc, 0)


cdef int census_agrees(engine_core* c, sys_error* err) noexcept nogil:
    """Does what is remembered of the store agree with what is mapped? 1; or 0, and it has been put right; or -1 with
    *err: it is not known."""
    cdef counting all
    if _read_all(c, &all, NULL, err) != 0:
        return -1
    return 1 if all.placed == c.rmap.placed else min(_put_right(c, err), 0)


# ---- one region -------------------------------------------------------------------------------------

cdef void _look(const vma_t* vma, void* context) noexcept nogil:
    cdef looking* one = <looking*>context
    cdef uint32_t slot = 0
    cdef bint is_ours = _is_our_store(one.c, vma, &slot)
    cdef bint is_plain = _is_plain(vma, is_ours)
    cdef uintptr_t start = max(vma.start, one.addr)
    cdef uintptr_t end = min(vma.end, one.end)
    if is_plain and one.covered == start:
        one.covered = end
    if is_ours:
        one.placed += _identity(one.c, vma, slot, start, end)
        if not is_plain:
            one.n_blocked += (end - start) // one.c.page_bytes


cdef uint64_t _remembered(engine_core* c, uint64_t page_no, size_t n_pages) noexcept nogil:
    cdef uint64_t placed = 0
    cdef rmap_walk walk = rmap_walk_over(page_no, n_pages)
    while rmap_step(&c.rmap, &walk):
        if rmap_slot(&c.rmap, walk.item) != 0:
            placed += rmap_identity(walk.page_no, rmap_slot(&c.rmap, walk.item), 1)
    return placed


cdef int census_of_region(engine_core* c, region_t* region, size_t* n_blocked, sys_error* err) noexcept nogil:
    """census_of_range, and whether the region is altered."""
    cdef bint is_plain = not region.altered
    cdef int rc = census_of_range(c, region.addr, regions_end_of(&c.regions, region), &is_plain, n_blocked, err)
    region.altered = not is_plain or region.passed_over
    return rc


cdef int census_of_range(
    engine_core* c, uintptr_t addr, uintptr_t end, bint* is_plain, size_t* n_blocked, sys_error* err
) noexcept nogil:
    """Look at the mappings of whole pages of one region, and put right what is remembered of the store.

    *is_plain: they are plain private memory throughout; not set when the mappings cannot be read. *n_blocked: pages
    that map the store and cannot be read and written now. 1: it was as remembered; 0: it has been put right; -1 with
    *err when the mappings cannot be read (err.code 0: no memory for it).
    """
    cdef looking one
    memset(&one, 0, sizeof(looking))
    one.c = c
    one.addr = addr
    one.end = end
    one.covered = addr
    n_blocked[0] = 0
    if maps_each_in(addr, end, _look, &one, err) != 0:
        return -1
    is_plain[0] = one.covered == end
    n_blocked[0] = one.n_blocked
    if one.placed == _remembered(c, addr // c.page_bytes, (end - addr) // c.page_bytes):
        return 1
    return _put_right(c, err)


# ---- putting right ------------------------------------------------------------------------------------

cdef void _find(const vma_t* vma, void* context) noexcept nogil:
    """Note the pages of regions that lie over the store. Called for each mapping, by address."""
    cdef finding* all = <finding*>context
    cdef engine_core* c = all.c
    cdef region_t* region = regions_at(&c.regions, vma.start)
    cdef uint32_t slot = 0
    cdef uintptr_t start
    cdef void* grown
    if not _is_our_store(c, vma, &slot) or slot == 0:
        return
    while region != NULL and region.addr < vma.end and all.runs != NULL:
        if (all.n_runs + 1) * sizeof(found_run) > all.n_bytes:
            grown = sys_grow(all.runs, all.n_bytes, 2 * all.n_bytes, &all.err)
            if grown == NULL:
                _forget_runs(all)
                return
            all.runs = <found_run*>grown
            all.n_bytes *= 2
        start = max(vma.start, region.addr)
        all.runs[all.n_runs].page_no = start // c.page_bytes
        all.runs[all.n_runs].n_pages = (min(vma.end, regions_end_of(&c.regions, region)) - start) // c.page_bytes
        all.runs[all.n_runs].slot = slot + (start - vma.start) // c.page_bytes
        all.n_runs += 1
        region = regions_next(&c.regions, region)


cdef void _forget_runs(finding* all) noexcept nogil:
    cdef sys_error ignored
    sys_error_clear(&ignored)
    if all.runs != NULL:
        sys_unmap(<uintptr_t>all.runs, all.n_bytes, &ignored)
    all.runs = NULL


cdef int _put_right(engine_core* c, sys_error* err) noexcept nogil:
    """What is remembered of the store becomes what is mapped. 0; or -1 with *err, and nothing was changed.

    Mapped memory and no malloc: the allocator's lock may be held.
    """
    cdef finding all
    cdef int32_t* n_missing      # of each slot: pages that are no longer where they were, less those found elsewhere
    cdef size_t n_bytes = c.store.top * sizeof(int32_t), i, k = 0
    cdef uint32_t slot
    cdef int rc
    memset(&all, 0, sizeof(finding))
    all.c = c
    all.n_bytes = sys_page_bytes()
    all.runs = <found_run*>sys_map_anon(all.n_bytes, err)
    n_missing = <int32_t*>sys_map_anon(n_bytes, err)
    rc = -1 if all.runs == NULL or n_missing == NULL else maps_each(_find, &all, err)
    if rc == 0 and all.runs == NULL:
        err[0] = all.err
        rc = -1
    if rc == 0:
        for i in range(c.regions.n):
            _put_region_right(c, &c.regions.all[i], &all, &k, n_missing)
        for slot in range(1, c.store.top):
            if n_missing[slot] != 0:
                claims_lose(&c.store, slot)
    if n_missing != NULL:
        sys_unmap(<uintptr_t>n_missing, n_bytes, err)
    _forget_runs(&all)
    return rc


cdef void _put_region_right(
    engine_core* c, const region_t* region, const finding* all, size_t* k, int32_t* n_missing
) noexcept nogil:
    cdef uint64_t page_no = region.addr // c.page_bytes, end = page_no + region.n_pages
    cdef uint32_t item, hint = 0, slot, remembered
    cdef const found_run* run
    while page_no < end:
        while k[0] < all.n_runs and all.runs[k[0]].page_no + all.runs[k[0]].n_pages <= page_no:
            k[0] += 1
        slot = 0
        if k[0] < all.n_runs and all.runs[k[0]].page_no <= page_no:
            run = &all.runs[k[0]]
            slot = <uint32_t>min(run.slot + (page_no - run.page_no), <uint64_t>INT32_MAX)
        if slot >= c.store.top:
            slot = 0             # never handed out: nothing but zeros, of which nobody keeps account
        item = rmap_find(&c.rmap, page_no, hint)
        hint = item if item != 0 else hint
        remembered = rmap_slot(&c.rmap, item)
        if slot != remembered:
            n_missing[remembered] += 1
            n_missing[slot] -= 1
            _put_page_right(c, page_no, item, slot)
        page_no += 1


cdef void _put_page_right(engine_core* c, uint64_t page_no, uint32_t item, uint32_t slot) noexcept nogil:
    """slot: what lies under the page, other than what is remembered; 0: the store does not."""
    cdef sys_error ignored
    sys_error_clear(&ignored)
    if item == 0:
        item = rmap_add(&c.rmap, page_no, &ignored)
        if item == 0:
            claims_lose(&c.store, slot)
            return
    if c.rmap.tags[item].state == PAGE_SHARED:
        batch_drop_sharer(&c.b, item)
    match_leave_tree(c, item)
    rmap_set_state(&c.rmap, item, PAGE_VOLATILE)
    batch_lie_over(&c.b, item, slot)
    if slot != 0:
        batch_adopt(&c.b, item)
