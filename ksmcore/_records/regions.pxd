"""The registered page ranges of an engine; see regions.pyx."""

from libc.stdint cimport uint32_t, uint64_t, uintptr_t


# What a mapping of a region's pages must have again when it is made anew; and whether they are watched.
cdef enum region_flag:
    REGION_DONTFORK = 1      # madvise
    REGION_DONTDUMP = 2      # madvise
    REGION_HUGEPAGE = 4      # madvise
    REGION_NOHUGEPAGE = 8    # madvise
    REGION_WATCHED = 16      # a tracker watches its anonymous memory
    REGION_SEQUENTIAL = 32   # madvise
    REGION_RANDOM = 64       # madvise
    REGION_MERGEABLE = 128   # madvise
    REGION_LOCKED = 256      # mlock; for what is restored
    REGION_UNSEEN = 512      # nothing but its place is known: a look comes before the first merge
    REGION_KEY_SHIFT = 12    # memory protection key, in four bits; for what is restored
    REGION_KEY = 15 << 12
    REGION_BOUND = 1 << 16   # a NUMA policy; for what is restored

# Why no pass looks at a region, although it is plain memory.
cdef enum region_bar:
    NOT_BARRED
    BARRED_ALTERED           # it has what merging would lose
    BARRED_WATCHED           # another's userfaultfd watches it

# The whole pages inside one registered buffer.
ctypedef struct region_t:
    uintptr_t addr           # of the first page
    size_t n_pages
    uint64_t id
    int flags                # enum region_flag bits: as it was registered, and REGION_WATCHED
    region_bar bar           # by the last look at what the program has advised
    region_bar seen_bar      # private to look
    bint looked              # it was part of that look
    uint32_t n_holds         # while not 0, no window is opened in it
    uint32_t watch_tried     # private to quiet
    bint being_made          # a copy fills it: not looked at
    bint passed_over         # altered until the next census, whatever its mappings say
    bint altered             # the program has mapped it otherwise: not looked at (see census)
    uint64_t cow_breaks      # shared pages in it found copied by a write
    size_t n_plain_pages     # private to census
    size_t n_there           # its first pages that were all there when that was last asked: see still
    uint64_t careful_pass    # in which the kernel was last asked whether pages have gone; as seen_pass private to still
    uint64_t seen_pass       # in which it was last asked so of all of them
    size_t n_surveyed        # its first pages that the present walk has surveyed; with the next two private to still
    size_t n_looked          # how many of them needed a look
    size_t n_away            # how many were not there
    bint is_settled          # when all pages were surveyed last, hardly one needed a look, ...
    size_t n_absent          # ... and so many were not there
    size_t n_absent_left     # of which the present walk has not come to so many


# By address, disjoint.
ctypedef struct region_list:
    region_t* all
    size_t n
    size_t capacity
    size_t n_unseen          # with REGION_UNSEEN
    size_t page_bytes


cdef void regions_init(region_list* regions, size_t page_bytes) noexcept nogil
cdef void regions_destroy(region_list* regions) noexcept nogil
cdef region_t* regions_at(const region_list* regions, uintptr_t addr) noexcept nogil
cdef region_t* regions_next(const region_list* regions, const region_t* region) noexcept nogil
cdef uintptr_t regions_end_of(const region_list* regions, const region_t* region) noexcept nogil
cdef size_t regions_pages_around(const region_list* regions, const region_t* region, size_t wanted) noexcept nogil
cdef int regions_maps_to_watch(const region_list* regions, const region_t* region) noexcept nogil
cdef region_t* regions_insert(
    region_list* regions, uint64_t region_id, uintptr_t addr, size_t n_pages, int flags
) noexcept nogil
cdef void regions_drop(region_list* regions, region_t* region) noexcept nogil
