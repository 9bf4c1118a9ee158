"""The registered page ranges of an engine: one sorted array.

The caller holds the engine's lock; a region's address holds until the next insertion or removal.
"""

from libc.stdint cimport uint64_t, uintptr_t
from libc.stdlib cimport free, realloc
from libc.string cimport memmove, memset


cdef void regions_init(region_list* regions, size_t page_bytes) noexcept nogil:
    memset(regions, 0, sizeof(region_list))
    regions.page_bytes = page_bytes


cdef void regions_destroy(region_list* regions) noexcept nogil:
    free(regions.all)
    regions_init(regions, regions.page_bytes)


cdef uintptr_t regions_end_of(const region_list* regions, const region_t* region) noexcept nogil:
    return region.addr + region.n_pages * regions.page_bytes


cdef region_t* regions_at(const region_list* regions, uintptr_t addr) noexcept nogil:
    """The region that holds `addr`, or the first one after it, or NULL."""
    cdef size_t low = 0, high = regions.n, middle
    while low < high:
        middle = (low + high) // 2
        if regions_end_of(regions, &regions.all[middle]) <= addr:
            low = middle + 1
        else:
            high = middle
    return &regions.all[low] if low < regions.n else NULL


cdef region_t* regions_next(const region_list* regions, const region_t* region) noexcept nogil:
    """The region after this one, or NULL."""
    cdef size_t index = region - regions.all + 1
    return &regions.all[index] if index < regions.n else NULL


cdef region_t* _beside(const region_list* regions, const region_t* region, bint above) noexcept nogil:
    """The region that begins where this one ends, or ends where it begins; NULL where other memory lies between."""
    cdef size_t index = region - regions.all
    cdef region_t* other
    if index + 1 == regions.n if above else index == 0:
        return NULL
    other = &regions.all[index + 1 if above else index - 1]
    if above:
        return other if other.addr == regions_end_of(regions, region) else NULL
    return other if regions_end_of(regions, other) == region.addr else NULL


cdef size_t regions_pages_around(const region_list* regions, const region_t* region, size_t wanted) noexcept nogil:
    """Pages of this region and of those that it touches, and they touch, on either side; of `wanted` or more the rest
    may be left uncounted."""
    cdef size_t n_pages = region.n_pages
    cdef const region_t* other
    cdef int side
    for side in range(2):
        other = _beside(regions, region, side)
        while other != NULL and n_pages < wanted:
            n_pages += other.n_pages
            other = _beside(regions, other, side)
    return n_pages


cdef int regions_maps_to_watch(const region_list* regions, const region_t* region) noexcept nogil:
    """How many more mappings there are while this region is watched than while it is not. Watched neighbours are one
    mapping: each end of what is watched together costs one."""
    cdef const region_t* other
    cdef int side, n_maps = 0
    for side in range(2):
        other = _beside(regions, region, side)
        n_maps += -1 if other != NULL and other.flags & REGION_WATCHED else 1
    return n_maps


cdef region_t* regions_insert(
    region_list* regions, uint64_t region_id, uintptr_t addr, size_t n_pages, int flags
) noexcept nogil:
    """A new region, which overlaps no other; NULL without memory for it."""
    cdef region_t* grown
    cdef const region_t* after = regions_at(regions, addr)
    cdef size_t index = after - regions.all if after != NULL else regions.n
    if regions.n == regions.capacity:
        grown = <region_t*>realloc(regions.all, (2 * regions.capacity + 8) * sizeof(region_t))
        if grown == NULL:
            return NULL
        regions.all = grown
        regions.capacity = 2 * regions.capacity + 8
    memmove(&regions.all[index + 1], &regions.all[index], (regions.n - index) * sizeof(region_t))
    memset(&regions.all[index], 0, sizeof(region_t))
    regions.all[index].addr = addr
    regions.all[index].n_pages = n_pages
    regions.all[index].id = region_id
    regions.all[index].flags = flags
    regions.n += 1
    regions.n_unseen += flags & REGION_UNSEEN != 0
    return &regions.all[index]


cdef void regions_drop(region_list* regions, region_t* region) noexcept nogil:
    cdef size_t index = region - regions.all
    regions.n -= 1
    regions.n_unseen -= region.flags & REGION_UNSEEN != 0
    memmove(region, region + 1, (regions.n - index) * sizeof(region_t))
