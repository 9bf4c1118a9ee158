"""Memory for many large arrays, in few regions: whole pages, handed out from chunks that are registered as a whole.

A chunk is CHUNK_BYTES of anonymous memory; an array that needs more than half of that gets a chunk of its own. Free
extents are clean, where they show zeros and hold no memory but what a huge page brought, or dirty. Dirty ones are
handed out again first, since their pages are at hand. When they come to more than MAX_DIRTY_BYTES the longest are
discarded: the core forgets what it knew of their pages, the kernel takes their memory. So is, from time to time, as
much as was free all the while (`give_back_idle`): a program that frees and takes the same memory over and over keeps
it, one that freed it for good does not.

Chunks for arrays of HUGE_BYTES and more ask for huge pages, as NumPy's own allocator does; those for smaller ones
take none (see huge_pages). Arrays of at most POPULATE_BYTES, which will hardly be left unwritten, get their new pages
in one call, for half the time of a fault each.

One lock guards all of it. It is taken with and without the GIL, and under it nothing runs that could want the GIL: so a
chunk is made before the lock is taken. The core's lock may be taken under it, never the other way about. A fork
waits for it. The chunks that a forked child inherits are its parent's: they are registered with nobody there, are
given back when they are freed, and nothing is handed out from them.
"""

from cpython.ref cimport Py_INCREF
from libc.stdint cimport uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport free, malloc
from libc.string cimport memset

from ksmcore._arrays.chunks cimport (
    CLEAN, DIRTY, NO_PAGE, N_BINS, chunk_t, chunk_table, chunks_addr, chunks_at, chunks_before, chunks_behind,
    chunks_clean, chunks_clear_bins, chunks_drop, chunks_each_edge, chunks_enter, chunks_extend, chunks_find,
    chunks_give, chunks_init, chunks_tag, chunks_take, chunks_taken, chunks_unhang_all, extent_tag, taken_range,
)
from ksmcore._arrays.huge_pages cimport HUGE_BYTES, huge_pages_refuse
from ksmcore._core.registry cimport Registry
from ksmcore._guard.merge cimport merge_empty_range, run_t
from ksmcore._kernel.forks cimport forks_generation
from ksmcore._kernel.syscalls cimport (
    ADVISE_DONTNEED, ADVISE_HUGEPAGE, ADVISE_POPULATE_WRITE, sys_advise, sys_error, sys_error_clear, sys_is_mapped,
    sys_map_anon, sys_map_anon_aligned, sys_map_anon_at, sys_move, sys_page_bytes, sys_pause, sys_unmap,
)
from ksmcore._records.regions cimport REGION_HUGEPAGE

cdef extern from "_arrays/arena_lock.h":
    void arena_lock() noexcept nogil
    void arena_unlock() noexcept nogil
    bint arena_is_forking() noexcept nogil
    void arena_before_fork() noexcept nogil
    void arena_after_fork() noexcept nogil
    void arena_renew() noexcept nogil

cdef extern from "<pthread.h>":
    int pthread_atfork(
        void (*prepare)() noexcept nogil, void (*parent)() noexcept nogil, void (*child)() noexcept nogil
    )

cdef enum:
    CHUNK_BYTES = 64 << 20
    HUGE_PAGE_BYTES = 2 << 20
    MAX_DIRTY_BYTES = 32 << 20
    POPULATE_BYTES = 256 << 10
    MOST_TRIES = 100           # a millisecond apart

# Stands in the memory of a chunk that was given back while chunks are pinned.
ctypedef struct pinned_t:
    pinned_t* next
    size_t len_bytes

cdef chunk_table _table
cdef size_t _n_refused = 0             # chunks that the kernel had no memory or addresses for
cdef uint32_t _n_pins = 0              # while not 0, no chunk is unmapped
cdef pinned_t* _pinned = NULL
cdef size_t _trim_above = MAX_DIRTY_BYTES
# Engines count theirs from 1.
cdef uint64_t FIRST_REGION_ID = <uint64_t>1 << 63
cdef uint64_t _last_region_id = FIRST_REGION_ID
cdef void* _core = NULL                # a Registry that is never given back
cdef bint _wants_huge = False


# ---- chunks -----------------------------------------------------------------------------------------

