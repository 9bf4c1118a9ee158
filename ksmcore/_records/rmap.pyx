"""Rmap items, the records of scanned virtual pages, and the rmap hash that finds them by address.

The hash is a linear one: the bucket array grows by a single bucket whenever the load passes
LOAD_ITEMS per bucket, and only the items of one bucket move then. An insertion therefore never pays
for the size of the table. The arrays themselves double by mremap, which moves page tables and no
bytes: 0.1 ms, measured at each doubling up to two million items.

A bucket belongs to a group of GROUP_PAGES neighbouring pages: bucket = group number modulo size.
Neighbours in memory so share a bucket or stand in adjacent ones, and as items are handed out in scan
order, the next page's item usually is the next item: `rmap_find` takes that guess as a hint.

Invariants, checked by `rmap_check`:
  1. every item in use is in exactly one bucket, the one of its page number;
  2. no two items have the same page number;
  3. n_items, n_by_state, n_over_store and n_left_out count the items in use, and `placed` is the sum of what lies over
     the store;
  4. the free list holds exactly the items below `top` that are not in use.
"""

from libc.stdint cimport uint32_t, uint64_t, uintptr_t
from libc.string cimport memset

from ksmcore._kernel.syscalls cimport sys_error, sys_error_clear, sys_grow, sys_map_anon, sys_unmap
from ksmcore._trees cimport rb_node

cdef enum:
    GROUP_SHIFT = 2          # 4 pages share a bucket, ...
    LOAD_ITEMS = 4           # ... so a bucket of a dense region holds just one group: 1 byte per page
    FIRST_CAPACITY = 65536   # items; grows by doubling, only touched pages cost memory; whole pages of any size
    MAX_ITEMS = 0x7fffffff   # a tree link holds 31 bits
    MIN_BUCKETS = 64


cdef inline uint32_t _bucket_of(const rmap_table* table, uint64_t page_no) noexcept nogil:
    cdef uint64_t group = page_no >> GROUP_SHIFT
    cdef uint32_t bucket = <uint32_t>(group & (2 * <uint64_t>table.bucket_base - 1))
    if bucket >= table.n_buckets:
        bucket = <uint32_t>(group & (table.bucket_base - 1))
    return bucket


cdef int rmap_init(rmap_table* table, uint32_t n_buckets, sys_error* err) noexcept nogil:
    memset(table, 0, sizeof(rmap_table))
    if n_buckets < MIN_BUCKETS:
        n_buckets = MIN_BUCKETS
    table.bucket_base = MIN_BUCKETS
    while table.bucket_base <= n_buckets // 2:
        table.bucket_base *= 2
    table.n_buckets = n_buckets
    table.bucket_capacity = n_buckets
    table.capacity = FIRST_CAPACITY
    table.top = 1
    table.buckets = <uint32_t*>sys_map_anon(<size_t>n_buckets * sizeof(uint32_t), err)
    table.nodes = <rb_node*>sys_map_anon(<size_t>FIRST_CAPACITY * sizeof(rb_node), err)
    table.tags = <rmap_tag*>sys_map_anon(<size_t>FIRST_CAPACITY * sizeof(rmap_tag), err)
    table.nexts = <uint32_t*>sys_map_anon(<size_t>FIRST_CAPACITY * sizeof(uint32_t), err)
    table.slots = <uint32_t*>sys_map_anon(<size_t>FIRST_CAPACITY * sizeof(uint32_t), err)
    if (
        table.buckets == NULL or table.nodes == NULL or table.tags == NULL or table.nexts == NULL
        or table.slots == NULL
    ):
        rmap_destroy(table)
        return -1
    return 0


cdef void _unmap_array(void* array, size_t len_bytes) noexcept nogil:
    cdef sys_error ignored
    sys_error_clear(&ignored)
    # Unchecked: munmap of a whole mapping of our own fails only on a broken argument.
    if array != NULL:
        sys_unmap(<uintptr_t>array, len_bytes, &ignored)


cdef void rmap_destroy(rmap_table* table) noexcept nogil:
    _unmap_array(table.buckets, <size_t>table.bucket_capacity * sizeof(uint32_t))
    _unmap_array(table.nodes, <size_t>table.capacity * sizeof(rb_node))
    _unmap_array(table.tags, <size_t>table.capacity * sizeof(rmap_tag))
    _unmap_array(table.nexts, <size_t>table.capacity * sizeof(uint32_t))
    _unmap_array(table.slots, <size_t>table.capacity * sizeof(uint32_t))
    memset(table, 0, sizeof(rmap_table))


cdef uint32_t rmap_find(rmap_table* table, uint64_t page_no, uint32_t hint) noexcept nogil:
    """The item of a page, or 0. `hint`: the item of the page before it, or 0."""
    cdef uint32_t item = hint + 1
    if hint != 0 and item < table.top and table.tags[item].page_no == page_no:
        return item
    item = table.buckets[_bucket_of(table, page_no)]
    while item != 0 and table.tags[item].page_no != page_no:
        item = table.nexts[item]
    return item


