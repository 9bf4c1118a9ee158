"""Chunks of pages, cut into extents that are taken or free: the bookkeeping of the arena, which owns the memory.

The caller holds the arena's lock.

What is known of an extent stands in the tags of its first and its last page, so its neighbours are found without a
search (boundary tags: Knuth, The Art of Computer Programming, vol. 1, 2.5). Free extents hang in bins by their length,
eight for each power of two (after TLSF: Masmano et al. 2004). Neighbours that are free and in the same state are one
extent always. Chunks that one array has as a whole have no tags.
"""

from libc.stdint cimport uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport realloc
from libc.string cimport memmove, memset

from ksmcore._records.ranges cimport range_list, ranges_add

cdef extern from *:
    int __builtin_clz(unsigned int x) nogil
    int __builtin_ctzll(unsigned long long x) nogil

cdef enum:
    MAX_CHUNKS = 1 << 17       # page numbers over all chunks have 32 bits
    BINS_SEARCHED = 16         # extents of the request's own bin that are looked at


cdef void chunks_init(chunk_table* t, size_t page_bytes, size_t chunk_bytes) noexcept nogil:
    memset(t, 0, sizeof(chunk_table))
    t.page_bytes = page_bytes
    t.chunk_pages = <uint32_t>(chunk_bytes // page_bytes)
    chunks_clear_bins(t)


# ---- extents ----------------------------------------------------------------------------------------

cdef void chunks_clear_bins(chunk_table* t) noexcept nogil:
    cdef int kind, state
    for kind in range(2):
        for state in range(3):
            memset(&t.bins[kind][state], 0, sizeof(bin_list))
            memset(t.bins[kind][state].heads, 0xff, sizeof(t.bins[kind][state].heads))


cdef uint32_t chunks_bin(size_t n_pages) noexcept nogil:
    """0 to 15 pages have a bin each; from there on eight bins share each power of two."""
    cdef uint32_t log2
    if n_pages < 16:
        return <uint32_t>n_pages
    log2 = 31 - <uint32_t>__builtin_clz(<unsigned int>n_pages)
    return 16 + (log2 - 4) * 8 + ((<uint32_t>n_pages >> (log2 - 3)) & 7)


cdef extent_tag* chunks_tag(const chunk_table* t, uint32_t page) noexcept nogil:
    return &t.all[page // t.chunk_pages].tags[page % t.chunk_pages]


cdef void _mark(chunk_table* t, uint32_t first, size_t n_pages, extent_state state) noexcept nogil:
    cdef extent_tag* tag = chunks_tag(t, first)
    tag.n_pages = <uint32_t>n_pages
    tag.state = state
    tag = chunks_tag(t, first + <uint32_t>n_pages - 1)
    tag.n_pages = <uint32_t>n_pages
    tag.state = state


cdef bin_list* _bins_of(chunk_table* t, uint32_t page, uint32_t state) noexcept nogil:
    return &t.bins[t.all[page // t.chunk_pages].wants_huge][state]


cdef void _hang(chunk_table* t, uint32_t first, size_t n_pages, extent_state state) noexcept nogil:
    """Mark pages as a free extent, and put it in its bin."""
    cdef bin_list* bins = _bins_of(t, first, state)
    cdef uint32_t number = chunks_bin(n_pages)
    cdef extent_tag* tag = chunks_tag(t, first)
    _mark(t, first, n_pages, state)
    tag.prev = NO_PAGE
    tag.next = bins.heads[number]
    if tag.next != NO_PAGE:
        chunks_tag(t, tag.next).prev = first
    bins.heads[number] = first
    bins.filled[number // 64] |= <uint64_t>1 << (number % 64)
    if state == DIRTY:
        t.dirty_bytes += n_pages * t.page_bytes


cdef size_t _unhang(chunk_table* t, uint32_t first) noexcept nogil:
    """Take a free extent out of its bin; returns its length in pages."""
    cdef extent_tag* tag = chunks_tag(t, first)
    cdef bin_list* bins = _bins_of(t, first, tag.state)
    cdef uint32_t number = chunks_bin(tag.n_pages)
    if tag.prev != NO_PAGE:
        chunks_tag(t, tag.prev).next = tag.next
    else:
        bins.heads[number] = tag.next
        if tag.next == NO_PAGE:
            bins.filled[number // 64] &= ~(<uint64_t>1 << (number % 64))
    if tag.next != NO_PAGE:
        chunks_tag(t, tag.next).prev = tag.prev
    if tag.state == DIRTY:
        t.dirty_bytes -= <size_t>tag.n_pages * t.page_bytes
    return tag.n_pages


cdef uint32_t chunks_find(
    const chunk_table* t, bint wants_huge, extent_state state, size_t n_pages
) noexcept nogil:
    """A free extent of at least so many pages, or NO_PAGE."""
    cdef const bin_list* bins = &t.bins[wants_huge][<int>state]
    cdef uint32_t number = chunks_bin(n_pages), tries = 0, word
    cdef uint32_t first = bins.heads[number]
    cdef uint64_t filled
    while first != NO_PAGE and tries < BINS_SEARCHED:
        if chunks_tag(t, first).n_pages >= n_pages:
            return first
        first = chunks_tag(t, first).next
        tries += 1
    number += 1
    word = number // 64
    if number >= <uint32_t>N_BINS:
        return NO_PAGE
    filled = bins.filled[word] & (~<uint64_t>0 << (number % 64))
    while filled == 0:
        word += 1
        if word == <uint32_t>N_WORDS:
            return NO_PAGE
        filled = bins.filled[word]
    return bins.heads[word * 64 + <uint32_t>__builtin_ctzll(filled)]


cdef size_t chunks_before(const chunk_table* t, uint32_t first, extent_state state) noexcept nogil:
    """Length of the extent before one that begins with page `first`, 0 if there is none in this state."""
    if first % t.chunk_pages == 0 or chunks_tag(t, first - 1).state != state:
        return 0
    return chunks_tag(t, first - 1).n_pages


cdef size_t chunks_behind(const chunk_table* t, uint32_t end, extent_state state) noexcept nogil:
    """Length of the extent that begins with page `end`, where another ends; 0 if there is none in this state."""
    if end % t.chunk_pages == 0 or chunks_tag(t, end).state != state:
        return 0
    return chunks_tag(t, end).n_pages


cdef void chunks_each_edge(const chunk_table* t, size_t unit_pages, chunk_act act) noexcept nogil:
    """Of the clean extents in chunks that want huge pages, what lies in a unit (a huge page) with pages of others:
    the act may not change extents."""
    cdef const bin_list* bins = &t.bins[True][<int>CLEAN]
    cdef int number
    cdef uint32_t first
    cdef size_t n_pages, before, behind
    for number in range(N_BINS):
        first = bins.heads[number]
        while first != NO_PAGE:
            n_pages = chunks_tag(t, first).n_pages
            before = min((unit_pages - first % unit_pages) % unit_pages, n_pages)
            behind = min((first + n_pages) % unit_pages, n_pages - before)
            if before > 0:
                act(&t.all[first // t.chunk_pages], chunks_addr(t, first), before)
            if behind > 0:
                act(&t.all[first // t.chunk_pages], chunks_addr(t, first + <uint32_t>(n_pages - behind)), behind)
            first = chunks_tag(t, first).next


cdef void _release(chunk_table* t, uint32_t first, size_t n_pages, extent_state state) noexcept nogil:
    """Pages become a free extent, one with its free neighbours of the same state."""
    cdef size_t before = chunks_before(t, first, state)
    if before > 0:
        first -= <uint32_t>before
        n_pages += _unhang(t, first)
    if chunks_behind(t, first + <uint32_t>n_pages, state) > 0:
        n_pages += _unhang(t, first + <uint32_t>n_pages)
    _hang(t, first, n_pages, state)


cdef void _note_dirty(chunk_table* t) noexcept nogil:
    """After extents ceased to be dirty, once those that go on to be so hang again."""
    t.idle_bytes = min(t.idle_bytes, t.dirty_bytes)


cdef void chunks_take(chunk_table* t, uint32_t first, size_t n_pages, uint32_t at) noexcept nogil:
    """Take the first pages of a free extent."""
    cdef extent_state state = <extent_state>chunks_tag(t, first).state
    cdef size_t length = _unhang(t, first)
    if length > n_pages:
        _hang(t, first + <uint32_t>n_pages, length - n_pages, state)
    _note_dirty(t)
    _mark(t, first, n_pages, TAKEN)
    chunks_tag(t, first).next = at
    t.all[first // t.chunk_pages].n_taken += n_pages
    t.taken_bytes += n_pages * t.page_bytes
    t.peak_bytes = max(t.peak_bytes, t.taken_bytes)


cdef bint chunks_extend(chunk_table* t, uint32_t first, size_t n_pages, uint32_t at) noexcept nogil:
    """Have a taken extent reach over the free one behind it, for n_pages in all; False where that is too short."""
    cdef size_t before = chunks_tag(t, first).n_pages
    cdef uint32_t end = first + <uint32_t>before
    if n_pages > before:
        if max(chunks_behind(t, end, DIRTY), chunks_behind(t, end, CLEAN)) < n_pages - before:
            return False
        chunks_take(t, end, n_pages - before, at)
        _mark(t, first, n_pages, TAKEN)
    return True


cdef void chunks_give(chunk_table* t, uint32_t first, size_t n_pages) noexcept nogil:
    """Give back the last pages of a taken extent, or all of it, from page `first` on: dirty."""
    cdef extent_tag* last = chunks_tag(t, first + <uint32_t>n_pages - 1)
    if last.n_pages > n_pages:
        _mark(t, first + <uint32_t>n_pages - last.n_pages, last.n_pages - n_pages, TAKEN)
    t.all[first // t.chunk_pages].n_taken -= n_pages
    t.taken_bytes -= n_pages * t.page_bytes
    _release(t, first, n_pages, DIRTY)


cdef void chunks_clean(chunk_table* t, uint32_t first, size_t n_pages) noexcept nogil:
    """The last pages of a dirty extent, or all of it, were discarded."""
    cdef size_t left = _unhang(t, first) - n_pages
    if left > 0:
        _hang(t, first, left, DIRTY)
    _note_dirty(t)
    _release(t, first + <uint32_t>left, n_pages, CLEAN)


cdef void chunks_unhang_all(chunk_table* t, uint32_t entry) noexcept nogil:
    """Before a chunk of free extents is dropped."""
    cdef uint32_t page = entry * t.chunk_pages, end = page + t.chunk_pages
    while page < end:
        page += <uint32_t>_unhang(t, page)
    _note_dirty(t)


# ---- chunks -----------------------------------------------------------------------------------------

cdef uint32_t _rank(const chunk_table* t, uintptr_t addr) noexcept nogil:
    """How many chunks begin at or below `addr`."""
    cdef uint32_t low = 0, high = t.n, middle
    while low < high:
        middle = (low + high) // 2
        if t.all[t.by_addr[middle]].addr <= addr:
            low = middle + 1
        else:
            high = middle
    return low


cdef uint32_t chunks_at(const chunk_table* t, uintptr_t addr) noexcept nogil:
    """The entry of the chunk that holds `addr`, or NO_PAGE."""
    cdef uint32_t rank = _rank(t, addr)
    cdef const chunk_t* chunk
    if rank == 0:
        return NO_PAGE
    chunk = &t.all[t.by_addr[rank - 1]]
    return t.by_addr[rank - 1] if addr < chunk.addr + chunk.n_pages * t.page_bytes else NO_PAGE


cdef uintptr_t chunks_addr(const chunk_table* t, uint32_t page) noexcept nogil:
    return t.all[page // t.chunk_pages].addr + page % t.chunk_pages * t.page_bytes


cdef uint32_t chunks_page(const chunk_table* t, uint32_t entry, uintptr_t addr) noexcept nogil:
    """The number of a page of the chunk with this entry."""
    return entry * t.chunk_pages + <uint32_t>((addr - t.all[entry].addr) // t.page_bytes)


cdef int _reserve(chunk_table* t) noexcept nogil:
    """Room for one chunk more in both arrays."""
    cdef void* grown
    cdef uint32_t wanted = 2 * t.capacity + 16
    if t.n_entries < t.capacity:
        return 0
    if wanted > <uint32_t>MAX_CHUNKS:
        return -1
    grown = realloc(t.all, wanted * sizeof(chunk_t))
    if grown == NULL:
        return -1
    t.all = <chunk_t*>grown
    grown = realloc(t.by_addr, wanted * sizeof(uint32_t))
    if grown == NULL:
        return -1
    t.by_addr = <uint32_t*>grown
    t.capacity = wanted
    return 0


cdef uint32_t chunks_enter(chunk_table* t, const chunk_t* chunk) noexcept nogil:
    """Enter a chunk, with tags as one clean extent, without as taken; returns its entry, NO_PAGE without memory."""
    cdef uint32_t entry = 0, rank
    if _reserve(t) != 0:
        return NO_PAGE
    while entry < t.n_entries and t.all[entry].addr != 0:
        entry += 1
    if entry == t.n_entries:
        t.n_entries += 1
    rank = _rank(t, chunk.addr)
    memmove(&t.by_addr[rank + 1], &t.by_addr[rank], (t.n - rank) * sizeof(uint32_t))
    t.by_addr[rank] = entry
    t.n += 1
    t.all[entry] = chunk[0]
    t.mapped_bytes += chunk.n_pages * t.page_bytes
    if chunk.tags != NULL:
        _hang(t, entry * t.chunk_pages, chunk.n_pages, CLEAN)
    else:
        t.all[entry].n_taken = chunk.n_pages
        t.taken_bytes += chunk.n_pages * t.page_bytes
        t.peak_bytes = max(t.peak_bytes, t.taken_bytes)
    return entry


cdef void chunks_drop(chunk_table* t, uint32_t entry) noexcept nogil:
    """Forget a chunk that hangs in no bin."""
    cdef uint32_t rank = _rank(t, t.all[entry].addr) - 1
    t.n -= 1
    memmove(&t.by_addr[rank], &t.by_addr[rank + 1], (t.n - rank) * sizeof(uint32_t))
    t.mapped_bytes -= t.all[entry].n_pages * t.page_bytes
    t.taken_bytes -= t.all[entry].n_taken * t.page_bytes
    memset(&t.all[entry], 0, sizeof(chunk_t))


cdef uint32_t chunks_time(uint64_t now_ns) noexcept nogil:
    """As the table keeps it: in about milliseconds, for weeks."""
    return <uint32_t>(now_ns >> 20)


cdef bint chunks_ranges(
    const chunk_table* t, uint32_t generation, bint settled, uint32_t now, uint32_t age, range_list* ranges
) noexcept nogil:
    """Add what is settled, or what is not, of the chunks of this process, by address, neighbours within a chunk as one;
    False without memory for all. Settled is what was taken `age` ago or more; free memory is not."""
    cdef const chunk_t* chunk
    cdef uintptr_t start, addr, end
    cdef uint32_t rank, taken_at
    cdef const extent_tag* tag
    cdef bint is_settled
    for rank in range(t.n):
        chunk = &t.all[t.by_addr[rank]]
        if chunk.generation != generation:
            continue
        start = addr = chunk.addr
        end = addr + chunk.n_pages * t.page_bytes
        while addr < end:
            tag = NULL if chunk.tags == NULL else &chunk.tags[(addr - chunk.addr) // t.page_bytes]
            taken_at = chunk.taken_at if tag == NULL else tag.next
            is_settled = (tag == NULL or tag.state == TAKEN) and now - taken_at >= age
            if is_settled != settled:
                if start < addr and not ranges_add(ranges, start, addr, 1):
                    return False
                start = addr + (chunk.n_pages if tag == NULL else tag.n_pages) * t.page_bytes
            addr += (chunk.n_pages if tag == NULL else tag.n_pages) * t.page_bytes
        if start < end and not ranges_add(ranges, start, end, 1):
            return False
    return True
