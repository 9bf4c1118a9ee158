"""The memory of the arena's chunks, and its lock; see mapped.pyx."""

from libc.stdint cimport uint32_t, uint64_t, uintptr_t

from ksmcore._arrays.chunks cimport chunk_t, chunk_table
from ksmcore._core.registry cimport Registry

# Stands in the memory of a chunk that was given back while chunks are pinned.
ctypedef struct pinned_t:
    pinned_t* next
    size_t len_bytes

cdef chunk_table mapped_table
cdef uint32_t mapped_n_pins            # while not 0, no chunk is unmapped
cdef void* mapped_core                 # a Registry that is never given back

cdef void mapped_lock() noexcept nogil
cdef void mapped_unlock() noexcept nogil
cdef bint mapped_is_forking() noexcept nogil
cdef bint mapped_is_inside() noexcept nogil
cdef void mapped_register(chunk_t* chunk, bint fresh) noexcept nogil
cdef uint32_t mapped_add(size_t n_pages, bint wants_huge, bint whole) noexcept nogil
cdef void mapped_remove(uint32_t entry) noexcept nogil
cdef bint mapped_discard(const chunk_t* chunk, uintptr_t addr, size_t n_pages) noexcept nogil
cdef void mapped_trim(size_t target_bytes) noexcept nogil
cdef void mapped_trim_idle() noexcept nogil
cdef uint64_t mapped_tend() noexcept nogil
cdef void mapped_tell_unsettled(uint64_t age_ns) noexcept nogil
cdef void mapped_swap_limits(size_t* most_free_bytes, uint64_t* decay_ns) noexcept nogil
cdef void mapped_pin() noexcept nogil
cdef pinned_t* mapped_unpin() noexcept nogil
cdef int mapped_begin(Registry core) except -1
cdef int mapped_register_late() except -1
cdef bint mapped_is_chunk(uint64_t region_id) noexcept nogil
