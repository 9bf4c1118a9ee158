"""The registered page ranges of an engine: one sorted array of pointers, small enough to be moved with each of a
hundred thousand insertions and removals, in whatever order.

The caller holds the engine's lock; a region stays where it is until it is dropped.
"""

from libc.stdint cimport uint64_t, uintptr_t
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memmove, memset


cdef void regions_init(region_list* regions, size_t page_bytes) noexcept nogil:
    memset(regions, 0, sizeof(region_list))
    regions.page_bytes = page_bytes


cdef void regions_destroy(region_list* regions) noexcept nogil:
    cdef size_t i
    for i in range(regions.n):
        free(regions.all[i])
    free(regions.all)
    regions_init(regions, regions.page_bytes)


cdef uintptr_t regions_end_of(const region_list* regions, const region_t* region) noexcept nogil:
    return region.addr + region.n_pages * regions.page_bytes


cdef size_t _index_at(const region_list* regions, uintptr_t addr) noexcept nogil:
    """Of the region that holds `addr`, or else of the first one after it; regions.n where there is none."""
    cdef size_t low = 0, high = regions.n, middle
    while low < high:
        middle = (low + high) // 2
        if regions_end_of(regions, regions.all[middle]) <= addr:
            low = middle + 1
        else:
            high = middle
    return low


cdef region_t* regions_at(const region_list* regions, uintptr_t addr) noexcept nogil:
    """The region that holds `addr`, or the first one after it, or NULL."""
    cdef size_t index = _index_at(regions, addr)
    return regions.all[index] if index < regions.n else NULL


cdef region_t* regions_next(const region_list* regions, const region_t* region) noexcept nogil:
    """The region after this one, or NULL."""
    return regions_at(regions, regions_end_of(regions, region))


cdef region_t* regions_insert(
    region_list* regions, uint64_t region_id, uintptr_t addr, size_t n_pages, int flags
) noexcept nogil:
    """A new region, which overlaps no other; NULL without memory for it."""
    cdef region_t** grown
    cdef region_t* new
    cdef size_t index = _index_at(regions, addr)
    if regions.n == regions.capacity:
        grown = <region_t**>realloc(regions.all, (2 * regions.capacity + 8) * sizeof(region_t*))
        if grown == NULL:
            return NULL
        regions.all = grown
        regions.capacity = 2 * regions.capacity + 8
    new = <region_t*>calloc(1, sizeof(region_t))
    if new == NULL:
        return NULL
    new.addr = addr
    new.n_pages = n_pages
    new.id = region_id
    new.flags = flags
    memmove(&regions.all[index + 1], &regions.all[index], (regions.n - index) * sizeof(region_t*))
    regions.all[index] = new
    regions.n += 1
    regions.n_pages += n_pages
    return new


cdef void regions_drop(region_list* regions, region_t* region) noexcept nogil:
    cdef size_t index = _index_at(regions, region.addr)
    regions.n -= 1
    regions.n_pages -= region.n_pages
    memmove(&regions.all[index], &regions.all[index + 1], (regions.n - index) * sizeof(region_t*))
    free(region)


cdef size_t regions_bytes(const region_list* regions) noexcept nogil:
    """Bytes of metadata in use."""
    return regions.capacity * sizeof(region_t*) + regions.n * sizeof(region_t)
