"""Threads that help with a walk; see pool.pyx."""

from libc.stdint cimport uint32_t, uint64_t, uintptr_t

from ksmcore._kernel.reader cimport ksm_reader

cdef enum:
    POOL_MOST = 63             # threads of a pool, besides the owner's

# `reader`: of the thread that does it.
ctypedef void (*pool_work)(void* context, uint32_t piece, ksm_reader* reader) noexcept nogil

# Work in pieces. It lives as long as the pool.
ctypedef struct pool_job:
    pool_work work
    void* context
    uint64_t ticket            # private: pieces in all, above those taken
    uint32_t n_done            # private

ctypedef struct pool_t:
    uint32_t n_wanted          # threads besides the owner's, POOL_MOST at most; begun when they are wanted first
    uint32_t n_threads         # that run
    uint32_t n_sleeping
    uint32_t version           # changes when there is something to do
    uint32_t progress          # changes with each piece that ends while the owner waits
    uint32_t is_waiting
    uint32_t is_over
    bint was_late              # the owner has waited for long: the others get no processor, and nothing more to do
    pool_job* job
    uint64_t spent_ns          # processor time of the others, once they have ended
    uintptr_t threads[<int>POOL_MOST]


cdef void pool_init(pool_t* pool, uint32_t n_threads) noexcept nogil
cdef void pool_end(pool_t* pool) noexcept nogil
cdef bint pool_has_threads(pool_t* pool) noexcept nogil
cdef void pool_hand_out(pool_t* pool, pool_job* job, uint32_t n_pieces) noexcept nogil
cdef void pool_finish(pool_t* pool, pool_job* job, uint32_t n_pieces) noexcept nogil
