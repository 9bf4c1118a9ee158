"""The map budget; see budget.pyx."""

from libc.stdint cimport int64_t, uint32_t

ctypedef struct map_budget:
    int64_t allowed              # mappings that the engine may use in all
    int64_t used                 # counted at the last refresh, plus what runs have cost since
    int reserve_shift            # of the share that is held back for longer runs; grows by passes
    int64_t pages_per_map        # that each mapping has to serve for half of the budget to do for all registered pages


cdef void budget_refresh(
    map_budget* budget, int64_t n_maps, int64_t n_ours, int64_t n_pages, int64_t asked, int64_t max_map_count
) noexcept nogil
cdef bint budget_affords(const map_budget* budget, int64_t cost, uint32_t n_halves) noexcept nogil
cdef bint budget_spares(const map_budget* budget, int64_t cost) noexcept nogil
cdef bint budget_is_used_up(const map_budget* budget) noexcept nogil
