"""The store, the memory file of shared pages; see store.pyx."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t, uintptr_t

from ksmcore._kernel.pagemap cimport pagemap
from ksmcore._kernel.syscalls cimport sys_error, sys_file
from ksmcore._trees cimport rb_node


cdef extern from *:
    """
    #ifndef KSMCORE_STORE_USE
    #define KSMCORE_STORE_USE
    typedef struct {
        uint32_t number : 25;
        uint32_t used : 1;
        uint32_t copy : 1;
        uint32_t frozen : 1;
        uint32_t pending : 1;
        uint32_t lost : 1;
        uint32_t idle : 1;
        uint32_t hollow : 1;
    } store_use;
    #endif
    """
    # What is known of one slot, in 4 bytes beside its tree node.
    ctypedef struct store_use:
        uint32_t number        # private to store: of sharers; while pending, what it is pending as; or DEAD
        uint32_t used          # handed out, and not to be had again yet
        uint32_t copy          # same bytes as the slot before it: belongs to that slot's block
        uint32_t frozen        # existed at a fork: another process may map it, so neither written nor punched
        uint32_t lost          # mapped where nobody keeps account of it: never released
        uint32_t pending       # not written yet; its bytes are still the candidate's
        uint32_t idle          # of a block without sharers that waits for its release: see claims
        uint32_t hollow        # released, its memory given back; still under private copies, or lost

cdef enum:
    MAX_SHARERS = 0x01ff0000   # what `number` can hold, less what one batch can add
    DEAD = 0x01ffffff          # released, but still mapped by another process
    SEGMENT_BYTES = 0x4000000  # 64 MiB: the file grows, and is viewed, by this much
    MAX_RELEASES = 1024        # slots waiting to be punched together; more than the longest block has


# A slot is a page of the file: slot * page_bytes is its offset. Slot 0 is never used.
ctypedef struct store_t:
    sys_file file              # none until the first shared page
    size_t page_bytes
    rb_node* nodes             # stable tree node of each slot; .digest: checksum of its bytes
    store_use* uses
    uint32_t* claims           # pages here that lie over each slot, by the rmap table; sharers are among them
    uint8_t** views            # read-only mapping of each segment
    int gets_huge_pages        # the kernel gives them to memory files; -1: not asked yet
    uint32_t n_segments
    uint32_t slots_per_segment
    uint32_t capacity          # slots that the arrays and the file have room for
    uint32_t top               # slots below it have been handed out at least once
    uint32_t cursor            # where the next search for a free slot starts
    uint32_t aligned_end       # slots up to here are for a huge page, so none is taken elsewhere
    uint32_t n_used
    uint32_t n_frozen
    uint32_t n_dead            # of the frozen: released here, kept for other processes only
    uint32_t n_shared          # slots with at least one sharer
    uint32_t n_idle
    uint32_t n_hollow
    uint32_t seen_forks        # forks whose children the frozen slots are frozen for
    uint32_t seen_gone         # children of the forks up to this one are known to be gone
    uint32_t n_releases
    uint32_t releases[<int>MAX_RELEASES]


cdef int store_told_huge     # -1; or, by a test, whether the kernel gives memory files huge pages


# What a slot in use is: pending (to be written yet), shared by so many pages, or dead.
cdef inline bint store_is_pending(const store_t* store, uint32_t slot) noexcept nogil:
    return store.uses[slot].pending


cdef inline uint32_t store_pending(const store_t* store, uint32_t slot) noexcept nogil:
    """Of a pending slot: what store_set_pending was told."""
    return store.uses[slot].number


cdef inline void store_set_pending(store_t* store, uint32_t slot, uint32_t number) noexcept nogil:
    """From a fresh slot to a pending one; `number`, the caller's, names its place in some list."""
    store.uses[slot].pending = 1
    store.uses[slot].number = number


cdef inline void store_settle(store_t* store, uint32_t slot) noexcept nogil:
    """From a pending slot to one without sharers."""
    store.uses[slot].pending = 0
    store.uses[slot].number = 0


cdef inline uint32_t store_sharers(const store_t* store, uint32_t slot) noexcept nogil:
    """Virtual pages that map a slot, which is not dead."""
    return 0 if store.uses[slot].pending else store.uses[slot].number


cdef inline bint store_is_dead(const store_t* store, uint32_t slot) noexcept nogil:
    return store.uses[slot].used and store.uses[slot].number == DEAD


cdef inline bint store_is_live(const store_t* store, uint32_t slot) noexcept nogil:
    """Has this slot bytes that a page may share?"""
    return (
        0 < slot < store.top and store.uses[slot].used and not store.uses[slot].pending
        and not store.uses[slot].hollow and store.uses[slot].number != DEAD
    )


cdef inline bint store_is_shared_block(const store_t* store, uint32_t slot, uint32_t digest) noexcept nogil:
    """Does a block of shared pages with this checksum begin here, whose first slot has a sharer?"""
    return (
        0 < slot < store.top and store.nodes[slot].digest == digest and store.uses[slot].used
        and not store.uses[slot].pending and not store.uses[slot].copy and 0 < store.uses[slot].number < DEAD
    )


cdef bint store_is_there(const store_t* store) noexcept nogil
cdef void store_init(store_t* store, size_t page_bytes) noexcept nogil
cdef void store_destroy(store_t* store) noexcept nogil
cdef uint32_t store_alloc(store_t* store, uint32_t n_slots, sys_error* err) noexcept nogil
cdef void store_align(store_t* store, uint32_t n_slots) noexcept nogil
cdef const uint8_t* store_page(store_t* store, uint32_t slot) noexcept nogil
cdef int store_write(
    store_t* store, uint32_t slot, const uint8_t* source, uint32_t n_pages, sys_error* err
) noexcept nogil
cdef void store_share(store_t* store, uint32_t slot) noexcept nogil
cdef uint32_t store_unshare(store_t* store, uint32_t slot) noexcept nogil
cdef void store_idle(store_t* store, uint32_t first) noexcept nogil
cdef void store_wake(store_t* store, uint32_t slot) noexcept nogil
cdef void store_claim(store_t* store, uint32_t slot) noexcept nogil
cdef void store_unclaim(store_t* store, uint32_t slot) noexcept nogil
cdef uint32_t store_unshown(store_t* store, pagemap* pm, uint32_t slot, uint32_t n_slots) noexcept nogil
cdef void store_lose(store_t* store, uint32_t slot) noexcept nogil
cdef uint32_t store_block(store_t* store, uint32_t slot, uint32_t* n_copies) noexcept nogil
cdef uint64_t store_block_sharers(store_t* store, uint32_t slot) noexcept nogil
cdef void store_release(store_t* store, uint32_t slot) noexcept nogil
cdef void store_trim(store_t* store) noexcept nogil
cdef void store_thaw(store_t* store, pagemap* pm) noexcept nogil
cdef size_t store_bytes(store_t* store) noexcept nogil