cdef uint32_t rmap_next(rmap_table* table, uint64_t* page_no, uint64_t end_no, uint32_t hint) noexcept nogil:
    """The item of the first page from *page_no on that has one, which *page_no is then; 0, and *page_no is end_no,
    where there is none before that. `hint`: as for rmap_find.

    A gap longer than the table is not walked over: then the table is, once for the gap. So it never takes longer than
    twice what finding each page of the range would."""
    cdef uint64_t probed_no = page_no[0] + table.top, next_no = end_no
    cdef uint32_t item, found = 0
    while page_no[0] < end_no and page_no[0] <= probed_no:
        item = rmap_find(table, page_no[0], hint)
        if item != 0:
            return item
        page_no[0] += 1
    if page_no[0] < end_no:
        for item in range(1, table.top):
            if page_no[0] <= table.tags[item].page_no < next_no:
                found = item
                next_no = table.tags[item].page_no
    page_no[0] = next_no
    return found


cdef rmap_walk rmap_walk_over(uint64_t page_no, size_t n_pages) noexcept nogil:
    cdef rmap_walk walk
    walk.next_no = walk.page_no = page_no
    walk.end_no = page_no + n_pages
    walk.item = 0
    return walk


cdef bint rmap_step(rmap_table* table, rmap_walk* walk) noexcept nogil:
    """On to the next page that has an item; False at the end. The present item may be gone."""
    walk.page_no = walk.next_no
    walk.item = rmap_next(table, &walk.page_no, walk.end_no, walk.item)
    walk.next_no = walk.page_no + (walk.item != 0)
    return walk.item != 0


cdef bint _grow_array(void** array, size_t n_before, size_t n_after, size_t item_bytes, sys_error* err) noexcept nogil:
    cdef void* grown = sys_grow(array[0], n_before * item_bytes, n_after * item_bytes, err)
    if grown != NULL:
        array[0] = grown
    return grown != NULL


cdef int _grow_items(rmap_table* table, sys_error* err) noexcept nogil:
    """Double the four arrays. When one cannot grow, those that grew before it are shrunk back."""
    cdef void** arrays[4]
    cdef size_t item_bytes[4]
    cdef size_t n_before = table.capacity, n_after = min(2 * n_before, <size_t>MAX_ITEMS)
    cdef int i, n_grown = 0
    arrays[0] = <void**>&table.nodes
    arrays[1] = <void**>&table.tags
    arrays[2] = <void**>&table.nexts
    arrays[3] = <void**>&table.slots
    item_bytes[0] = sizeof(rb_node)
    item_bytes[1] = sizeof(rmap_tag)
    item_bytes[2] = item_bytes[3] = sizeof(uint32_t)
    if n_before >= n_after:
        return -1
    while n_grown < 4 and _grow_array(arrays[n_grown], n_before, n_after, item_bytes[n_grown], err):
        n_grown += 1
    if n_grown < 4:
        for i in range(n_grown):
            _unmap_array(<char*>arrays[i][0] + n_before * item_bytes[i], (n_after - n_before) * item_bytes[i])
        return -1
    table.capacity = <uint32_t>n_after
    return 0


cdef void _grow_buckets(rmap_table* table) noexcept nogil:
    """Add one bucket: the items of one old bucket are dealt out between it and the new one.

    Where no memory is to be had for the array, the table goes on with longer buckets.
    """
    cdef uint32_t item, next_item, source
    cdef uint32_t* link
    cdef void* grown
    cdef sys_error ignored
    sys_error_clear(&ignored)
    if table.n_buckets == table.bucket_capacity:
        grown = sys_grow(
            table.buckets,
            <size_t>table.bucket_capacity * sizeof(uint32_t),
            <size_t>table.bucket_capacity * 2 * sizeof(uint32_t),
            &ignored,
        )
        if grown == NULL:
            return
        table.buckets = <uint32_t*>grown
        table.bucket_capacity *= 2
    if table.n_buckets == 2 * table.bucket_base:
        table.bucket_base *= 2
    source = table.n_buckets - table.bucket_base
    table.n_buckets += 1
    table.buckets[table.n_buckets - 1] = 0
    link = &table.buckets[source]
    while link[0] != 0:
        item = link[0]
        if _bucket_of(table, table.tags[item].page_no) == source:
            link = &table.nexts[item]
        else:
            next_item = table.nexts[item]
            link[0] = next_item
            table.nexts[item] = table.buckets[table.n_buckets - 1]
            table.buckets[table.n_buckets - 1] = item


cdef uint32_t rmap_add(rmap_table* table, uint64_t page_no, sys_error* err) noexcept nogil:
    """Make an item for a page that has none; it starts VOLATILE. 0 when there is no memory for it."""
    cdef uint32_t item = table.free_head
    cdef uint32_t bucket
    if item != 0:
        table.free_head = table.nexts[item]
    else:
        if table.top == table.capacity and _grow_items(table, err) != 0:
            return 0
        item = table.top
        table.top += 1
    memset(&table.nodes[item], 0, sizeof(rb_node))
    memset(&table.tags[item], 0, sizeof(rmap_tag))
    table.tags[item].page_no = page_no
    table.tags[item].state = PAGE_VOLATILE
    bucket = _bucket_of(table, page_no)
    table.nexts[item] = table.buckets[bucket]
    table.buckets[bucket] = item
    table.n_items += 1
    table.n_by_state[<int>PAGE_VOLATILE] += 1
    if table.n_items > <uint64_t>table.n_buckets * LOAD_ITEMS:
        _grow_buckets(table)
    return item


