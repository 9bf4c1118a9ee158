"""The chunks of the arena as memory: mapped, registered, discarded and unmapped; and the arena's lock.

The caller holds that lock, but where it is said otherwise. The core's lock may be taken under it, never the other way
about. What is registered with a core is the whole chunk, whatever of it is handed out.
"""

from cpython.ref cimport Py_INCREF
from libc.stdint cimport uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport atoll
from libc.string cimport memset, strlen, strstr

from ksmcore._arrays.chunks cimport (
    CLEAN, DIRTY, NO_PAGE, N_BINS, chunk_t, chunks_addr, chunks_before, chunks_behind, chunks_clean, chunks_clear_bins,
    chunks_drop, chunks_each_edge, chunks_enter, chunks_init, chunks_ranges, chunks_tag, chunks_time, chunks_unhang_all,
    extent_tag,
)
from ksmcore._arrays.huge_pages cimport huge_pages_refuse
from ksmcore._core.registry cimport Registry
from ksmcore._guard.merge cimport merge_empty_range, run_t
from ksmcore._kernel.forks cimport forks_generation
from ksmcore._kernel.syscalls cimport (
    ADVISE_DONTNEED, ADVISE_HUGEPAGE, sys_advise, sys_error, sys_error_clear, sys_map_anon, sys_map_anon_aligned,
    sys_now_ns, sys_page_bytes, sys_read_text, sys_unmap,
)
from ksmcore._records.ranges cimport range_list
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

    # Free memory that may stay whatever the machine has left, and the part of that which more may be.
    LEAST_FREE_BYTES = 32 << 20
    FREE_SHARE = 8
    MEMINFO_BYTES = 512            # its beginning, with the line that is read

cdef size_t _most_free_bytes = LEAST_FREE_BYTES    # that are kept at hand, dirty
cdef uint64_t _decay_ns = 1_000_000_000    # what was free for so long is discarded
cdef uint64_t _decayed_ns = 0          # when that was looked at the last time
cdef size_t _trim_above = 0            # dirty bytes, after which some are discarded at once
cdef range_list _unsettled             # room for the next list; the core has the last one
cdef pinned_t* _pinned = NULL
# Engines count theirs from 1.
cdef uint64_t FIRST_REGION_ID = <uint64_t>1 << 63
cdef uint64_t _last_region_id = FIRST_REGION_ID


# ---- the lock ---------------------------------------------------------------------------------------

cdef void mapped_lock() noexcept nogil:
    arena_lock()


cdef void mapped_unlock() noexcept nogil:
    arena_unlock()


cdef bint mapped_is_forking() noexcept nogil:
    """Is this the thread that forks just now? It has the lock then."""
    return arena_is_forking()


cdef bint mapped_is_inside() noexcept nogil:
    """Is this thread in the core, or in the midst of a fork? Then the arena is not to be asked for anything: the C
    library allocates in functions that the core calls (qsort), and other libraries in their hooks of a fork."""
    return arena_is_forking() or (mapped_core != NULL and (<Registry>mapped_core).is_mine())


# ---- chunks -----------------------------------------------------------------------------------------

cdef void mapped_register(chunk_t* chunk, bint fresh) noexcept nogil:
    """With the core, if that can be: memory that is not registered is as good, it is only not merged. In a forked child
    the core is its parent's until somebody with the GIL makes it the child's own: see register_late."""
    if mapped_core == NULL or (<Registry>mapped_core).generation != forks_generation():
        return
    # `fresh`: the kernel has just handed out this memory, so whoever is registered there is gone.
    chunk.is_registered = (<Registry>mapped_core).enlist(
        chunk.region_id, chunk.addr, chunk.n_pages, chunk.flags, fresh
    ) == 0


