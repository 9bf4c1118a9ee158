"""Memory for many large arrays, in few regions: whole pages, handed out from chunks that are registered as a whole.

Called by: _allocator. Calls: _registry (the core that the chunks are registered with), _forks, _sys.

A chunk is CHUNK_BYTES of anonymous memory; an array that needs more than half of that gets a chunk of its own. A
chunk is cut into extents. What is known of an extent stands in the tags of its first and its last page, so its
neighbours are found without a search (boundary tags, Knuth, TAOCP vol. 1, 2.5); free extents hang in bins by their
length, eight for each power of two (after TLSF, Masmano et al. 2004).

A free extent is clean, where it shows zeros and holds no memory, or dirty. Dirty ones are handed out again first,
since their pages are at hand; when they come to more than MAX_DIRTY_BYTES the longest are discarded: the core
forgets what it knew of their pages, the kernel takes their memory. So of freed memory not more than that is kept,
or scanned.

Chunks for arrays of HUGE_BYTES and more ask for huge pages, as NumPy's own allocator does.

One lock guards all of it. It is taken with and without the GIL, and under it nothing runs that could want the GIL: so a
chunk is made before the lock is taken. The core's lock may be taken under it, never the other way about. A fork
waits for it. The chunks that a forked child inherits are its parent's: they are registered with nobody there, are
given back when they are freed, and nothing is handed out from them.
"""

from libc.stdint cimport UINT32_MAX, uint8_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memmove, memset

from cpython.ref cimport Py_INCREF

from ksmcore._forks cimport gate_generation
from ksmcore._merge cimport REGION_HUGEPAGE
from ksmcore._registry cimport Registry
from ksmcore._sys cimport (
    ADVISE_DONTNEED, ADVISE_HUGEPAGE, error_clear, sys_advise, sys_error, sys_map_anon, sys_map_anon_at,
    sys_page_bytes, sys_unmap,
)

cdef extern from *:
    """
    #include <pthread.h>

    static pthread_mutex_t arena_mutex = PTHREAD_MUTEX_INITIALIZER;
    static void arena_lock(void) { pthread_mutex_lock(&arena_mutex); }
    static void arena_unlock(void) { pthread_mutex_unlock(&arena_mutex); }
    static void arena_renew(void) { pthread_mutex_init(&arena_mutex, 0); }

    typedef struct {
        unsigned n_pages : 30;
        unsigned state : 2;
        unsigned next, prev;
    } extent_tag;
    """
    void arena_lock() noexcept nogil
    void arena_unlock() noexcept nogil
    void arena_renew() noexcept nogil
    int pthread_atfork(
        void (*prepare)() noexcept nogil, void (*parent)() noexcept nogil, void (*child)() noexcept nogil
    )
    # Of one page. n_pages and state count for the first and the last page of an extent; the links, for the first
    # page of a free one: its neighbours in the bin, as page numbers over all chunks, NO_PAGE at the ends.
    ctypedef struct extent_tag:
        uint32_t n_pages
        uint32_t state
        uint32_t next
        uint32_t prev
    int __builtin_clz(unsigned int x) nogil
    int __builtin_ctzll(unsigned long long x) nogil

cdef enum:
    CHUNK_BYTES = 64 << 20
    HUGE_BYTES = 4 << 20
    HUGE_PAGE_BYTES = 2 << 20
    MAX_DIRTY_BYTES = 32 << 20
    MAX_CHUNKS = 1 << 17       # page numbers over all chunks have 32 bits
    N_BINS = 160
    N_WORDS = 3                # of 64 bins each
    BINS_SEARCHED = 16         # extents of the request's own bin that are looked at

cdef enum extent_state:
    TAKEN
    CLEAN
    DIRTY

cdef uint32_t NO_PAGE = UINT32_MAX


ctypedef struct chunk_t:
    uintptr_t addr             # 0: this entry is free
    size_t n_pages
    size_t n_taken
    uint64_t region_id
    uint32_t generation        # of the process that made it
    bint wants_huge
    extent_tag* tags           # NULL: one array has all of it