cdef void _register(chunk_t* chunk, bint fresh) noexcept nogil:
    """With the core, if that can be: memory that is not registered is as good, it is only not merged. In a forked child
    the core is its parent's until somebody with the GIL makes it the child's own: see register_late."""
    if _core == NULL or (<Registry>_core).generation != forks_generation():
        return
    # `fresh`: the kernel has just handed out this memory, so whoever is registered there is gone.
    chunk.is_registered = (<Registry>_core).enlist(
        chunk.region_id, chunk.addr, chunk.n_pages, chunk.flags, fresh
    ) == 0


cdef uint32_t _add_chunk(size_t n_pages, bint wants_huge, bint whole) noexcept nogil:
    """Map and register a chunk, and enter it: returns its entry, NO_PAGE without memory. `whole`: one array has it.
    Not under the lock, which is held when it returns an entry."""
    cdef chunk_t chunk
    cdef sys_error ignored
    cdef uint32_t entry
    cdef size_t len_bytes = n_pages * _table.page_bytes
    global _last_region_id
    sys_error_clear(&ignored)
    memset(&chunk, 0, sizeof(chunk))
    chunk.addr = <uintptr_t>sys_map_anon_aligned(len_bytes, HUGE_PAGE_BYTES, &ignored)
    if chunk.addr == 0:
        return NO_PAGE
    chunk.n_pages = n_pages
    # Also where the kernel gives none: it is asked again for whatever is mapped here later.
    chunk.wants_huge = wants_huge
    if wants_huge:
        chunk.flags = REGION_HUGEPAGE
        sys_advise(chunk.addr, len_bytes, ADVISE_HUGEPAGE, &ignored)
    elif not whole:
        chunk.flags = huge_pages_refuse(chunk.addr, len_bytes)
    if not whole:
        chunk.tags = <extent_tag*>sys_map_anon(n_pages * sizeof(extent_tag), &ignored)
        if chunk.tags == NULL:
            sys_unmap(chunk.addr, len_bytes, &ignored)
            return NO_PAGE
    arena_lock()
    _last_region_id += 1
    chunk.region_id = _last_region_id
    arena_unlock()
    _register(&chunk, True)
    chunk.generation = forks_generation()
    arena_lock()
    entry = chunks_enter(&_table, &chunk)
    if entry == <uint32_t>NO_PAGE:
        _unmap(&chunk)
        arena_unlock()
    return entry


cdef void _unmap(const chunk_t* chunk) noexcept nogil:
    cdef sys_error ignored
    cdef size_t len_bytes = chunk.n_pages * _table.page_bytes
    cdef pinned_t* left
    global _pinned
    sys_error_clear(&ignored)
    if _core != NULL and chunk.generation == forks_generation():
        (<Registry>_core).strike(chunk.region_id, chunk.addr)
    # Unchecked: whole mappings of our own.
    if chunk.tags != NULL:
        sys_unmap(<uintptr_t>chunk.tags, chunk.n_pages * sizeof(extent_tag), &ignored)
    if _n_pins == 0:
        sys_unmap(chunk.addr, len_bytes, &ignored)
        return
    # Somebody may be reading there: only its memory goes now.
    sys_advise(chunk.addr, len_bytes, ADVISE_DONTNEED, &ignored)
    left = <pinned_t*>chunk.addr
    left.next = _pinned
    left.len_bytes = len_bytes
    _pinned = left


cdef void _remove_chunk(uint32_t entry) noexcept nogil:
    """Give back a chunk that hangs in no bin."""
    cdef chunk_t chunk = _table.all[entry]
    chunks_drop(&_table, entry)
    _unmap(&chunk)


cdef bint _is_last_empty(uint32_t entry) noexcept nogil:
    """Is there no other chunk of its kind of which nothing is taken? One is kept, for the next array."""
    cdef uint32_t other
    for other in range(_table.n_entries):
        if (
            other != entry and _table.all[other].addr != 0 and _table.all[other].tags != NULL
            and _table.all[other].n_taken == 0 and _table.all[other].wants_huge == _table.all[entry].wants_huge
            and _table.all[other].generation == _table.all[entry].generation
        ):
            return False
    return True


cdef void _remove_if_empty(uint32_t entry) noexcept nogil:
    if _table.all[entry].n_taken == 0 and not _is_last_empty(entry):
        chunks_unhang_all(&_table, entry)
        _remove_chunk(entry)


