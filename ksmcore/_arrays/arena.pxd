"""Memory for many large arrays, in few regions; see arena.pyx."""

from libc.stdint cimport uint32_t

from ksmcore._arrays.chunks cimport chunk_table
from ksmcore._core.registry cimport Registry


cdef void* arena_take(size_t len_bytes, bint zeroed) noexcept nogil
cdef bint arena_owns(const void* memory, size_t* len_bytes) noexcept nogil
cdef bint arena_give(void* memory) noexcept nogil
cdef bint arena_grow(void* memory, size_t len_bytes) noexcept nogil
cdef bint arena_move(void* memory, void* target) noexcept nogil
cdef bint arena_shrink(void* memory, size_t len_bytes) noexcept nogil
cdef void arena_show_blocks(bint wanted) noexcept nogil
cdef void arena_trim() noexcept nogil
cdef int arena_ask(int (*question)(const chunk_table* t, uint32_t generation) noexcept nogil) noexcept nogil
cdef int arena_begin(Registry core, bint wants_huge) except -1
