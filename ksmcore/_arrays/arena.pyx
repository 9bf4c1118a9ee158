"""Memory for many large arrays, in few regions: whole pages, handed out from chunks that are registered as a whole.

A chunk is CHUNK_BYTES of anonymous memory; an array that needs more than half of that gets a chunk of its own. Free
extents are clean, where they show zeros and hold no memory but what a huge page brought, or dirty. Dirty ones are
handed out again first, since their pages are at hand. What was free all the last second is discarded: the core
forgets what it knew of its pages, the kernel takes its memory (see mapped_tend). So a program that frees and takes
the same memory over and over keeps it, one that freed it for good does not.

Chunks for arrays of HUGE_BYTES and more ask for huge pages, as NumPy's own allocator does; those for smaller ones
take none (see huge_pages). Arrays of at most POPULATE_BYTES, which will hardly be left unwritten, get their new pages
in one call, for half the time of a fault each.

One lock guards all of it. It is taken with and without the GIL, and under it nothing runs that could want the GIL: so a
chunk is made before the lock is taken. The core's lock may be taken under it, never the other way about. A fork
waits for it. The chunks that a forked child inherits are its parent's: they are registered with nobody there, are
given back when they are freed, and nothing is handed out from them.
"""

from libc.stdint cimport uint32_t, uint64_t, uintptr_t
from libc.string cimport memset

from ksmcore._arrays.chunks cimport (
    CLEAN, DIRTY, NO_PAGE, chunk_t, chunk_table, chunks_addr, chunks_at, chunks_drop, chunks_extend, chunks_find,
    chunks_give, chunks_page, chunks_ranges, chunks_tag, chunks_take, chunks_time,
)
from ksmcore._arrays.huge_pages cimport HUGE_BYTES
from ksmcore._arrays.mapped cimport (
    mapped_add, mapped_begin, mapped_core, mapped_discard, mapped_is_chunk, mapped_is_forking, mapped_is_inside,
    mapped_lock, mapped_n_pins, mapped_pin, mapped_register, mapped_register_late, mapped_remove, mapped_swap_limits,
    mapped_table, mapped_tell_unsettled, mapped_tend, mapped_trim, mapped_trim_idle, mapped_unlock, mapped_unpin,
    pinned_t,
)
from ksmcore._core.registry cimport Registry
from ksmcore._guard.merge cimport merge_move
from ksmcore._kernel.forks cimport forks_generation
from ksmcore._kernel.syscalls cimport (
    ADVISE_DONTNEED, ADVISE_POPULATE_WRITE, sys_advise, sys_error, sys_error_clear, sys_is_mapped, sys_locks_future,
    sys_map_anon_at, sys_now_ns, sys_unmap,
)
from ksmcore._records.ranges cimport range_list, ranges_destroy

cdef extern from *:
    """
    #include <errno.h>
    #include <stdlib.h>

    /* A block that was never there: volatile keeps the compiler from seeing that. */
    static void arena_show_block(size_t len_bytes) {
        int before = errno;
        void *volatile shown = malloc(len_bytes);
        free(shown);
        errno = before;
    }
    """
    void arena_show_block(size_t len_bytes) nogil

cdef enum:
    MOST_SHOWN_BYTES = 8 << 20     # of which the C library keeps twice as much at most
    POPULATE_BYTES = 256 << 10
    ZEROED_BYTES = 1 << 20         # zeros of at most so many bytes are written where pages are at hand

cdef size_t _n_refused = 0             # chunks that the kernel had no memory or addresses for
cdef bint _wants_huge = False
cdef bint _shows_blocks = False
cdef size_t _shown_bytes = 0           # the largest block that the C library was shown


cdef void arena_trim() noexcept nogil:
    """Discard all free memory."""
    mapped_lock()
    mapped_trim(0)
    mapped_unlock()


# ---- what the allocator calls -------------------------------------------------------------------------

