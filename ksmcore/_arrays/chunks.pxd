"""Chunks of pages, cut into extents; see chunks.pyx."""

from libc.stdint cimport uint32_t, uint64_t, uintptr_t

from ksmcore._records.ranges cimport range_list


cdef extern from *:
    """
    #ifndef KSMCORE_EXTENT_TAG
    #define KSMCORE_EXTENT_TAG
    typedef struct {
        unsigned n_pages : 30;
        unsigned state : 2;
        unsigned next, prev;
    } extent_tag;
    #endif
    """
    # Of one page. n_pages and state count for the first and the last page of an extent; the links, for the first
    # page of a free one: its neighbours in the bin, NO_PAGE at the ends. Of one that is taken, `next` is when.
    ctypedef struct extent_tag:
        uint32_t n_pages
        uint32_t state
        uint32_t next
        uint32_t prev

cdef enum:
    N_BINS = 160
    N_WORDS = 3                # of 64 bins each

cdef enum extent_state:
    TAKEN
    CLEAN                      # free, shows zeros and holds no memory
    DIRTY                      # free

# A page is named by its number over all chunks: the chunk's entry times chunk_pages, and its place in the chunk.
cdef enum:
    NO_PAGE = 0xffffffff

ctypedef struct chunk_t:
    uintptr_t addr             # 0: this entry is free
    size_t n_pages
    size_t n_taken
    uint64_t region_id
    uint32_t generation        # of the process that made it
    bint wants_huge
    bint is_registered
    uint32_t taken_at          # without tags: when, as of chunks_time
    int flags                  # of its region: enum region_flag bits
    extent_tag* tags           # NULL: one array has all of it

# The free extents of one state, in chunks of one kind.
ctypedef struct bin_list:
    uint32_t heads[N_BINS]
    uint64_t filled[N_WORDS]

ctypedef struct chunk_table:
    size_t page_bytes
    uint32_t chunk_pages       # of every chunk that has tags
    chunk_t* all               # entries, in use or free
    uint32_t n_entries
    uint32_t capacity
    uint32_t* by_addr          # entries in use, by address
    uint32_t n
    bin_list bins[2][3]        # by huge pages wanted, and state; those of TAKEN are not used
    size_t mapped_bytes
    size_t taken_bytes
    size_t peak_bytes          # that were taken at a time
    size_t dirty_bytes
    size_t idle_bytes          # least that was dirty at any moment since this was set, by whoever reads it

# What is to be done with pages of a chunk from an address on; False: it was refused.
ctypedef bint (*chunk_act)(const chunk_t* chunk, uintptr_t addr, size_t n_pages) noexcept nogil


cdef void chunks_init(chunk_table* t, size_t page_bytes, size_t chunk_bytes) noexcept nogil
cdef void chunks_clear_bins(chunk_table* t) noexcept nogil
cdef uint32_t chunks_bin(size_t n_pages) noexcept nogil
cdef uint32_t chunks_enter(chunk_table* t, const chunk_t* chunk) noexcept nogil
cdef void chunks_drop(chunk_table* t, uint32_t entry) noexcept nogil
cdef uint32_t chunks_at(const chunk_table* t, uintptr_t addr) noexcept nogil
cdef uintptr_t chunks_addr(const chunk_table* t, uint32_t page) noexcept nogil
cdef uint32_t chunks_page(const chunk_table* t, uint32_t entry, uintptr_t addr) noexcept nogil
cdef extent_tag* chunks_tag(const chunk_table* t, uint32_t page) noexcept nogil
cdef uint32_t chunks_find(const chunk_table* t, bint wants_huge, extent_state state, size_t n_pages) noexcept nogil
cdef void chunks_take(chunk_table* t, uint32_t first, size_t n_pages, uint32_t at) noexcept nogil
cdef bint chunks_extend(chunk_table* t, uint32_t first, size_t n_pages, uint32_t at) noexcept nogil
cdef void chunks_give(chunk_table* t, uint32_t first, size_t n_pages) noexcept nogil
cdef void chunks_clean(chunk_table* t, uint32_t first, size_t n_pages) noexcept nogil
cdef size_t chunks_before(const chunk_table* t, uint32_t first, extent_state state) noexcept nogil
cdef size_t chunks_behind(const chunk_table* t, uint32_t end, extent_state state) noexcept nogil
cdef uint32_t chunks_time(uint64_t now_ns) noexcept nogil
cdef bint chunks_ranges(
    const chunk_table* t, uint32_t generation, bint settled, uint32_t now, uint32_t age, range_list* ranges
) noexcept nogil
cdef void chunks_each_edge(const chunk_table* t, size_t unit_pages, chunk_act act) noexcept nogil
cdef void chunks_unhang_all(chunk_table* t, uint32_t entry) noexcept nogil