cdef uint32_t mapped_add(size_t n_pages, bint wants_huge, bint whole) noexcept nogil:
    """Map and register a chunk, and enter it: returns its entry, NO_PAGE without memory. `whole`: one array has it.
    Not under the lock, which is held when it returns an entry."""
    cdef chunk_t chunk
    cdef sys_error ignored
    cdef uint32_t entry
    cdef size_t len_bytes = n_pages * mapped_table.page_bytes
    global _last_region_id
    sys_error_clear(&ignored)
    memset(&chunk, 0, sizeof(chunk))
    chunk.addr = <uintptr_t>sys_map_anon_aligned(len_bytes, HUGE_PAGE_BYTES, &ignored)
    if chunk.addr == 0:
        return NO_PAGE
    chunk.n_pages = n_pages
    chunk.taken_at = chunks_time(sys_now_ns())
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
    mapped_register(&chunk, True)
    chunk.generation = forks_generation()
    arena_lock()
    entry = chunks_enter(&mapped_table, &chunk)
    if entry == <uint32_t>NO_PAGE:
        _unmap(&chunk)
        arena_unlock()
    return entry


cdef void _unmap(const chunk_t* chunk) noexcept nogil:
    cdef sys_error ignored
    cdef size_t len_bytes = chunk.n_pages * mapped_table.page_bytes
    cdef pinned_t* left
    global _pinned
    sys_error_clear(&ignored)
    if mapped_core != NULL and chunk.generation == forks_generation():
        (<Registry>mapped_core).strike(chunk.region_id, chunk.addr)
    # Unchecked: whole mappings of our own.
    if chunk.tags != NULL:
        sys_unmap(<uintptr_t>chunk.tags, chunk.n_pages * sizeof(extent_tag), &ignored)
    if mapped_n_pins == 0:
        sys_unmap(chunk.addr, len_bytes, &ignored)
        return
    # Somebody may be reading there: only its memory goes now.
    sys_advise(chunk.addr, len_bytes, ADVISE_DONTNEED, &ignored)
    left = <pinned_t*>chunk.addr
    left.next = _pinned
    left.len_bytes = len_bytes
    _pinned = left


cdef void mapped_remove(uint32_t entry) noexcept nogil:
    """Give back a chunk that hangs in no bin."""
    cdef chunk_t chunk = mapped_table.all[entry]
    chunks_drop(&mapped_table, entry)
    _unmap(&chunk)


cdef bint _is_last_empty(uint32_t entry) noexcept nogil:
    """Is there no other chunk of its kind of which nothing is taken? One is kept, for the next array."""
    cdef uint32_t other
    for other in range(mapped_table.n_entries):
        if (
            other != entry and mapped_table.all[other].addr != 0 and mapped_table.all[other].tags != NULL
            and mapped_table.all[other].n_taken == 0
            and mapped_table.all[other].wants_huge == mapped_table.all[entry].wants_huge
            and mapped_table.all[other].generation == mapped_table.all[entry].generation
        ):
            return False
    return True


cdef void _remove_empty() noexcept nogil:
    """Give back the chunks of which nothing is taken, and nothing is at hand."""
    cdef const chunk_t* chunk
    cdef uint32_t entry
    for entry in range(mapped_table.n_entries):
        chunk = &mapped_table.all[entry]
        if (
            chunk.addr != 0 and chunk.tags != NULL and chunk.generation == forks_generation()
            and chunk.tags[0].state == CLEAN and chunk.tags[0].n_pages == chunk.n_pages
            and not _is_last_empty(entry)
        ):
            chunks_unhang_all(&mapped_table, entry)
            mapped_remove(entry)


# ---- discarding -------------------------------------------------------------------------------------

cdef bint mapped_discard(const chunk_t* chunk, uintptr_t addr, size_t n_pages) noexcept nogil:
    """Have pages of this process hold no memory and show zeros; False where that is refused."""
    cdef sys_error ignored
    cdef run_t run
    cdef bint emptied = False
    if mapped_core != NULL and (<Registry>mapped_core).discard(chunk.region_id, addr, n_pages, &emptied):
        return emptied
    # Registered with nobody (any more). What lies here then is not known for sure: it is replaced.
    sys_error_clear(&ignored)
    run.addr = addr
    run.n_pages = n_pages
    run.page_bytes = mapped_table.page_bytes
    run.over_store = True
    run.flags = chunk.flags
    run.tracker = NULL
    return merge_empty_range(&run, &ignored) == 0