cdef void rmap_remove(rmap_table* table, uint32_t item) noexcept nogil:
    """Forget an item; the caller has taken it out of its tree, and it lies over no slot."""
    cdef uint32_t* link = &table.buckets[_bucket_of(table, table.tags[item].page_no)]
    while link[0] != item:
        link = &table.nexts[link[0]]
    link[0] = table.nexts[item]
    rmap_set_left_out(table, item, False)
    table.n_by_state[<int>table.tags[item].state] -= 1
    table.n_items -= 1
    table.tags[item].page_no = 0
    table.nexts[item] = table.free_head
    table.free_head = item


cdef void rmap_set_slot(rmap_table* table, uint32_t item, uint32_t slot) noexcept nogil:
    """What the page's mapping points at; 0: not at the store. The store counts such pages too: see claims."""
    cdef uint64_t page_no = table.tags[item].page_no
    cdef uint32_t before = rmap_slot(table, item)
    if before != 0:
        table.placed -= rmap_identity(page_no, before, 1)
    if slot != 0:
        table.placed += rmap_identity(page_no, slot, 1)
    table.n_over_store += <int>(slot != 0) - <int>(before != 0)
    table.tags[item].over_store = slot != 0
    if before != slot:
        _keep_slot(table, item, slot)


cdef void _keep_slot(rmap_table* table, uint32_t item, uint32_t slot) noexcept nogil:
    if table.tags[item].state == PAGE_SHARED:
        table.nodes[item].left = slot
    else:
        table.slots[item] = slot


cdef void rmap_set_left_out(rmap_table* table, uint32_t item, bint is_left_out) noexcept nogil:
    table.n_left_out += <int>is_left_out - <int>table.tags[item].left_out
    table.tags[item].left_out = is_left_out


cdef void rmap_set_state(rmap_table* table, uint32_t item, page_state state) noexcept nogil:
    """What is said of a look before is void. The item is in no tree, or stays where it is."""
    cdef uint32_t slot = rmap_slot(table, item)
    rmap_set_left_out(table, item, False)
    table.n_by_state[<int>table.tags[item].state] -= 1
    table.n_by_state[<int>state] += 1
    table.tags[item].state = state
    if slot != 0 and rmap_slot(table, item) != slot:
        _keep_slot(table, item, slot)


cdef void rmap_forget_epochs(rmap_table* table) noexcept nogil:
    """Let no item stand in the unstable tree any more; once every 255 passes, when epochs wrap."""
    cdef uint32_t item
    for item in range(1, table.top):
        table.tags[item].epoch = 0


cdef size_t rmap_bytes(rmap_table* table) noexcept nogil:
    """Bytes of metadata in use: touched items, and buckets."""
    return (
        <size_t>table.top * (sizeof(rb_node) + sizeof(rmap_tag) + sizeof(uint32_t))
        + (<size_t>table.n_over_store - table.n_by_state[<int>PAGE_SHARED] + table.n_buckets) * sizeof(uint32_t)
    )


cdef int rmap_check(rmap_table* table) noexcept nogil:
    """0, or the number of the first broken invariant."""
    cdef uint32_t bucket, item, other
    cdef uint64_t n_chained = 0, n_free = 0, n_over_store = 0, n_left_out = 0, placed = 0
    cdef uint64_t by_state[<int>N_STATES]
    cdef int state
    memset(by_state, 0, sizeof(by_state))
    for bucket in range(table.n_buckets):
        item = table.buckets[bucket]
        while item != 0:
            if table.tags[item].page_no == 0 or _bucket_of(table, table.tags[item].page_no) != bucket:
                return 1
            other = table.nexts[item]
            while other != 0:
                if table.tags[other].page_no == table.tags[item].page_no:
                    return 2
                other = table.nexts[other]
            by_state[table.tags[item].state] += 1
            n_over_store += table.tags[item].over_store
            n_left_out += table.tags[item].left_out
            if table.tags[item].over_store != (rmap_slot(table, item) != 0):
                return 3
            if rmap_slot(table, item) != 0:
                placed += rmap_identity(table.tags[item].page_no, rmap_slot(table, item), 1)
            n_chained += 1
            if n_chained > table.n_items:
                return 3
            item = table.nexts[item]
    if n_chained != table.n_items or n_over_store != table.n_over_store or placed != table.placed:
        return 3
    if n_left_out != table.n_left_out:
        return 3
    for state in range(<int>N_STATES):
        if by_state[state] != table.n_by_state[state]:
            return 3
    item = table.free_head
    while item != 0:
        n_free += 1
        if table.tags[item].page_no != 0 or n_free > table.top:
            return 4
        item = table.nexts[item]
    return 0 if n_free + table.n_items + 1 == table.top else 4
