"""What tests ask of the arena."""

from libc.stdint cimport uint32_t, uint64_t

from ksmcore._arrays.arena cimport arena_ask, arena_owns
from ksmcore._arrays.chunks cimport (
    CLEAN, DIRTY, NO_PAGE, N_BINS, TAKEN, chunk_table, chunks_at, chunks_bin, chunks_tag, extent_tag,
)


def is_here(array):
    """Did an array's memory come from the arena?"""
    cdef size_t ignored = 0, address = array.__array_interface__["data"][0]
    return bool(arena_owns(<const void*>address, &ignored))


def check_arena():
    """Do extents and bins add up? The number of the first invariant that is broken, 0 for none."""
    cdef int broken
    with nogil:
        broken = arena_ask(_check)
    return broken


cdef int _check(const chunk_table* t, uint32_t generation) noexcept nogil:
    cdef uint32_t entry, page, end, state, before, n_pages
    cdef size_t n_taken, n_hanging = 0, n_free = 0, dirty_bytes = 0, taken_bytes = 0
    cdef int kind, number
    cdef const extent_tag* tag
    for entry in range(t.n_entries):
        if t.all[entry].addr == 0:
            continue
        if chunks_at(t, t.all[entry].addr) != entry:
            return 1
        taken_bytes += t.all[entry].n_taken * t.page_bytes
        if t.all[entry].tags == NULL or t.all[entry].generation != generation:
            continue
        page = entry * t.chunk_pages
        end = page + t.chunk_pages
        n_taken = 0
        before = TAKEN
        while page < end:
            state = chunks_tag(t, page).state
            n_pages = chunks_tag(t, page).n_pages
            if n_pages == 0 or chunks_tag(t, page + n_pages - 1).n_pages != n_pages:
                return 2
            if chunks_tag(t, page + n_pages - 1).state != state:
                return 3
            if state != TAKEN and state == before:
                return 4
            n_taken += n_pages if state == TAKEN else 0
            n_free += state != TAKEN
            dirty_bytes += n_pages * t.page_bytes if state == DIRTY else 0
            before = state
            page += n_pages
        if page != end:
            return 5
        if n_taken != t.all[entry].n_taken:
            return 6
    for kind in range(2):
        for state in range(<uint32_t>CLEAN, <uint32_t>DIRTY + 1):
            for number in range(N_BINS):
                page = t.bins[kind][state].heads[number]
                while page != NO_PAGE:
                    tag = chunks_tag(t, page)
                    if chunks_bin(tag.n_pages) != <uint32_t>number or tag.state != state:
                        return 7
                    n_hanging += 1
                    page = tag.next
    if n_hanging != n_free:
        return 8
    if dirty_bytes != t.dirty_bytes or taken_bytes != t.taken_bytes:
        return 9
    return 10 if t.idle_bytes > t.dirty_bytes else 0