cdef void _discard_end(uint32_t page, size_t most_bytes) noexcept nogil:
    """Discard the end of a dirty extent, or all of it: about most_bytes > 0 bytes. Refused, it stays dirty."""
    cdef const chunk_t* chunk = &mapped_table.all[page // mapped_table.chunk_pages]
    cdef size_t page_bytes = mapped_table.page_bytes, length = chunks_tag(&mapped_table, page).n_pages
    cdef size_t n_pages = min((most_bytes - 1) // page_bytes + 1, length)
    cdef uintptr_t addr = chunks_addr(&mapped_table, page), end = addr + length * page_bytes, start = end
    # What is handed out next comes from the beginning.
    start -= n_pages * page_bytes
    if chunk.wants_huge:
        # Huge pages are not cut in two. At both ends they may reach into clean neighbours.
        if n_pages < length:
            start = min((start + HUGE_PAGE_BYTES - 1) // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES, end)
            n_pages = (end - start) // page_bytes
        else:
            start -= min(start % HUGE_PAGE_BYTES, chunks_before(&mapped_table, page, CLEAN) * page_bytes)
        end += min(
            (HUGE_PAGE_BYTES - end % HUGE_PAGE_BYTES) % HUGE_PAGE_BYTES,
            chunks_behind(&mapped_table, page + <uint32_t>length, CLEAN) * page_bytes
        )
    if n_pages > 0 and mapped_discard(chunk, start, (end - start) // page_bytes):
        chunks_clean(&mapped_table, page, n_pages)


cdef void mapped_trim(size_t target_bytes) noexcept nogil:
    """Discard dirty extents, the longest first, until no more than about target_bytes are left."""
    cdef int kind, number
    cdef uint32_t page, next
    global _trim_above
    for number in range(N_BINS - 1, -1, -1):
        for kind in range(2):
            page = mapped_table.bins[kind][<int>DIRTY].heads[number]
            while page != <uint32_t>NO_PAGE and mapped_table.dirty_bytes > target_bytes:
                next = chunks_tag(&mapped_table, page).next
                _discard_end(page, mapped_table.dirty_bytes - target_bytes)
                page = next
    # What was refused is not asked for again with every array.
    _trim_above = 0
    if mapped_table.dirty_bytes > target_bytes:
        _trim_above = mapped_table.dirty_bytes + LEAST_FREE_BYTES // 2
    _remove_empty()
    # Zeros that the huge pages of arrays brought to free memory would be counted as saved.
    chunks_each_edge(&mapped_table, HUGE_PAGE_BYTES // mapped_table.page_bytes, mapped_discard)


cdef void mapped_trim_idle() noexcept nogil:
    """Discard as much as was free at every moment since the last call."""
    mapped_trim(mapped_table.dirty_bytes - mapped_table.idle_bytes)
    mapped_table.idle_bytes = mapped_table.dirty_bytes


cdef size_t _bearable_bytes() noexcept nogil:
    """Of free memory, for what the machine has left just now."""
    cdef char text[MEMINFO_BYTES]
    cdef const char* line
    sys_read_text(b"/proc/meminfo", text, sizeof(text))
    line = strstr(text, b"MemAvailable:")
    if line == NULL:
        return _most_free_bytes
    return max(<size_t>atoll(line + strlen(b"MemAvailable:")) * 1024 // FREE_SHARE, <size_t>LEAST_FREE_BYTES)


cdef uint64_t mapped_tend() noexcept nogil:
    """Let go of free memory, a little after it was freed for good: with every array that comes or goes, since nobody
    else may be there to do so. A program that frees and takes the same memory over and over keeps it. Returns the
    time."""
    cdef uint64_t now_ns = sys_now_ns()
    cdef size_t most_bytes = _most_free_bytes
    global _decayed_ns
    if now_ns - _decayed_ns >= _decay_ns:
        _decayed_ns = now_ns
        mapped_trim_idle()
        if mapped_table.dirty_bytes > <size_t>LEAST_FREE_BYTES:
            most_bytes = min(most_bytes, _bearable_bytes())
    if mapped_table.dirty_bytes > max(most_bytes, _trim_above):
        mapped_trim(most_bytes // 2)
    return now_ns


cdef void mapped_swap_limits(size_t* most_free_bytes, uint64_t* decay_ns) noexcept nogil:
    """How much free memory is kept at hand, and for how long that is not needed."""
    global _most_free_bytes, _decay_ns
    most_free_bytes[0], _most_free_bytes = _most_free_bytes, most_free_bytes[0]
    decay_ns[0], _decay_ns = _decay_ns, decay_ns[0]


# ---- life -------------------------------------------------------------------------------------------

cdef int mapped_begin(Registry core) except -1:
    """Register chunks with this core from now on. It is kept for ever, since memory may be given back until the very
    end of the process."""
    global mapped_core
    if <void*>core != mapped_core:
        if mapped_core != NULL:
            raise ValueError("the arena registers its memory with another core already")
        Py_INCREF(core)
        mapped_core = <void*>core
    return 0


cdef int mapped_register_late() except -1:
    """Register what could not be when it was mapped. Without the lock."""
    cdef uint32_t entry
    cdef chunk_t* chunk
    if mapped_core == NULL:
        return 0
    (<Registry>mapped_core)._own()
    with nogil:
        arena_lock()
        for entry in range(mapped_table.n_entries):
            chunk = &mapped_table.all[entry]
            if chunk.addr != 0 and not chunk.is_registered and chunk.generation == forks_generation():
                mapped_register(chunk, False)
        arena_unlock()
    return 0


cdef void mapped_tell_unsettled(uint64_t age_ns) noexcept nogil:
    """Have the background scanner leave alone what is free, or was handed out less than so long ago."""
    if mapped_core == NULL:
        return
    _unsettled.n = 0
    # Without memory for all, the rest is looked at as ever.
    chunks_ranges(
        &mapped_table, forks_generation(), False, chunks_time(sys_now_ns()), chunks_time(age_ns), &_unsettled
    )
    (<Registry>mapped_core).leave_unsettled(&_unsettled)


cdef void mapped_pin() noexcept nogil:
    """Keep all chunks mapped until mapped_unpin was called as often."""
    global mapped_n_pins
    mapped_n_pins += 1


cdef pinned_t* mapped_unpin() noexcept nogil:
    """Undo one mapped_pin. Returns what is to be unmapped now, without the lock."""
    global mapped_n_pins, _pinned
    cdef pinned_t* left = NULL
    # 0 in a forked child of the one who pinned them.
    mapped_n_pins -= mapped_n_pins > 0
    if mapped_n_pins == 0:
        left, _pinned = _pinned, NULL
    return left


cdef bint mapped_is_chunk(uint64_t region_id) noexcept nogil:
    return region_id > FIRST_REGION_ID


cdef void _in_child() noexcept nogil:
    """Nothing is handed out from what was inherited; see arena_give."""
    global mapped_n_pins, _pinned
    arena_renew()
    chunks_clear_bins(&mapped_table)
    mapped_table.dirty_bytes = mapped_table.idle_bytes = 0
    mapped_n_pins = 0
    _pinned = NULL


chunks_init(&mapped_table, sys_page_bytes(), CHUNK_BYTES)
if pthread_atfork(arena_before_fork, arena_after_fork, _in_child) != 0:
    raise MemoryError("pthread_atfork failed: the arena cannot be made safe against fork")