# ---- discarding -------------------------------------------------------------------------------------

cdef bint _discard(const chunk_t* chunk, uintptr_t addr, size_t n_pages) noexcept nogil:
    """Have pages of this process hold no memory and show zeros; False where that is refused."""
    cdef sys_error ignored
    cdef run_t run
    cdef bint emptied = False
    if _core != NULL and (<Registry>_core).discard(chunk.region_id, addr, n_pages, &emptied):
        return emptied
    # Registered with nobody (any more). What lies here then is not known for sure: it is replaced.
    sys_error_clear(&ignored)
    run.addr = addr
    run.n_pages = n_pages
    run.page_bytes = _table.page_bytes
    run.over_store = True
    run.flags = chunk.flags
    run.tracker = NULL
    return merge_empty_range(&run, &ignored) == 0


cdef void _discard_end(uint32_t page, size_t most_bytes) noexcept nogil:
    """Discard the end of a dirty extent, or all of it: about most_bytes > 0 bytes. Refused, it stays dirty."""
    cdef const chunk_t* chunk = &_table.all[page // _table.chunk_pages]
    cdef size_t page_bytes = _table.page_bytes, length = chunks_tag(&_table, page).n_pages
    cdef size_t n_pages = min((most_bytes - 1) // page_bytes + 1, length)
    cdef uintptr_t addr = chunks_addr(&_table, page), end = addr + length * page_bytes, start = end
    # What is handed out next comes from the beginning.
    start -= n_pages * page_bytes
    if chunk.wants_huge:
        # Huge pages are not cut in two. At both ends they may reach into clean neighbours.
        if n_pages < length:
            start = min((start + HUGE_PAGE_BYTES - 1) // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES, end)
            n_pages = (end - start) // page_bytes
        else:
            start -= min(start % HUGE_PAGE_BYTES, chunks_before(&_table, page, CLEAN) * page_bytes)
        end += min(
            (HUGE_PAGE_BYTES - end % HUGE_PAGE_BYTES) % HUGE_PAGE_BYTES,
            chunks_behind(&_table, page + <uint32_t>length, CLEAN) * page_bytes
        )
    if n_pages > 0 and _discard(chunk, start, (end - start) // page_bytes):
        chunks_clean(&_table, page, n_pages)


cdef void _trim(size_t target_bytes) noexcept nogil:
    """Discard dirty extents, the longest first, until no more than about target_bytes are left."""
    cdef int kind, number
    cdef uint32_t page, next
    global _trim_above
    for number in range(N_BINS - 1, -1, -1):
        for kind in range(2):
            page = _table.bins[kind][<int>DIRTY].heads[number]
            while page != <uint32_t>NO_PAGE and _table.dirty_bytes > target_bytes:
                next = chunks_tag(&_table, page).next
                _discard_end(page, _table.dirty_bytes - target_bytes)
                page = next
    # What was refused is not asked for again with every array.
    _trim_above = MAX_DIRTY_BYTES
    if _table.dirty_bytes > target_bytes:
        _trim_above = max(_trim_above, _table.dirty_bytes + MAX_DIRTY_BYTES // 2)
    # Zeros that the huge pages of arrays brought to free memory would be counted as saved.
    chunks_each_edge(&_table, HUGE_PAGE_BYTES // _table.page_bytes, _discard)


cdef void arena_trim() noexcept nogil:
    """Discard all free memory."""
    arena_lock()
    _trim(0)
    arena_unlock()


# ---- what the allocator calls -------------------------------------------------------------------------

cdef bint _is_inside() noexcept nogil:
    """Is this thread in the core, or in the midst of a fork? Then the arena is not to be asked for anything: the C
    library allocates in functions that the core calls (qsort), and other libraries in their hooks of a fork."""
    return arena_is_forking() or (_core != NULL and (<Registry>_core).is_mine())


cdef void* _refused() noexcept nogil:
    global _n_refused
    arena_lock()
    _n_refused += 1
    arena_unlock()
    return NULL


cdef void* _take_whole(size_t n_pages) noexcept nogil:
    cdef uint32_t entry = _add_chunk(n_pages, _wants_huge, True)
    cdef void* taken
    if entry == <uint32_t>NO_PAGE:
        return _refused()
    taken = <void*>_table.all[entry].addr
    arena_unlock()
    return taken


cdef void* arena_take(size_t len_bytes, bint zeroed) noexcept nogil:
    """Whole pages for len_bytes > 0 bytes; with `zeroed` they show zeros, and none is touched. NULL without memory."""
    cdef size_t n_pages = (len_bytes - 1) // _table.page_bytes + 1
    cdef bint kind = _wants_huge and len_bytes >= HUGE_BYTES
    cdef uint32_t first = NO_PAGE, entry
    cdef bint is_clean = False
    cdef sys_error ignored
    cdef void* taken
    if len_bytes > <size_t>-1 // 2 or _is_inside():
        return NULL
    if n_pages > _table.chunk_pages // 2:
        return _take_whole(n_pages)
    arena_lock()
    if not zeroed:
        first = chunks_find(&_table, kind, DIRTY, n_pages)
    if first == <uint32_t>NO_PAGE:
        is_clean = True
        first = chunks_find(&_table, kind, CLEAN, n_pages)
    if first == <uint32_t>NO_PAGE:
        arena_unlock()
        entry = _add_chunk(_table.chunk_pages, kind, False)
        if entry == <uint32_t>NO_PAGE:
            return _refused()
        first = entry * _table.chunk_pages
    chunks_take(&_table, first, n_pages)
    taken = <void*>chunks_addr(&_table, first)
    arena_unlock()
    if is_clean and not zeroed and len_bytes <= <size_t>POPULATE_BYTES:
        # Unchecked: before Linux 5.14, or where there is no memory, the pages come with their first writes.
        sys_error_clear(&ignored)
        sys_advise(<uintptr_t>taken, n_pages * _table.page_bytes, ADVISE_POPULATE_WRITE, &ignored)
    return taken


cdef bint arena_owns(const void* memory, size_t* len_bytes) noexcept nogil:
    """Was this handed out here? *len_bytes: of the whole pages. What is asked about in the core never was."""
    cdef uint32_t entry
    cdef const chunk_t* chunk
    cdef bint has_lock = arena_is_forking()
    if <uintptr_t>memory % _table.page_bytes != 0 or (not has_lock and _is_inside()):
        return False
    if not has_lock:
        arena_lock()
    entry = chunks_at(&_table, <uintptr_t>memory)
    if entry != <uint32_t>NO_PAGE:
        chunk = &_table.all[entry]
        len_bytes[0] = _table.page_bytes * (
            chunk.n_pages if chunk.tags == NULL
            else chunk.tags[(<uintptr_t>memory - chunk.addr) // _table.page_bytes].n_pages
        )
    if not has_lock:
        arena_unlock()
    return entry != <uint32_t>NO_PAGE


cdef void _give_inherited(uint32_t entry, uintptr_t addr, size_t n_pages) noexcept nogil:
    """In a forked child, memory of its parent's: the child's part of it is given up, and never handed out."""
    cdef sys_error ignored
    sys_error_clear(&ignored)
    sys_advise(addr, n_pages * _table.page_bytes, ADVISE_DONTNEED, &ignored)
    _table.all[entry].n_taken -= n_pages
    _table.taken_bytes -= n_pages * _table.page_bytes
    if _table.all[entry].n_taken == 0:
        _remove_chunk(entry)


cdef bint arena_give(void* memory) noexcept nogil:
    """Take back what arena_take handed out; False where it is not from here."""
    cdef uintptr_t addr = <uintptr_t>memory
    cdef uint32_t entry, first
    cdef chunk_t* chunk
    cdef size_t ignored
    if addr % _table.page_bytes != 0:
        return False
    if _is_inside():
        # In the midst of a fork it is left as it is, for ever: to take it back could need the core.
        return arena_owns(memory, &ignored)
    arena_lock()
    entry = chunks_at(&_table, addr)
    if entry == <uint32_t>NO_PAGE:
        arena_unlock()
        return False
    chunk = &_table.all[entry]
    if chunk.tags == NULL:
        _remove_chunk(entry)
    else:
        first = entry * _table.chunk_pages + <uint32_t>((addr - chunk.addr) // _table.page_bytes)
        if chunk.generation != forks_generation():
            _give_inherited(entry, addr, chunks_tag(&_table, first).n_pages)
        else:
            chunks_give(&_table, first, chunks_tag(&_table, first).n_pages)
            _remove_if_empty(entry)
            if _table.dirty_bytes > _trim_above:
                _trim(MAX_DIRTY_BYTES // 2)
    arena_unlock()
    return True


cdef bint arena_shrink(void* memory, size_t len_bytes) noexcept nogil:
    """Give back the pages behind the first len_bytes > 0 bytes, where that can be. False: it cannot, and is worth a
    move to somewhere else."""
    cdef size_t n_pages = (len_bytes - 1) // _table.page_bytes + 1, before
    cdef uint32_t entry, first
    cdef chunk_t* chunk
    cdef bint stays = True
    arena_lock()
    entry = chunks_at(&_table, <uintptr_t>memory)
    chunk = &_table.all[entry]
    if chunk.tags == NULL:
        stays = n_pages > chunk.n_pages // 2
        if stays and n_pages < chunk.n_pages and chunk.generation == forks_generation():
            # It goes on to have these pages, and may grow into them again.
            _discard(chunk, chunk.addr + n_pages * _table.page_bytes, chunk.n_pages - n_pages)
    elif chunk.generation == forks_generation():
        first = entry * _table.chunk_pages + <uint32_t>((<uintptr_t>memory - chunk.addr) // _table.page_bytes)
        before = chunks_tag(&_table, first).n_pages
        if n_pages < before:
            chunks_give(&_table, first + <uint32_t>n_pages, before - n_pages)
    arena_unlock()
    return stays


cdef bint arena_grow(void* memory, size_t len_bytes) noexcept nogil:
    """Have what was handed out here reach over the free pages behind it, for so many bytes in all; False where there
    are too few."""
    cdef size_t n_pages = (len_bytes - 1) // _table.page_bytes + 1
    cdef uint32_t entry
    cdef chunk_t* chunk
    cdef bint grown = False
    if _is_inside():
        return False
    arena_lock()
    entry = chunks_at(&_table, <uintptr_t>memory)
    chunk = &_table.all[entry]
    if chunk.tags == NULL:
        grown = n_pages <= chunk.n_pages
    elif chunk.generation == forks_generation():
        grown = chunks_extend(
            &_table, entry * _table.chunk_pages + <uint32_t>((<uintptr_t>memory - chunk.addr) // _table.page_bytes),
            n_pages
        )
    arena_unlock()
    return grown


cdef bint _move(uintptr_t source, uintptr_t target, size_t len_bytes) noexcept nogil:
    """Tried again where the kernel unmapped the target before it failed; it is mapped in the end."""
    cdef sys_error ignored
    cdef int tries = 0
    sys_error_clear(&ignored)
    while sys_move(source, target, len_bytes, &ignored) != 0:
        if sys_is_mapped(target, len_bytes):
            return False
        tries += 1
        if tries > MOST_TRIES and sys_map_anon_at(target, len_bytes, &ignored) == 0:
            return False
        sys_pause()
    return True


cdef bint arena_move(void* memory, void* target) noexcept nogil:
    """Move the pages of a chunk that one array has, none of which is merged, to the beginning of another such chunk,
    which is larger. False: nothing was moved, and both are as they were."""
    cdef uint32_t source, entry
    cdef size_t len_bytes
    cdef bint moved = False
    arena_lock()
    source = chunks_at(&_table, <uintptr_t>memory)
    entry = chunks_at(&_table, <uintptr_t>target)
    len_bytes = _table.all[source].n_pages * _table.page_bytes
    if (
        _table.all[source].tags == NULL and _table.all[entry].tags == NULL and _n_pins == 0
        and _table.all[source].n_pages <= _table.all[entry].n_pages
        and (_core == NULL or (<Registry>_core).let_move(_table.all[source].region_id, <uintptr_t>memory))
        and (_core == NULL or (<Registry>_core).let_move(_table.all[entry].region_id, <uintptr_t>target))
    ):
        moved = _move(<uintptr_t>memory, <uintptr_t>target, len_bytes)
        _register(&_table.all[entry], False)
        if moved:
            # Nothing is mapped there any more, so nothing may be unmapped there.
            chunks_drop(&_table, source)
        else:
            _register(&_table.all[source], False)
    arena_unlock()
    return moved


cdef int arena_ask(int (*question)(const chunk_table* t, uint32_t generation) noexcept nogil) noexcept nogil:
    """The answer to a question about the chunks, asked under the lock."""
    cdef int answer
    arena_lock()
    answer = question(&_table, forks_generation())
    arena_unlock()
    return answer


# ---- life -------------------------------------------------------------------------------------------

cdef void _in_child() noexcept nogil:
    """Nothing is handed out from what was inherited; see arena_give."""
    global _n_pins, _pinned
    arena_renew()
    chunks_clear_bins(&_table)
    _table.dirty_bytes = _table.idle_bytes = 0
    _n_pins = 0
    _pinned = NULL


cdef int arena_begin(Registry core, bint wants_huge) except -1:
    """Register chunks with this core from now on; None: with nobody. It is kept for ever, since memory may be given
    back until the very end of the process."""
    global _core, _wants_huge
    _wants_huge = wants_huge
    if core is not None and <void*>core != _core:
        if _core != NULL:
            raise ValueError("the arena registers its memory with another core already")
        Py_INCREF(core)
        _core = <void*>core
    return 0


def pin():
    """Keep all chunks mapped until `unpin` was called as often; returns (address, end) of what is handed out of those
    of this process."""
    cdef size_t i, n = 0
    cdef taken_range* ranges
    global _n_pins
    # Copied first: to make objects may collect garbage, and so give memory back.
    with nogil:
        arena_lock()
        _n_pins += 1
        ranges = <taken_range*>malloc(chunks_taken(&_table, forks_generation(), NULL) * sizeof(taken_range))
        if ranges != NULL:
            n = chunks_taken(&_table, forks_generation(), ranges)
        arena_unlock()
    found = [(ranges[i].addr, ranges[i].addr + ranges[i].n_pages * _table.page_bytes) for i in range(n)]
    free(ranges)
    return found


def unpin():
    """Undo one `pin`."""
    global _n_pins, _pinned
    cdef pinned_t* left = NULL
    cdef pinned_t* next
    cdef sys_error ignored
    sys_error_clear(&ignored)
    with nogil:
        arena_lock()
        # 0 in a forked child of the one who pinned them.
        _n_pins -= _n_pins > 0
        if _n_pins == 0:
            left, _pinned = _pinned, NULL
        arena_unlock()
        while left != NULL:
            next = left.next
            sys_unmap(<uintptr_t>left, left.len_bytes, &ignored)
            left = next


def register_late():
    """Register what could not be when it was mapped."""
    cdef uint32_t entry
    cdef chunk_t* chunk
    if _core == NULL:
        return
    (<Registry>_core)._own()
    with nogil:
        arena_lock()
        for entry in range(_table.n_entries):
            chunk = &_table.all[entry]
            if chunk.addr != 0 and not chunk.is_registered and chunk.generation == forks_generation():
                _register(chunk, False)
        arena_unlock()


def give_back():
    """Discard all free memory."""
    with nogil:
        arena_trim()


def give_back_idle():
    """Discard as much free memory as there was at every moment since the last call."""
    with nogil:
        arena_lock()
        _trim(_table.dirty_bytes - _table.idle_bytes)
        _table.idle_bytes = _table.dirty_bytes
        arena_unlock()


def is_chunk(uint64_t region_id):
    """Is the region with this id a chunk?"""
    return region_id > FIRST_REGION_ID


def numbers():
    """Chunks, and bytes mapped, handed out, and free but not discarded; how often no chunk was to be had."""
    cdef uint32_t n
    cdef size_t mapped_bytes, taken_bytes, dirty_bytes, n_refused
    with nogil:
        arena_lock()
        n, mapped_bytes = _table.n, _table.mapped_bytes
        taken_bytes, dirty_bytes = _table.taken_bytes, _table.dirty_bytes
        n_refused = _n_refused
        arena_unlock()
    return {
        "chunks": n, "mapped_bytes": mapped_bytes, "taken_bytes": taken_bytes, "dirty_bytes": dirty_bytes,
        "refused": n_refused,
    }


chunks_init(&_table, sys_page_bytes(), CHUNK_BYTES)
if pthread_atfork(arena_before_fork, arena_after_fork, _in_child) != 0:
    raise MemoryError("pthread_atfork failed: the arena cannot be made safe against fork")
