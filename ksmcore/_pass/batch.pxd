"""A batch: what is to be merged next; see _batch.pyx."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t, uintptr_t

from ksmcore._records.budget cimport map_budget
from ksmcore._records.forest cimport forest_t
from ksmcore._pages cimport checksum_pages_t
from ksmcore._records.rmap cimport rmap_table
from ksmcore._records.store cimport store_t
from ksmcore._kernel.syscalls cimport sys_error, sys_now_ns
from ksmcore._kernel.tracker cimport tracker_t
from ksmcore._guard.window cimport guard_kind


# Why a page that could have been merged was not. Each is met again in the next pass.
cdef enum skip_reason:
    SKIP_CHANGED             # written between its checksum and the guard
    SKIP_REFUSED             # the kernel refused to protect or to remap it
    SKIP_MAP_BUDGET          # its run was too short for what is left of the map budget
    SKIP_STORE               # the store could not be grown or written
    SKIP_MAX_SHARED          # max_shared_pages reached
    SKIP_PARTNER             # its partner could not be merged, so the merge was undone
    SKIP_AWAY                # swapped out, or being moved by the kernel
    SKIP_PINNED              # a device may be writing into it (direct I/O, io_uring)
    SKIP_ALTERED             # in a region that the program has mapped otherwise meanwhile
    SKIP_HELD                # in a region that is held (see Region.hold)
    SKIP_SMART               # found no partner so often that it is looked at less often (smart_scan)
    SKIP_MAX_SHARING         # its shared page has max_page_sharing mappings, and no partner for another was met yet
    N_SKIPS


# The path of a page, by what takes time on it.
cdef enum stage:
    STAGE_PAGEMAP            # which pages need a look; protecting quiet ones
    STAGE_CHECKSUM
    STAGE_TREES              # items, and searches in the trees
    STAGE_STORE              # new shared pages
    STAGE_GUARD              # windows: comparing, mapping, giving back
    N_STAGES


# What an engine has done, since it was made. Only ever grows.
ctypedef struct scan_counters:
    uint64_t full_scans
    uint64_t pages_scanned       # present pages passed
    uint64_t pages_hashed        # checksums computed
    uint64_t pages_merged        # mappings of shared pages made
    uint64_t pages_reshared      # of those: by dropping a private copy that had become equal again
    uint64_t pages_zeroed        # zero pages given back
    uint64_t cow_breaks          # shared pages found copied by a write
    uint64_t skips[<int>N_SKIPS]
    uint64_t stage_ns[<int>N_STAGES]


cdef enum fate:
    OPEN                         # to be carried out
    LEFT                         # not carried out; already counted
    MERGED                       # carried out

cdef enum intent_kind:
    INTENT_MERGE
    INTENT_RESHARE
    INTENT_ZERO
    INTENT_PLAIN                 # of a page that stands in the unstable tree, and stays there


# This page -> that shared page. Valid within one batch.
ctypedef struct intent:
    uint64_t page_no
    uint32_t item
    uint32_t slot                # 0 for INTENT_ZERO and INTENT_PLAIN
    uint8_t kind                 # enum intent_kind
    uint8_t flags                # enum region_flag bits
    uint8_t over_store           # what lies under the page now
    uint8_t founder              # one of the two pages that the shared page was made for
    uint8_t fate                 # enum fate


# A block of slots that has its place in the stable tree already, and gets its bytes in the flush.
ctypedef struct pending_block:
    uint32_t slot
    uint32_t n_copies
    uint32_t n_accepted          # intents that the budget allows
    bint alone                   # no other shared page had its checksum when it was given its place
    bint goes_on                 # more pages are expected than this batch has
    uint32_t fate                # enum fate
    const uint8_t* source        # the candidate page


# Intents that lead to a slot.
ctypedef struct planned_sharers:
    uint32_t slot                # 0: no entry
    uint32_t n


ctypedef struct batch:
    store_t* store
    rmap_table* rmap
    forest_t* stable
    scan_counters* counters
    map_budget budget
    guard_kind guard
    const tracker_t* tracker
    checksum_pages_t checksum
    size_t page_bytes
    sys_error err                # first failure of the batch
    intent* intents
    pending_block* pendings
    uint32_t* slots              # for carrying out, like outcomes
    uint8_t* outcomes
    planned_sharers* planned     # a hash table of 2 * capacity entries, by slot
    uint32_t n_intents
    uint32_t n_pendings
    uint32_t capacity            # of intents; pendings have half of it


cdef inline uint64_t stage_end(scan_counters* counters, stage which, uint64_t begun_ns) noexcept nogil:
    """Count the time since then for a stage; returns the time, at which the next one begins."""
    cdef uint64_t now_ns = sys_now_ns()
    counters.stage_ns[<int>which] += now_ns - begun_ns
    return now_ns


cdef int batch_init(batch* b, uint32_t capacity) noexcept nogil
cdef void batch_destroy(batch* b) noexcept nogil
cdef void batch_clear(batch* b) noexcept nogil
cdef const uint8_t* stable_page_of(void* owner, uint32_t slot) noexcept nogil
cdef void batch_add(
    batch* b, intent_kind kind, uint64_t page_no, uint32_t item, uint32_t slot, int flags, bint founder
) noexcept nogil
cdef uint32_t batch_sharers(const batch* b, uint32_t slot) noexcept nogil
cdef void intent_leave(batch* b, intent* left, skip_reason reason) noexcept nogil
cdef void drop_sharer(batch* b, uint32_t item) noexcept nogil
