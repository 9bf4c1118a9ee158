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
        uint64_t spare : 4;
    } rmap_tag;
    #endif
    """
    # What is known of one virtual page, in 8 bytes.
    ctypedef struct rmap_tag:
        uint64_t page_no       # address / page; 0 for an item that is not in use
        uint64_t state         # enum page_state
        uint64_t over_store    # the mapping under this page is of the store, whatever the state
        uint64_t quiet         # in the quiet tree: the kernel tells when it is written; UNSHARED only
        uint64_t huge          # was in a huge page when it was looked at last
        uint64_t age           # looks in vain since it changed or was merged, 7 at most
        uint64_t epoch         # in the unstable tree when it equals the tree's epoch; UNSHARED only


cdef enum page_state:
    PAGE_VOLATILE          # changed since the last pass, or not seen often enough to tell
    PAGE_UNSHARED          # unchanged, and nothing equal was found
    PAGE_SHARED            # maps a shared page of the store
    PAGE_ZERO              # was all zero and given back; no memory unless written since
    N_STATES


# An item is an index into three arrays, 28 bytes in all. Item 0 is never used.
ctypedef struct rmap_table:
    rb_node* nodes         # .digest: last checksum. UNSHARED: links in one of the trees; else see rmap_slot
    rmap_tag* tags
    uint32_t* nexts        # next item of the bucket; next free item when not in use
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


cdef inline uint32_t rmap_slot(const rmap_table* table, uint32_t item) noexcept nogil:
    """The slot of the store that the page's mapping points at; 0 when that is not known, as while the page is
    UNSHARED, or when there is none."""
    return table.nodes[item].left if table.tags[item].state != PAGE_UNSHARED else 0


cdef inline void rmap_set_slot(rmap_table* table, uint32_t item, uint32_t slot) noexcept nogil:
    """Kept in place of a link, so the item stands in no tree; void once it is put into one."""
    table.nodes[item].left = slot


cdef int rmap_init(rmap_table* table, uint32_t n_buckets, sys_error* err) noexcept nogil
cdef void rmap_destroy(rmap_table* table) noexcept nogil
cdef uint32_t rmap_find(rmap_table* table, uint64_t page_no, uint32_t hint) noexcept nogil
cdef uint32_t rmap_add(rmap_table* table, uint64_t page_no, sys_error* err) noexcept nogil
cdef void rmap_remove(rmap_table* table, uint32_t item) noexcept nogil
cdef void rmap_set_state(rmap_table* table, uint32_t item, page_state state) noexcept nogil
cdef void rmap_set_over_store(rmap_table* table, uint32_t item, bint over_store) noexcept nogil
cdef void rmap_forget_epochs(rmap_table* table) noexcept nogil
cdef size_t rmap_bytes(rmap_table* table) noexcept nogil
cdef int rmap_check(rmap_table* table) noexcept nogil
