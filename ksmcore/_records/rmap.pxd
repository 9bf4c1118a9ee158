"""Rmap items and the rmap hash; see rmap.pyx."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from ksmcore._kernel.syscalls cimport sys_error
from ksmcore._trees cimport rb_node


cdef extern from *:
    """
    #ifndef KSMCORE_RMAP_TAG
    #define KSMCORE_RMAP_TAG
    /* 44 bits of page number reach over 56 bits of address with the smallest page. */
    typedef struct {
        uint64_t page_no : 44;
        uint64_t state : 2;
        uint64_t over_store : 1;
        uint64_t epoch : 8;
        uint64_t quiet : 1;
        uint64_t huge : 1;
        uint64_t age : 3;
        uint64_t left_out : 1;
        uint64_t doubted : 1;
        uint64_t spare : 2;
    } rmap_tag;
    #endif
    """
    # What is known of one virtual page, in 8 bytes.
    ctypedef struct rmap_tag:
        uint64_t page_no       # address / page; 0 for an item that is not in use
        uint64_t state         # enum page_state
        uint64_t over_store    # the mapping under this page is of the store, whatever the state: see rmap_slot
        uint64_t quiet         # in the quiet tree: the kernel tells when it is written; UNSHARED only
        uint64_t huge          # was in a huge page when it was looked at last
        uint64_t age           # looks in vain since it changed or was merged, 7 at most
        uint64_t left_out      # by the map budget, when it was looked at last
        uint64_t doubted       # a page with its checksum had other bytes: searches compare, until it changes
        uint64_t epoch         # in the unstable tree when it equals the tree's epoch; UNSHARED only


cdef enum page_state:
    PAGE_VOLATILE          # changed since the last pass, or not seen often enough to tell
    PAGE_UNSHARED          # unchanged, and nothing equal was found
    PAGE_SHARED            # maps a shared page of the store
    PAGE_ZERO              # was all zero and given back; no memory unless written since
    N_STATES


# An item is an index into four arrays, 28 bytes, and 4 in the last, which is touched only for pages that are private
# but lie over the store: a shared one is in no tree, so its slot stands in the place of a link.
# Item 0 is never used.
ctypedef struct rmap_table:
    rb_node* nodes         # .digest: last checksum. UNSHARED: links in one of the trees; SHARED: .left, see rmap_slot
    rmap_tag* tags
    uint32_t* nexts        # next item of the bucket; next free item when not in use
    uint32_t* slots        # see rmap_slot
    uint32_t* buckets
    uint32_t n_items       # in use
    uint32_t top           # items below it have been handed out at least once
    uint32_t capacity
    uint32_t free_head
    uint32_t n_buckets
    uint32_t bucket_base   # power of two, bucket_base <= n_buckets <= 2 * bucket_base
    uint32_t bucket_capacity
    uint32_t n_by_state[<int>N_STATES]
    uint32_t n_over_store  # items with over_store
    uint32_t n_left_out    # items with left_out
    uint64_t placed        # identity of all that lies over the store


# The pages of a range that have items, one after the other, by address.
ctypedef struct rmap_walk:
    uint64_t next_no       # where it goes on; the caller may set it, behind the present page
    uint64_t end_no
    uint64_t page_no       # of this item
    uint32_t item          # 0 before the first, and at the end


cdef inline bint rmap_has_copies(const rmap_table* table) noexcept nogil:
    """Are there private copies over the store, taken for such? One that the program has thrown away shows the store."""
    return table.n_over_store != table.n_by_state[<int>PAGE_SHARED]


cdef inline uint32_t rmap_slot(const rmap_table* table, uint32_t item) noexcept nogil:
    """The slot of the store that the page's mapping points at, whatever the state; 0 where there is none."""
    if not table.tags[item].over_store:
        return 0
    return table.nodes[item].left if table.tags[item].state == PAGE_SHARED else table.slots[item]


cdef inline uint64_t _corner(uint64_t diagonal, uint64_t page_no) noexcept nogil:
    cdef uint64_t mixed = page_no * <uint64_t>0x9e3779b97f4a7c15 + diagonal * <uint64_t>0xc2b2ae3d27d4eb4f
    mixed = (mixed ^ mixed >> 30) * <uint64_t>0xbf58476d1ce4e5b9
    mixed = (mixed ^ mixed >> 27) * <uint64_t>0x94d049bb133111eb
    return mixed ^ mixed >> 31


cdef inline uint64_t rmap_identity(uint64_t page_no, uint64_t slot, uint64_t n_pages) noexcept nogil:
    """A number for this: n_pages neighbours, from page_no on, lie over as many slots, from `slot` on.

    Numbers are added up, in any order, and are those of the pieces wherever a run is cut: along a run page and slot
    differ by the same, and what stands for its beginning less what stands for its end cancels out at each cut. Two
    sums are equal if the same pages lie over the same slots; and, but for one case in 2**64, only then."""
    cdef uint64_t diagonal = page_no - slot
    return _corner(diagonal, page_no) - _corner(diagonal, page_no + n_pages)


cdef int rmap_init(rmap_table* table, uint32_t n_buckets, sys_error* err) noexcept nogil
cdef void rmap_destroy(rmap_table* table) noexcept nogil
cdef uint32_t rmap_find(rmap_table* table, uint64_t page_no, uint32_t hint) noexcept nogil
cdef uint32_t rmap_next(rmap_table* table, uint64_t* page_no, uint64_t end_no, uint32_t hint) noexcept nogil
cdef rmap_walk rmap_walk_over(uint64_t page_no, size_t n_pages) noexcept nogil
cdef bint rmap_step(rmap_table* table, rmap_walk* walk) noexcept nogil
cdef uint32_t rmap_add(rmap_table* table, uint64_t page_no, sys_error* err) noexcept nogil
cdef void rmap_remove(rmap_table* table, uint32_t item) noexcept nogil
cdef void rmap_set_left_out(rmap_table* table, uint32_t item, bint is_left_out) noexcept nogil
cdef void rmap_set_state(rmap_table* table, uint32_t item, page_state state) noexcept nogil
cdef void rmap_set_slot(rmap_table* table, uint32_t item, uint32_t slot) noexcept nogil
cdef void rmap_forget_epochs(rmap_table* table) noexcept nogil
cdef size_t rmap_bytes(rmap_table* table) noexcept nogil
cdef int rmap_check(rmap_table* table) noexcept nogil