cdef void* _refused() noexcept nogil:
    global _n_refused
    mapped_lock()
    _n_refused += 1
    mapped_unlock()
    return NULL


cdef void* _take_whole(size_t n_pages) noexcept nogil:
    cdef uint32_t entry = mapped_add(n_pages, _wants_huge, True)
    cdef void* taken
    if entry == <uint32_t>NO_PAGE:
        return _refused()
    taken = <void*>mapped_table.all[entry].addr
    mapped_unlock()
    return taken


cdef uint32_t _emptied(uint32_t first, size_t n_pages) noexcept nogil:
    """Of a dirty extent the first pages, discarded; NO_PAGE where that is refused, or there is none."""
    if first != <uint32_t>NO_PAGE and mapped_discard(
        &mapped_table.all[first // mapped_table.chunk_pages], chunks_addr(&mapped_table, first), n_pages
    ):
        return first
    return NO_PAGE


cdef void* arena_take(size_t len_bytes, bint zeroed) noexcept nogil:
    """Whole pages for len_bytes > 0 bytes; with `zeroed` they show zeros, and none takes memory that had none. NULL
    without memory."""
    cdef size_t n_pages = (len_bytes - 1) // mapped_table.page_bytes + 1
    cdef bint kind = _wants_huge and len_bytes >= HUGE_BYTES
    cdef uint32_t first = NO_PAGE, entry
    cdef bint is_clean = False
    cdef uint64_t now_ns
    cdef sys_error ignored
    cdef void* taken
    if len_bytes > <size_t>-1 // 2 or mapped_is_inside():
        return NULL
    if n_pages > mapped_table.chunk_pages // 2:
        return _take_whole(n_pages)
    mapped_lock()
    now_ns = mapped_tend()
    if not zeroed or len_bytes <= <size_t>ZEROED_BYTES:
        first = chunks_find(&mapped_table, kind, DIRTY, n_pages)
    if first == <uint32_t>NO_PAGE:
        is_clean = True
        first = chunks_find(&mapped_table, kind, CLEAN, n_pages)
    if first == <uint32_t>NO_PAGE and zeroed:
        first = _emptied(chunks_find(&mapped_table, kind, DIRTY, n_pages), n_pages)
    if first == <uint32_t>NO_PAGE:
        mapped_unlock()
        entry = mapped_add(mapped_table.chunk_pages, kind, False)
        if entry == <uint32_t>NO_PAGE:
            return _refused()
        first = entry * mapped_table.chunk_pages
    chunks_take(&mapped_table, first, n_pages, chunks_time(now_ns))
    taken = <void*>chunks_addr(&mapped_table, first)
    mapped_unlock()
    if zeroed and not is_clean:
        memset(taken, 0, n_pages * mapped_table.page_bytes)
    if is_clean and not zeroed and len_bytes <= <size_t>POPULATE_BYTES:
        # Unchecked: before Linux 5.14, or where there is no memory, the pages come with their first writes.
        sys_error_clear(&ignored)
        sys_advise(<uintptr_t>taken, n_pages * mapped_table.page_bytes, ADVISE_POPULATE_WRITE, &ignored)
    return taken


cdef bint arena_owns(const void* memory, size_t* len_bytes) noexcept nogil:
    """Was this handed out here? *len_bytes: of the whole pages. What is asked about in the core never was."""
    cdef uint32_t entry
    cdef const chunk_t* chunk
    cdef bint has_lock = mapped_is_forking()
    if <uintptr_t>memory % mapped_table.page_bytes != 0 or (not has_lock and mapped_is_inside()):
        return False
    if not has_lock:
        mapped_lock()
    entry = chunks_at(&mapped_table, <uintptr_t>memory)
    if entry != <uint32_t>NO_PAGE:
        chunk = &mapped_table.all[entry]
        len_bytes[0] = mapped_table.page_bytes * (
            chunk.n_pages if chunk.tags == NULL
            else chunk.tags[(<uintptr_t>memory - chunk.addr) // mapped_table.page_bytes].n_pages
        )
    if not has_lock:
        mapped_unlock()
    return entry != <uint32_t>NO_PAGE


cdef void _give_inherited(uint32_t entry, uintptr_t addr, size_t n_pages) noexcept nogil:
    """In a forked child, memory of its parent's: the child's part of it is given up, and never handed out."""
    cdef sys_error ignored
    sys_error_clear(&ignored)
    sys_advise(addr, n_pages * mapped_table.page_bytes, ADVISE_DONTNEED, &ignored)
    mapped_table.all[entry].n_taken -= n_pages
    mapped_table.taken_bytes -= n_pages * mapped_table.page_bytes
    if mapped_table.all[entry].n_taken == 0:
        mapped_remove(entry)


cdef void arena_show_blocks(bint wanted) noexcept nogil:
    """See _show_block: while everybody's arrays come from here."""
    global _shows_blocks
    _shows_blocks = wanted


cdef void _show_block(size_t len_bytes) noexcept nogil:
    """The C library keeps freed memory for as large blocks as it has seen freed, and gives all larger ones back to the
    kernel at once (the dynamic threshold of mallopt(3)). It sees none of those that come from here; without this,
    everybody who goes on asking it for such blocks would wait for new pages each time. Not while it is a block of the
    program's that has its arrays here: the others would come to lie at any offset in a page (see design: phase)."""
    global _shown_bytes
    if (
        _shows_blocks and len_bytes > _shown_bytes and len_bytes <= <size_t>MOST_SHOWN_BYTES
        and not sys_locks_future()       # new memory would be filled at once
    ):
        # With some room, lest blocks that get larger and larger are shown one by one. Two threads may show one each.
        _shown_bytes = min(len_bytes + len_bytes // 4, <size_t>MOST_SHOWN_BYTES)
        arena_show_block(_shown_bytes)


cdef bint arena_give(void* memory) noexcept nogil:
    """Take back what arena_take handed out; False where it is not from here."""
    cdef uintptr_t addr = <uintptr_t>memory
    cdef uint32_t entry, first
    cdef chunk_t* chunk
    cdef size_t n_pages, ignored
    if addr % mapped_table.page_bytes != 0:
        return False
    if mapped_is_inside():
        # In the midst of a fork it is left as it is, for ever: to take it back could need the core.
        return arena_owns(memory, &ignored)
    mapped_lock()
    entry = chunks_at(&mapped_table, addr)
    if entry == <uint32_t>NO_PAGE:
        mapped_unlock()
        return False
    chunk = &mapped_table.all[entry]
    n_pages = chunk.n_pages
    if chunk.tags == NULL:
        mapped_remove(entry)
    else:
        first = chunks_page(&mapped_table, entry, addr)
        n_pages = chunks_tag(&mapped_table, first).n_pages
        if chunk.generation != forks_generation():
            _give_inherited(entry, addr, n_pages)
        else:
            chunks_give(&mapped_table, first, n_pages)
    mapped_tend()
    mapped_unlock()
    _show_block(n_pages * mapped_table.page_bytes)
    return True


cdef void _make_young(uint32_t entry, uintptr_t addr) noexcept nogil:
    """What changes its length will mostly do so again. By then nothing of it is to be merged: that could not be moved,
    and would be copied."""
    cdef uint32_t now = chunks_time(sys_now_ns())
    if mapped_table.all[entry].tags == NULL:
        mapped_table.all[entry].taken_at = now
    else:
        chunks_tag(&mapped_table, chunks_page(&mapped_table, entry, addr)).next = now


cdef bint arena_shrink(void* memory, size_t len_bytes) noexcept nogil:
    """Give back the pages behind the first len_bytes > 0 bytes, where that can be. False: it cannot, and is worth a
    move to somewhere else."""
    cdef size_t n_pages = (len_bytes - 1) // mapped_table.page_bytes + 1, before
    cdef uint32_t entry, first
    cdef chunk_t* chunk
    cdef bint stays = True
    if mapped_is_inside():
        return True
    mapped_lock()
    entry = chunks_at(&mapped_table, <uintptr_t>memory)
    chunk = &mapped_table.all[entry]
    if chunk.tags == NULL:
        stays = n_pages > chunk.n_pages // 2
        if stays and n_pages < chunk.n_pages and chunk.generation == forks_generation():
            # It goes on to have these pages, and may grow into them again.
            mapped_discard(chunk, chunk.addr + n_pages * mapped_table.page_bytes, chunk.n_pages - n_pages)
    elif chunk.generation == forks_generation():
        first = chunks_page(&mapped_table, entry, <uintptr_t>memory)
        before = chunks_tag(&mapped_table, first).n_pages
        if n_pages < before:
            chunks_give(&mapped_table, first + <uint32_t>n_pages, before - n_pages)
    _make_young(entry, <uintptr_t>memory)
    mapped_unlock()
    return stays


cdef bint arena_grow(void* memory, size_t len_bytes) noexcept nogil:
    """Have what was handed out here reach over the free pages behind it, for so many bytes in all; False where there
    are too few."""
    cdef size_t n_pages = (len_bytes - 1) // mapped_table.page_bytes + 1
    cdef uint32_t entry
    cdef chunk_t* chunk
    cdef bint grown = False
    if mapped_is_inside():
        return False
    mapped_lock()
    entry = chunks_at(&mapped_table, <uintptr_t>memory)
    chunk = &mapped_table.all[entry]
    if chunk.tags == NULL:
        grown = n_pages <= chunk.n_pages
    elif chunk.generation == forks_generation():
        grown = chunks_extend(
            &mapped_table, chunks_page(&mapped_table, entry, <uintptr_t>memory), n_pages, chunks_time(sys_now_ns())
        )
    _make_young(entry, <uintptr_t>memory)
    mapped_unlock()
    return grown


cdef bint _move(uintptr_t source, uintptr_t target, size_t len_bytes) noexcept nogil:
    """False where that is refused; the target is mapped in any case."""
    cdef sys_error ignored
    sys_error_clear(&ignored)
    if merge_move(source, target, len_bytes, &ignored) == 0:
        return True
    if not sys_is_mapped(target, len_bytes):
        # Unchecked: refused for a whole second already, and here again, there is nothing left to try.
        sys_map_anon_at(target, len_bytes, &ignored)
    return False


cdef bint _let_move(const chunk_t* chunk) noexcept nogil:
    return mapped_core == NULL or (<Registry>mapped_core).let_move(chunk.region_id, chunk.addr)


cdef bint arena_move(void* memory, void* target) noexcept nogil:
    """Move the pages of a chunk that one array has, none of which is merged, to the beginning of another such chunk,
    which is larger. False: nothing was moved, and both are as they were. The target may be anybody's."""
    cdef uint32_t source, entry
    cdef size_t len_bytes
    cdef bint moved = False
    if mapped_is_inside():
        return False
    mapped_lock()
    source = chunks_at(&mapped_table, <uintptr_t>memory)
    entry = chunks_at(&mapped_table, <uintptr_t>target)
    len_bytes = mapped_table.all[source].n_pages * mapped_table.page_bytes
    if (
        entry != <uint32_t>NO_PAGE and mapped_n_pins == 0
        and mapped_table.all[source].tags == NULL and mapped_table.all[entry].tags == NULL
        and mapped_table.all[source].n_pages <= mapped_table.all[entry].n_pages
        and _let_move(&mapped_table.all[source]) and _let_move(&mapped_table.all[entry])
    ):
        moved = _move(<uintptr_t>memory, <uintptr_t>target, len_bytes)
        mapped_register(&mapped_table.all[entry], False)
        if moved:
            # Nothing is mapped there any more, so nothing may be unmapped there.
            chunks_drop(&mapped_table, source)
        else:
            mapped_register(&mapped_table.all[source], False)
    mapped_unlock()
    return moved


cdef int arena_ask(int (*question)(const chunk_table* t, uint32_t generation) noexcept nogil) noexcept nogil:
    """The answer to a question about the chunks, asked under the lock."""
    cdef int answer
    mapped_lock()
    answer = question(&mapped_table, forks_generation())
    mapped_unlock()
    return answer


# ---- life -------------------------------------------------------------------------------------------

cdef int arena_begin(Registry core, bint wants_huge) except -1:
    """Register memory with this core from now on (see mapped_begin), and ask for huge pages, or not."""
    global _wants_huge
    _wants_huge = wants_huge
    return mapped_begin(core)


def pin():
    """Keep all chunks mapped until `unpin` was called as often; returns (address, end) of what is handed out of those
    of this process. MemoryError; then they are not kept."""
    cdef range_list ranges
    cdef bint has_all
    cdef size_t i
    memset(&ranges, 0, sizeof(ranges))
    # Copied first: to make objects may collect garbage, and so give memory back.
    with nogil:
        mapped_lock()
        mapped_pin()
        has_all = chunks_ranges(&mapped_table, forks_generation(), True, 0, 0, &ranges)
        mapped_unlock()
    try:
        if not has_all:
            raise MemoryError("no memory to list what is handed out")
        return [(ranges.all[i].start, ranges.all[i].end) for i in range(ranges.n)]
    except BaseException:
        unpin()
        raise
    finally:
        ranges_destroy(&ranges)


def unpin():
    """Undo one `pin`."""
    cdef pinned_t* left = NULL
    cdef pinned_t* next
    cdef sys_error ignored
    sys_error_clear(&ignored)
    with nogil:
        mapped_lock()
        left = mapped_unpin()
        mapped_unlock()
        while left != NULL:
            next = left.next
            sys_unmap(<uintptr_t>left, left.len_bytes, &ignored)
            left = next


def register_late():
    """Register what could not be when it was mapped."""
    mapped_register_late()


def give_back():
    """Discard all free memory."""
    with nogil:
        arena_trim()


def give_back_idle():
    """Discard as much free memory as there was at every moment since the last call."""
    with nogil:
        mapped_lock()
        mapped_trim_idle()
        mapped_unlock()


def tend(uint64_t young_ns):
    """Discard what was free for long enough by now; have the background scanner leave alone what is free still, or was
    handed out less than so long ago."""
    with nogil:
        mapped_lock()
        mapped_tend()
        mapped_tell_unsettled(young_ns)
        mapped_unlock()


def set_limits(size_t most_free_bytes, uint64_t decay_ns):
    """Keep at most so much free memory at hand, what was not needed for so long not at all; returns what held
    before."""
    with nogil:
        mapped_lock()
        mapped_swap_limits(&most_free_bytes, &decay_ns)
        mapped_unlock()
    return most_free_bytes, decay_ns


def is_chunk(uint64_t region_id):
    """Is the region with this id a chunk?"""
    return mapped_is_chunk(region_id)


def numbers():
    """Chunks, and bytes mapped, handed out (and at most at a time), and free but not discarded; how often no chunk was
    to be had."""
    cdef uint32_t n
    cdef size_t mapped_bytes, taken_bytes, peak_bytes, dirty_bytes, n_refused
    with nogil:
        mapped_lock()
        n, mapped_bytes = mapped_table.n, mapped_table.mapped_bytes
        taken_bytes, peak_bytes = mapped_table.taken_bytes, mapped_table.peak_bytes
        dirty_bytes = mapped_table.dirty_bytes
        n_refused = _n_refused
        mapped_unlock()
    return {
        "chunks": n, "mapped_bytes": mapped_bytes, "taken_bytes": taken_bytes, "peak_bytes": peak_bytes,
        "dirty_bytes": dirty_bytes, "refused": n_refused,
    }