# The free extents of one state, in chunks of one kind.
ctypedef struct bin_list:
    uint32_t heads[N_BINS]
    uint64_t filled[N_WORDS]

# What is handed out, for numbers() and the decision to discard.
ctypedef struct arena_numbers:
    size_t n_chunks
    size_t mapped_bytes
    size_t taken_bytes
    size_t dirty_bytes

cdef size_t _page_bytes = sys_page_bytes()
cdef uint32_t _chunk_pages = <uint32_t>(CHUNK_BYTES // sys_page_bytes())
cdef chunk_t* _chunks = NULL
cdef uint32_t _n_entries = 0           # of _chunks in use or free again
cdef uint32_t _capacity = 0
cdef uint32_t* _by_addr = NULL         # entries of the chunks there are, by address
cdef uint32_t _n_chunks = 0
cdef bin_list _bins[2][3]              # by huge pages wanted, and state; those of TAKEN are not used
cdef arena_numbers _numbers
cdef size_t _trim_above = MAX_DIRTY_BYTES
cdef uint64_t _last_region_id = <uint64_t>1 << 63   # engines count theirs from 1
cdef void* _core = NULL                # a Registry that is never given back
cdef bint _wants_huge = False


# ---- bins -------------------------------------------------------------------------------------------

cdef void _clear_bins() noexcept nogil:
    cdef int kind, state
    for kind in range(2):
        for state in range(3):
            memset(&_bins[kind][state], 0, sizeof(bin_list))
            memset(_bins[kind][state].heads, 0xff, sizeof(_bins[kind][state].heads))


cdef uint32_t _bin_of(size_t n_pages) noexcept nogil:
    """0 to 15 pages have a bin each; from there on eight bins share each power of two."""
    cdef uint32_t log2
    if n_pages < 16:
        return <uint32_t>n_pages
    log2 = 31 - <uint32_t>__builtin_clz(<unsigned int>n_pages)
    return 16 + (log2 - 4) * 8 + ((<uint32_t>n_pages >> (log2 - 3)) & 7)


cdef extent_tag* _tag(uint32_t page) noexcept nogil:
    return &_chunks[page // _chunk_pages].tags[page % _chunk_pages]


cdef void _mark(uint32_t first, size_t n_pages, extent_state state) noexcept nogil:
    cdef extent_tag* tag = _tag(first)
    tag.n_pages = <uint32_t>n_pages
    tag.state = state
    tag = _tag(first + <uint32_t>n_pages - 1)
    tag.n_pages = <uint32_t>n_pages
    tag.state = state


cdef bin_list* _bins_of(uint32_t page, uint32_t state) noexcept nogil:
    return &_bins[_chunks[page // _chunk_pages].wants_huge][state]


cdef void _hang(uint32_t first, size_t n_pages, extent_state state) noexcept nogil:
    """Mark pages as a free extent, and put it in its bin."""
    cdef bin_list* bins = _bins_of(first, state)
    cdef uint32_t number = _bin_of(n_pages)
    cdef extent_tag* tag = _tag(first)
    _mark(first, n_pages, state)
    tag.prev = NO_PAGE
    tag.next = bins.heads[number]
    if tag.next != NO_PAGE:
        _tag(tag.next).prev = first
    bins.heads[number] = first
    bins.filled[number // 64] |= <uint64_t>1 << (number % 64)
    if state == DIRTY:
        _numbers.dirty_bytes += n_pages * _page_bytes


cdef size_t _unhang(uint32_t first) noexcept nogil:
    """Take a free extent out of its bin; returns its length in pages."""
    cdef extent_tag* tag = _tag(first)
    cdef bin_list* bins = _bins_of(first, tag.state)
    cdef uint32_t number = _bin_of(tag.n_pages)
    if tag.prev != NO_PAGE:
        _tag(tag.prev).next = tag.next
    else:
        bins.heads[number] = tag.next
        if tag.next == NO_PAGE:
            bins.filled[number // 64] &= ~(<uint64_t>1 << (number % 64))
    if tag.next != NO_PAGE:
        _tag(tag.next).prev = tag.prev
    if tag.state == DIRTY:
        _numbers.dirty_bytes -= <size_t>tag.n_pages * _page_bytes
    return tag.n_pages


cdef uint32_t _find(const bin_list* bins, size_t n_pages) noexcept nogil:
    """A free extent of at least so many pages, or NO_PAGE."""
    cdef uint32_t number = _bin_of(n_pages), tries = 0, word
    cdef uint32_t first = bins.heads[number]
    cdef uint64_t filled
    while first != NO_PAGE and tries < BINS_SEARCHED:
        if _tag(first).n_pages >= n_pages:
            return first
        first = _tag(first).next
        tries += 1
    number += 1
    word = number // 64
    if number >= N_BINS:
        return NO_PAGE
    filled = bins.filled[word] & (~<uint64_t>0 << (number % 64))
    while filled == 0:
        word += 1
        if word == N_WORDS:
            return NO_PAGE
        filled = bins.filled[word]
    return bins.heads[word * 64 + <uint32_t>__builtin_ctzll(filled)]


cdef void _release(uint32_t first, size_t n_pages, extent_state state) noexcept nogil:
    """Pages become a free extent, one with its free neighbours of the same state."""
    cdef uint32_t within = first % _chunk_pages, length
    if within > 0 and _tag(first - 1).state == state:
        length = _tag(first - 1).n_pages
        _unhang(first - length)
        first -= length
        within -= length
        n_pages += length
    if within + n_pages < _chunk_pages and _tag(first + <uint32_t>n_pages).state == state:
        n_pages += _unhang(first + <uint32_t>n_pages)
    _hang(first, n_pages, state)


# ---- chunks -----------------------------------------------------------------------------------------

cdef uint32_t _rank(uintptr_t addr) noexcept nogil:
    """How many chunks begin at or below `addr`."""
    cdef uint32_t low = 0, high = _n_chunks, middle
    while low < high:
        middle = (low + high) // 2
        if _chunks[_by_addr[middle]].addr <= addr:
            low = middle + 1
        else:
            high = middle
    return low


cdef uint32_t _entry_at(uintptr_t addr) noexcept nogil:
    """The entry of the chunk that holds `addr`, or NO_PAGE."""
    cdef uint32_t rank = _rank(addr)
    cdef const chunk_t* chunk
    if rank == 0:
        return NO_PAGE
    chunk = &_chunks[_by_addr[rank - 1]]
    return _by_addr[rank - 1] if addr < chunk.addr + chunk.n_pages * _page_bytes else NO_PAGE


cdef uintptr_t _map_aligned(size_t len_bytes, size_t align_bytes) noexcept nogil:
    """Anonymous memory that begins at a multiple of align_bytes, or 0."""
    cdef sys_error ignored
    cdef uintptr_t addr, start
    error_clear(&ignored)
    addr = <uintptr_t>sys_map_anon(len_bytes + align_bytes, &ignored)
    if addr == 0:
        return 0
    start = (addr + align_bytes - 1) // align_bytes * align_bytes
    # Unchecked: what cannot be cut off takes addresses, no memory.
    if start != addr:
        sys_unmap(addr, start - addr, &ignored)
    sys_unmap(start + len_bytes, addr + align_bytes - start, &ignored)
    return start


cdef int _reserve_entry() noexcept nogil:
    """Room for one chunk more in both arrays; under the lock."""
    cdef void* grown
    cdef uint32_t wanted = 2 * _capacity + 16
    global _chunks, _by_addr, _capacity
    if _n_entries < _capacity:
        return 0
    if wanted > MAX_CHUNKS:
        return -1
    grown = realloc(_chunks, wanted * sizeof(chunk_t))
    if grown == NULL:
        return -1
    _chunks = <chunk_t*>grown
    grown = realloc(_by_addr, wanted * sizeof(uint32_t))
    if grown == NULL:
        return -1
    _by_addr = <uint32_t*>grown
    _capacity = wanted
    return 0


cdef void _register(const chunk_t* chunk) noexcept nogil:
    """With the core, if that can be: memory that is not registered is as good, it is only not merged."""
    if _core == NULL:
        return
    if (<Registry>_core).generation != gate_generation():
        with gil:
            try:
                (<Registry>_core)._own()
            except Exception:
                return
    # The kernel has just handed out this memory: whoever is registered there is gone.
    (<Registry>_core).enlist(
        chunk.region_id, chunk.addr, chunk.n_pages, REGION_HUGEPAGE if chunk.wants_huge else 0, True
    )


cdef uint32_t _add_chunk(size_t n_pages, bint wants_huge, bint whole) noexcept nogil:
    """Map and register a chunk, and enter it: returns its entry, NO_PAGE without memory. `whole`: one array has it,
    else it is one clean extent. Not under the lock, which is held when it returns an entry."""
    cdef chunk_t chunk
    cdef sys_error ignored
    cdef uint32_t entry, rank
    cdef size_t len_bytes = n_pages * _page_bytes
    cdef bint entered
    global _n_entries, _n_chunks, _last_region_id
    error_clear(&ignored)
    memset(&chunk, 0, sizeof(chunk))
    chunk.addr = _map_aligned(len_bytes, HUGE_PAGE_BYTES)
    if chunk.addr == 0:
        return NO_PAGE
    chunk.n_pages = n_pages
    chunk.wants_huge = wants_huge and sys_advise(chunk.addr, len_bytes, ADVISE_HUGEPAGE, &ignored) == 0
    if not whole:
        chunk.tags = <extent_tag*>sys_map_anon(n_pages * sizeof(extent_tag), &ignored)
        if chunk.tags == NULL:
            sys_unmap(chunk.addr, len_bytes, &ignored)
            return NO_PAGE
    arena_lock()
    _last_region_id += 1
    chunk.region_id = _last_region_id
    arena_unlock()
    _register(&chunk)
    chunk.generation = gate_generation()
    arena_lock()
    entered = _reserve_entry() == 0
    if entered:
        entry = 0
        while entry < _n_entries and _chunks[entry].addr != 0:
            entry += 1
        if entry == _n_entries:
            _n_entries += 1
        rank = _rank(chunk.addr)
        memmove(&_by_addr[rank + 1], &_by_addr[rank], (_n_chunks - rank) * sizeof(uint32_t))
        _by_addr[rank] = entry
        _n_chunks += 1
        _chunks[entry] = chunk
        _numbers.n_chunks += 1
        _numbers.mapped_bytes += len_bytes
        if not whole:
            _hang(entry * _chunk_pages, n_pages, CLEAN)
        return entry
    arena_unlock()
    _unmap(&chunk)
    return NO_PAGE


cdef void _unmap(const chunk_t* chunk) noexcept nogil:
    cdef sys_error ignored
    error_clear(&ignored)
    if _core != NULL and chunk.generation == gate_generation():
        (<Registry>_core).strike(chunk.region_id, chunk.addr)
    # Unchecked: whole mappings of our own.
    if chunk.tags != NULL:
        sys_unmap(<uintptr_t>chunk.tags, chunk.n_pages * sizeof(extent_tag), &ignored)
    sys_unmap(chunk.addr, chunk.n_pages * _page_bytes, &ignored)


cdef void _remove_chunk(uint32_t entry) noexcept nogil:
    """Give back a chunk that nothing is taken of, and that hangs in no bin."""
    cdef uint32_t rank = _rank(_chunks[entry].addr) - 1
    global _n_chunks
    _n_chunks -= 1
    memmove(&_by_addr[rank], &_by_addr[rank + 1], (_n_chunks - rank) * sizeof(uint32_t))
    _numbers.n_chunks -= 1
    _numbers.mapped_bytes -= _chunks[entry].n_pages * _page_bytes
    _unmap(&_chunks[entry])
    memset(&_chunks[entry], 0, sizeof(chunk_t))


cdef bint _is_last_empty(uint32_t entry) noexcept nogil:
    """Is there no other chunk of its kind of which nothing is taken? One is kept, for the next array."""
    cdef uint32_t other
    for other in range(_n_entries):
        if (
            other != entry and _chunks[other].addr != 0 and _chunks[other].tags != NULL
            and _chunks[other].n_taken == 0 and _chunks[other].wants_huge == _chunks[entry].wants_huge
            and _chunks[other].generation == _chunks[entry].generation
        ):
            return False
    return True


cdef void _remove_if_empty(uint32_t entry) noexcept nogil:
    cdef uint32_t page = entry * _chunk_pages, end = page + _chunk_pages
    if _chunks[entry].n_taken != 0 or _is_last_empty(entry):
        return
    while page < end:
        page += <uint32_t>_unhang(page)
    _remove_chunk(entry)


# ---- discarding -------------------------------------------------------------------------------------

cdef bint _discard(const chunk_t* chunk, uintptr_t addr, size_t n_pages) noexcept nogil:
    """Have pages of this process hold no memory and show zeros; False where that is refused."""
    cdef sys_error err
    error_clear(&err)
    if _core != NULL and (<Registry>_core).discard(chunk.region_id, addr, n_pages, &err):
        return err.code == 0
    # Registered with nobody (any more). What lies here then is not known for sure: it is replaced.
    if sys_map_anon_at(addr, n_pages * _page_bytes, &err) != 0:
        return False
    if chunk.wants_huge:
        sys_advise(addr, n_pages * _page_bytes, ADVISE_HUGEPAGE, &err)
    return True


cdef void _trim(size_t target_bytes) noexcept nogil:
    """Discard dirty extents, the longest first, until no more than target_bytes are left."""
    cdef int kind, number
    cdef uint32_t page, next
    cdef const chunk_t* chunk
    cdef size_t n_pages
    global _trim_above
    for number in range(N_BINS - 1, -1, -1):
        for kind in range(2):
            page = _bins[kind][<int>DIRTY].heads[number]
            while page != NO_PAGE and _numbers.dirty_bytes > target_bytes:
                next = _tag(page).next
                chunk = &_chunks[page // _chunk_pages]
                if _discard(chunk, chunk.addr + page % _chunk_pages * _page_bytes, _tag(page).n_pages):
                    n_pages = _unhang(page)
                    _mark(page, n_pages, TAKEN)
                    _release(page, n_pages, CLEAN)
                page = next
    # What was refused is not asked for again with every array.
    _trim_above = max(<size_t>MAX_DIRTY_BYTES, _numbers.dirty_bytes + MAX_DIRTY_BYTES // 2)


cdef void arena_trim() noexcept nogil:
    """Discard all free memory."""
    arena_lock()
    _trim(0)
    arena_unlock()


# ---- what the allocator calls -------------------------------------------------------------------------

cdef void* _take_from(uint32_t first, size_t n_pages) noexcept nogil:
    """Cut pages off a free extent."""
    cdef uint32_t entry = first // _chunk_pages
    cdef extent_state state = <extent_state>_tag(first).state
    cdef size_t length = _unhang(first)
    if length > n_pages:
        _hang(first + <uint32_t>n_pages, length - n_pages, state)
    _mark(first, n_pages, TAKEN)
    _chunks[entry].n_taken += n_pages
    _numbers.taken_bytes += n_pages * _page_bytes
    return <void*>(_chunks[entry].addr + first % _chunk_pages * _page_bytes)


cdef void* _take_whole(size_t n_pages) noexcept nogil:
    cdef uint32_t entry = _add_chunk(n_pages, _wants_huge, True)
    cdef void* taken
    if entry == NO_PAGE:
        return NULL
    _chunks[entry].n_taken = n_pages
    _numbers.taken_bytes += n_pages * _page_bytes
    taken = <void*>_chunks[entry].addr
    arena_unlock()
    return taken


cdef void* arena_take(size_t len_bytes, bint zeroed) noexcept nogil:
    """Whole pages for len_bytes > 0 bytes; with `zeroed` they show zeros, and none is touched. NULL without memory."""
    cdef size_t n_pages = (len_bytes - 1) // _page_bytes + 1
    cdef bint kind = _wants_huge and len_bytes >= HUGE_BYTES
    cdef uint32_t first = NO_PAGE, entry
    cdef void* taken
    if len_bytes > <size_t>-1 // 2:
        return NULL
    if n_pages > _chunk_pages // 2:
        return _take_whole(n_pages)
    arena_lock()
    if not zeroed:
        first = _find(&_bins[kind][<int>DIRTY], n_pages)
    if first == NO_PAGE:
        first = _find(&_bins[kind][<int>CLEAN], n_pages)
    if first == NO_PAGE:
        arena_unlock()
        entry = _add_chunk(_chunk_pages, kind, False)
        if entry == NO_PAGE:
            return NULL
        # Another thread may have come first, or made a better one; this chunk has room in any case.
        first = entry * _chunk_pages
    taken = _take_from(first, n_pages)
    arena_unlock()
    return taken


cdef bint arena_owns(const void* memory, size_t* len_bytes) noexcept nogil:
    """Was this handed out here? *len_bytes: of the whole pages."""
    cdef uint32_t entry
    cdef const chunk_t* chunk
    if <uintptr_t>memory % _page_bytes != 0:
        return False
    arena_lock()
    entry = _entry_at(<uintptr_t>memory)
    if entry != NO_PAGE:
        chunk = &_chunks[entry]
        len_bytes[0] = _page_bytes * (
            chunk.n_pages if chunk.tags == NULL
            else chunk.tags[(<uintptr_t>memory - chunk.addr) // _page_bytes].n_pages
        )
    arena_unlock()
    return entry != NO_PAGE


cdef void _give_inherited(uint32_t entry, uintptr_t addr, size_t n_pages) noexcept nogil:
    """In a forked child, memory of its parent's: the child's part of it is given up, and never handed out."""
    cdef sys_error ignored
    error_clear(&ignored)
    sys_advise(addr, n_pages * _page_bytes, ADVISE_DONTNEED, &ignored)
    if _chunks[entry].n_taken == 0:
        _remove_chunk(entry)


cdef bint arena_give(void* memory) noexcept nogil:
    """Take back what arena_take handed out; False where it is not from here."""
    cdef uintptr_t addr = <uintptr_t>memory
    cdef uint32_t entry, first
    cdef chunk_t* chunk
    cdef size_t n_pages
    if addr % _page_bytes != 0:
        return False
    arena_lock()
    entry = _entry_at(addr)
    if entry == NO_PAGE:
        arena_unlock()
        return False
    chunk = &_chunks[entry]
    first = entry * _chunk_pages + <uint32_t>((addr - chunk.addr) // _page_bytes)
    n_pages = chunk.n_pages if chunk.tags == NULL else _tag(first).n_pages
    chunk.n_taken -= n_pages
    _numbers.taken_bytes -= n_pages * _page_bytes
    if chunk.tags == NULL:
        _remove_chunk(entry)
    elif chunk.generation != gate_generation():
        _give_inherited(entry, addr, n_pages)
    else:
        _release(first, n_pages, DIRTY)
        if chunk.n_taken == 0:
            _remove_if_empty(entry)
        if _numbers.dirty_bytes > _trim_above:
            _trim(MAX_DIRTY_BYTES // 2)
    arena_unlock()
    return True


cdef bint arena_shrink(void* memory, size_t len_bytes) noexcept nogil:
    """Give back the pages behind the first len_bytes > 0 bytes; False where all of it stays."""
    cdef size_t n_pages = (len_bytes - 1) // _page_bytes + 1, before
    cdef uint32_t entry, first
    cdef chunk_t* chunk
    arena_lock()
    entry = _entry_at(<uintptr_t>memory)
    chunk = &_chunks[entry]
    if entry == NO_PAGE or chunk.tags == NULL or chunk.generation != gate_generation():
        arena_unlock()
        return False
    first = entry * _chunk_pages + <uint32_t>((<uintptr_t>memory - chunk.addr) // _page_bytes)
    before = _tag(first).n_pages
    if n_pages < before:
        _mark(first, n_pages, TAKEN)
        _mark(first + <uint32_t>n_pages, before - n_pages, TAKEN)
        chunk.n_taken -= before - n_pages
        _numbers.taken_bytes -= (before - n_pages) * _page_bytes
        _release(first + <uint32_t>n_pages, before - n_pages, DIRTY)
    arena_unlock()
    return n_pages < before


# ---- life -------------------------------------------------------------------------------------------

cdef void _in_child() noexcept nogil:
    """Nothing is handed out from what was inherited; see arena_give."""
    arena_renew()
    _clear_bins()
    _numbers.dirty_bytes = 0


cdef int arena_begin(Registry core, bint wants_huge) except -1:
    """Register chunks with this core from now on; NULL-like None: with nobody. The core is kept for ever, since memory
    may be given back until the very end of the process."""
    global _core, _wants_huge
    _wants_huge = wants_huge
    if core is not None and <void*>core != _core:
        if _core != NULL:
            raise ValueError("the arena registers its memory with another core already")
        Py_INCREF(core)
        _core = <void*>core
    return 0


def numbers():
    """Chunks, and bytes mapped, handed out, and free but not discarded. For tests and reports."""
    cdef arena_numbers now
    with nogil:
        arena_lock()
        now = _numbers
        arena_unlock()
    return {
        "chunks": now.n_chunks,
        "mapped_bytes": now.mapped_bytes,
        "taken_bytes": now.taken_bytes,
        "dirty_bytes": now.dirty_bytes,
    }


def check():
    """Walk all chunks: do extents and bins add up? Returns the number of the first invariant that is broken, 0 for none.
    For tests."""
    cdef int rc
    with nogil:
        arena_lock()
        rc = _check()
        arena_unlock()
    return rc


cdef int _check() noexcept nogil:
    cdef uint32_t entry, page, end, state, before
    cdef size_t n_taken, n_hanging = 0, n_free = 0, dirty_bytes = 0, taken_bytes = 0
    cdef int kind, number
    for entry in range(_n_entries):
        if _chunks[entry].addr == 0:
            continue
        if _entry_at(_chunks[entry].addr) != entry:
            return 1
        taken_bytes += _chunks[entry].n_taken * _page_bytes
        if _chunks[entry].tags == NULL or _chunks[entry].generation != gate_generation():
            continue
        page = entry * _chunk_pages
        end = page + _chunk_pages
        n_taken = 0
        before = TAKEN
        while page < end:
            state = _tag(page).state
            if _tag(page).n_pages == 0 or _tag(page + _tag(page).n_pages - 1).n_pages != _tag(page).n_pages:
                return 2
            if _tag(page + _tag(page).n_pages - 1).state != state:
                return 3
            if state != TAKEN and state == before:
                return 4
            n_taken += _tag(page).n_pages if state == TAKEN else 0
            n_free += state != TAKEN
            dirty_bytes += _tag(page).n_pages * _page_bytes if state == DIRTY else 0
            before = state
            page += _tag(page).n_pages
        if page != end:
            return 5
        if n_taken != _chunks[entry].n_taken:
            return 6
    for kind in range(2):
        for state in range(<uint32_t>CLEAN, <uint32_t>DIRTY + 1):
            for number in range(N_BINS):
                page = _bins[kind][state].heads[number]
                while page != NO_PAGE:
                    if _bin_of(_tag(page).n_pages) != <uint32_t>number or _tag(page).state != state:
                        return 7
                    n_hanging += 1
                    page = _tag(page).next
    if n_hanging != n_free:
        return 8
    return 9 if dirty_bytes != _numbers.dirty_bytes or taken_bytes != _numbers.taken_bytes else 0


_clear_bins()
if pthread_atfork(arena_lock, arena_unlock, _in_child) != 0:
    raise MemoryError("pthread_atfork failed: the arena cannot be made safe against fork")
