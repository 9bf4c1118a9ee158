"""What an engine owns; see state.pyx."""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t, uintptr_t

from ksmcore._guard.window cimport guard_kind
from ksmcore._kernel.pagemap cimport page_survey, pagemap
from ksmcore._kernel.pool cimport pool_job, pool_t
from ksmcore._kernel.syscalls cimport sys_error
from ksmcore._kernel.tracker cimport tracker_t
from ksmcore._pages cimport checksum_pages_t
from ksmcore._pass.batch cimport batch, scan_counters
from ksmcore._records.budget cimport map_budget
from ksmcore._records.forest cimport forest_t
from ksmcore._records.ranges cimport range_list
from ksmcore._records.regions cimport region_list
from ksmcore._records.rmap cimport rmap_table
from ksmcore._records.store cimport store_t


# What is noted of a page while it is looked at: bits of engine_core.marks, in the order in which they are set.
cdef enum page_mark:
    IS_HUGE = 1                # part of a huge page (scan)
    HAS_STOOD = 2              # in the unstable tree, at the end of the last pass (quiet)
    IS_ARMED = 4               # protected before it is read: it may come to stand in the quiet tree (quiet)
    IS_NEW = 8                 # had no item (match)
    WAS_BROKEN = 16            # was shared or zero, and has been written since (match)


# Where the scan is in what repeats, from page to page and from span to span.
ctypedef struct stretch_t:
    # the stretch of equal checksums
    uint64_t start               # page number of its first page in this span
    uint64_t end                 # page number after its last page seen
    uint64_t n_pages             # in all
    bint end_unseen              # it may go on in the next span
    uint32_t n_copies            # that it should lie over
    uint32_t digest
    uint32_t slot                # first slot of the block that its last page was matched with, 0: none
    bint more_follows            # the region goes on after this span
    # guesses: where a stretch of different pages comes again, what matches the next one
    uint32_t next_slot
    uint32_t beside              # the item so many pages further that was asked about last
    uint64_t n_further           # modulo 2**64; 0: no partner was met yet
    # the block that the last page was matched with, in this span; 0: none
    uint32_t block_slot
    uint32_t block_copies


# What the program has advised about registered memory, by the last look at it. Times are of sys_now_ns.
ctypedef struct advice_t:
    range_list ranges            # with enum region_flag bits
    size_t n_barred              # regions that no pass looks at for what was seen
    uint64_t seen_ns             # when the last look was begun; 0: there was none
    uint64_t cost_ns             # of the last look
    int64_t n_maps               # of the process then, about
    bint for_restoring           # that was its purpose
    uint64_t pass_ns             # when the pass was begun; older looks do not serve it


# When all mappings of the process were counted last, for which limits. Private to look and census.
ctypedef struct counted_t:
    uint64_t at_ns               # 0: never, or that failed
    bint in_pass                 # since it began
    int64_t n_ours               # see maps_tally
    int64_t asked_maps
    int64_t max_map_count


# Everything an engine owns, except its lock and its Python face. Whoever touches it holds the lock.
ctypedef struct engine_core:
    size_t page_bytes
    # settings
    bint use_zero_pages
    bint smart_scan
    bint by_content
    int64_t max_shared_pages     # -1: no limit
    uint32_t max_page_sharing    # most pages that map one slot; MAX_SHARERS: no limit but that
    checksum_pages_t checksum
    pool_t* pool                 # of the walk that is under way
    uint32_t zero_digest         # checksum of a page of zeros
    # state
    region_list regions
    rmap_table rmap
    store_t store
    forest_t stable
    forest_t unstable
    forest_t quiet               # like the unstable one, of pages whose writes the tracker tells: it stays
    uint64_t n_passes            # begun, in part or whole
    uint32_t epoch               # of the unstable tree, 1 to 255
    uint32_t last_epoch          # of the one before it
    pagemap pm
    bint may_watch               # the tracker can be had, and is wanted
    tracker_t tracker            # opened for the first region that is watched
    guard_kind guard             # in use
    map_budget budget
    advice_t advice
    range_list unsettled         # free or young memory, which a patient walk leaves alone
    size_t n_maps                # of the process, as they were counted last
    counted_t counted            # what that was made for
    uint32_t n_idle_left         # slots that the last release had to leave idle
    batch b
    scan_counters counters
    bint left_out_rests          # what the map budget left out is not looked at in this pass
    uint64_t merges_left         # in this batch; each page looked at makes one at most
    stretch_t stretch
    # one span's working memory: the answer of the survey, and of each page of it that is looked at
    page_survey survey
    uint8_t* marks               # enum page_mark bits
    uint32_t* items              # 0: none yet
    const uint8_t** pages
    uint32_t* digests
    pool_job hashing             # of the pages
    size_t hashing_from
    size_t n_hashing


cdef int state_init(
    engine_core* c, guard_kind guard, uint32_t n_buckets, bint with_pagemap, bint with_tracker, sys_error* err
) noexcept nogil
cdef void state_destroy(engine_core* c, bint in_child) noexcept nogil
cdef const uint8_t* state_page_of(const engine_core* c, uint32_t item) noexcept nogil
cdef void state_begin_pass(engine_core* c) noexcept nogil
cdef size_t state_bytes(engine_core* c) noexcept nogil
