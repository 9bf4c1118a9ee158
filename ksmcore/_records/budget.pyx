"""The map budget: how many of the process's memory mappings an engine may use, and for what.

Every isolated merged page costs the process two mappings, and without a few free ones a process cannot
start a thread, load a library or allocate an array. So the engine takes half of what is free, counted
anew at each pass because the program maps memory too, and puts down what each run costs in between.
"""

from libc.stdint cimport int64_t, uint32_t

cdef enum:
    MAPS_BACK = 16             # the way back needs some six, and the store some of its own
    LONG_HALVES = 128          # of a page for each mapping: a run that saves so much is worth what is kept for it, ...
    KEPT_SHARE = 64            # ... one part in so many of the budget, for ever
    SPENT_SHIFT = 6            # from here on next to nothing is held back for later
    MAPS_OF_PAIR = 4           # two pages alone, of which one is saved
    SPARE_SHARE = 4            # one part in so many of the budget may be used before nothing is spared any more

cdef void budget_refresh(
    map_budget* budget, int64_t n_maps, int64_t n_ours, int64_t n_pages, int64_t asked, int64_t max_map_count
) noexcept nogil:
    """Set what the engine may use, of the process's `n_maps` mappings, `n_ours` of them for stores; n_pages
    are registered.

    n_maps: -1 when they could not be counted. asked: a number of mappings, or -1 for half of what would
    be free without the engine.
    """
    cdef int64_t free_maps
    if n_maps < 0:
        # Nothing is known of the room left: allow no more than what is used now.
        budget.allowed = budget.used
        return
    # What merges with the last mappings could never be unmerged.
    free_maps = max_map_count - (n_maps - n_ours) - MAPS_BACK
    budget.used = n_ours
    budget.allowed = max(free_maps // 2, <int64_t>0)
    if asked >= 0:
        # Never more than three quarters of what is free: without room for a few mappings a process
        # cannot start a thread, load a library or allocate an array.
        budget.allowed = min(asked, max(free_maps * 3 // 4, <int64_t>0))
    budget.pages_per_map = 2 * n_pages // max(budget.allowed, <int64_t>1)


cdef bint budget_affords(const map_budget* budget, int64_t cost, uint32_t n_halves) noexcept nogil:
    """Is what saves so many halves of a page worth so many mappings? A share of the budget is held back for what saves
    more for each. The share shrinks with every pass that left pages behind, so that nothing of it is wasted; but for
    some mappings that only long runs get, a large array's copy of tomorrow: what was merged page by page could not be
    taken back for that, since a page that is given its memory again is a mapping by itself as before."""
    cdef int64_t reserve = 0, kept = budget.allowed // KEPT_SHARE if n_halves < LONG_HALVES * cost else 0
    if cost <= 0:
        return True
    if n_halves < cost:
        reserve = budget.allowed * 5 // 6
    elif n_halves < 2 * cost:
        reserve = budget.allowed * 2 // 3
    elif n_halves < 4 * cost:
        reserve = budget.allowed // 4
    elif n_halves < 16 * cost:
        reserve = budget.allowed // 8
    return budget.used + cost <= budget.allowed - max(reserve >> budget.reserve_shift, kept)


cdef bint budget_spares(const map_budget* budget, int64_t cost) noexcept nogil:
    """May so many mappings be had by what saves time, and no memory?"""
    return cost <= 0 or budget.used + cost <= budget.allowed // SPARE_SHARE


cdef bint budget_is_used_up(const map_budget* budget) noexcept nogil:
    """Is it of no use to look again at what was left out, long runs aside?"""
    return budget.reserve_shift >= SPENT_SHIFT and not budget_affords(budget, MAPS_OF_PAIR, 2)
