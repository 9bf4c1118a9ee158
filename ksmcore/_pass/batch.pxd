"""A batch: what is to be merged next; see batch.pyx."""

from libc.errno cimport EFBIG
from libc.stdint cimport uint8_t, uint32_t, uint64_t, uintptr_t

from ksmcore._guard.window cimport guard_kind
from ksmcore._kernel.syscalls cimport sys_error, sys_now_ns
from ksmcore._kernel.tracker cimport tracker_t
from ksmcore._pages cimport checksum_pages_t
from ksmcore._records.budget cimport map_budget
from ksmcore._records.forest cimport forest_t
from ksmcore._records.rmap cimport rmap_table
from ksmcore._records.store cimport store_t


# Pages that could have been merged and were not, by reason. Each is met again in the next pass.
ctypedef struct skip_counters:
    uint64_t changed             # written between its checksum and the guard, or only its checksum was equal
    uint64_t refused             # the kernel refused to protect or to remap it
    uint64_t map_budget          # its run was too short for what is left of the map budget
    uint64_t store               # the store could not be grown or written
    uint64_t file_size           # the limit on the size of files leaves the store no room (RLIMIT_FSIZE)
    uint64_t max_shared_pages    # that limit is reached
    uint64_t partner             # its partner could not be merged, so the merge was undone
    uint64_t away                # swapped out, or being moved by the kernel
    uint64_t pinned              # a device may be writing into it (direct I/O, io_uring)
    uint64_t in_call             # a call in flight may write into it
    uint64_t sigsegv_blocked     # a thread blocks SIGSEGV, or may, and the guard is mprotect
    uint64_t altered             # in a region that the program has mapped otherwise meanwhile
    uint64_t held                # in a region that is held (see Region.hold)
    uint64_t smart_scan          # found no partner so often that it is looked at less often
    uint64_t young               # its memory was handed out a moment ago
    uint64_t max_page_sharing    # its shared page has so many mappings, and no partner for another was met yet


# The path of a page, by what takes time on it; in nanoseconds.
ctypedef struct stage_times:
    uint64_t pagemap             # which pages need a look; protecting quiet ones
    uint64_t checksum
    uint64_t trees               # items, and searches in the trees
    uint64_t store               # new shared pages
    uint64_t guard               # windows: comparing, mapping, giving back


# What an engine has done, since it was made. Only ever grows. Python sees these fields by their names; what
# they mean to users is told in _engine/counters.py, under the same names.
ctypedef struct scan_counters:
    uint64_t full_scans
    uint64_t pages_scanned       # present pages passed
    uint64_t pages_hashed        # checksums computed
    uint64_t pages_merged        # mappings of shared pages made
    uint64_t pages_reshared      # of those: by dropping a private copy that had become equal again
    uint64_t pages_zeroed        # zero pages given back
    uint64_t cow_breaks          # shared pages found copied by a write
    skip_counters skipped
    stage_times stage_ns


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
    uint8_t is_huge              # in a huge page when it was looked at
    uint8_t over_store           # what lies under the page now
    uint8_t founder              # one of the two pages that the shared page was made for
    uint8_t fate                 # enum fate


# A block of slots that has its place in the stable tree already, and gets its bytes in the flush.
ctypedef struct pending_block:
    uint32_t slot
    uint32_t n_copies
    uint32_t n_accepted          # intents that the budget allows
    uint32_t n_in_run            # the longer of the runs that its founders are in
    uint32_t founders            # sum of the places of both among the intents
    bint alone                   # no other shared page had its checksum when it was given its place
    bint moves                   # it is given a new place, now that its bytes are fixed
    bint goes_on                 # more pages are expected than this batch has
    uint32_t fate                # enum fate
    const uint8_t* source        # the candidate page


# Intents that lead to a slot.
ctypedef struct planned_sharers:
    uint32_t slot                # 0: no entry
    uint32_t n


ctypedef struct batch:
    # what it works on: the engine's
    store_t* store
    rmap_table* rmap
    forest_t* stable
    scan_counters* counters
    map_budget* budget
    const guard_kind* guard
    const tracker_t* tracker
    checksum_pages_t checksum
    size_t page_bytes
    const uint32_t* max_page_sharing
    # its own
    sys_error err                # first failure of the batch
    intent* intents
    pending_block* pendings
    uint32_t* slots              # for carrying out, like outcomes
    uint8_t* outcomes
    uint32_t* doubted            # items that came to be doubted in the last flush
    uint32_t n_doubted
    planned_sharers* planned     # a hash table of 2 * capacity entries, by slot
    int refusal                  # errno of the last new block that there was no room for
    uint32_t n_intents
    uint32_t n_pendings
    uint32_t capacity            # of intents; pendings have half of it
    bint has_set_aside           # a block, because these intents would fill it


cdef inline uint64_t batch_end_stage(uint64_t* stage_ns, uint64_t begun_ns) noexcept nogil:
    """Count the time since then for a stage; returns the time, at which the next one begins."""
    cdef uint64_t now_ns = sys_now_ns()
    stage_ns[0] += now_ns - begun_ns
    return now_ns


cdef inline uint64_t* batch_no_room(batch* b, int code) noexcept nogil:
    """The reason to leave a page out because of that errno."""
    return &b.counters.skipped.file_size if code == EFBIG else &b.counters.skipped.store


cdef int batch_init(batch* b, uint32_t capacity) noexcept nogil
cdef void batch_destroy(batch* b) noexcept nogil
cdef void batch_clear(batch* b) noexcept nogil
cdef const uint8_t* batch_stable_page(void* owner, uint32_t slot) noexcept nogil
cdef void batch_add(
    batch* b, intent_kind kind, uint64_t page_no, uint32_t item, uint32_t slot, int flags, bint founder
) noexcept nogil
cdef uint32_t batch_sharers(const batch* b, uint32_t slot) noexcept nogil
cdef void batch_leave(batch* b, intent* left, uint64_t* reason) noexcept nogil
cdef void batch_doubt(batch* b, uint32_t item) noexcept nogil
cdef void batch_set_aside(batch* b, uint32_t first) noexcept nogil
cdef void batch_offer(batch* b, uint32_t slot) noexcept nogil
cdef void batch_lie_over(batch* b, uint32_t item, uint32_t slot) noexcept nogil
cdef bint batch_adopt(batch* b, uint32_t item) noexcept nogil
cdef void batch_drop_sharer(batch* b, uint32_t item) noexcept nogil
