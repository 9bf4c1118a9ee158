"""What an engine owns; see state.pyx."""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t, uintptr_t

from ksmcore._records.forest cimport forest_t
from ksmcore._kernel.pagemap cimport BLOCK_PAGES, page_survey, pagemap
from ksmcore._pages cimport checksum_pages_t
from ksmcore._records.regions cimport region_list, region_t
from ksmcore._records.rmap cimport rmap_table
from ksmcore._pass.batch cimport batch, scan_counters
from ksmcore._records.store cimport store_t
from ksmcore._kernel.syscalls cimport sys_error
from ksmcore._kernel.tracker cimport tracker_t
from ksmcore._guard.window cimport guard_kind


cdef enum:
    SPAN_PAGES = BLOCK_PAGES    # looked at, matched and merged together, and the lock held that long


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
    uint32_t zero_digest         # checksum of a page of zeros
    # state
    region_list regions
    rmap_table rmap
    store_t store
    forest_t stable
    forest_t unstable
    forest_t quiet               # like the unstable one, of pages whose writes the tracker tells: it stays
    uint32_t epoch               # of the unstable tree, 1 to 255
    uint32_t last_epoch          # of the one before it
    pagemap pm
    bint may_watch               # the tracker can be had, and is wanted
    tracker_t tracker            # opened for the first region that is watched
    batch b
    scan_counters counters
    uint64_t merges_left         # in this batch; each page looked at makes one at most
    # the stretch of equal checksums that the scan is in, across spans
    uint64_t stretch_start       # page number of its first page in this span
    uint64_t stretch_end         # page number after its last page seen
    uint64_t stretch_pages       # in all
    bint stretch_end_unseen      # it may go on in the next span
    uint32_t stretch_copies      # that it should lie over
    uint32_t stretch_digest
    uint32_t stretch_slot        # first slot of the block that its last page was matched with, 0: none
    bint more_follows            # the region goes on after this span
    # guesses: where a stretch of different pages comes again, what matches the next one
    uint32_t next_slot
    uint32_t next_partner
    # the block that the last page was matched with, in this span; 0: none
    uint32_t block_slot
    uint32_t block_copies
    # one span's working memory
    page_survey survey
    uint8_t* flags               # enum page_flag bits, later what the page was (see scan)
    uint32_t* items
    const uint8_t** pages
    uint32_t* digests


cdef int core_init(
    engine_core* c, guard_kind guard, uint32_t n_buckets, bint with_pagemap, bint with_tracker, sys_error* err
) noexcept nogil
cdef void core_destroy(engine_core* c, bint in_child) noexcept nogil
cdef const uint8_t* page_of_item(const engine_core* c, uint32_t item) noexcept nogil
cdef void core_begin_pass(engine_core* c) noexcept nogil
cdef size_t core_bytes(engine_core* c) noexcept nogil
