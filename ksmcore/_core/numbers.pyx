"""The numbers of an engine: the last stage of the path, where all that was counted is read.

Called by: _core, which holds the engine's lock for `numbers_read` and not for `numbers_as_dict`. Calls:
_engine (sizes), _guard.
"""

from libc.stdint cimport int64_t, uint64_t

from ksmcore._guard.guard cimport guard_n_waits
from ksmcore._records.rmap cimport N_STATES, PAGE_SHARED, PAGE_UNSHARED, PAGE_VOLATILE, PAGE_ZERO
from ksmcore._pass.batch cimport (
    SKIP_ALTERED, SKIP_AWAY, SKIP_CHANGED, SKIP_HELD, SKIP_MAP_BUDGET, SKIP_MAX_SHARED, SKIP_MAX_SHARING,
    SKIP_PARTNER, SKIP_PINNED, SKIP_REFUSED, SKIP_SMART, SKIP_STORE, STAGE_CHECKSUM, STAGE_GUARD, STAGE_PAGEMAP,
    STAGE_STORE, STAGE_TREES,
)
from ksmcore._pass.state cimport core_bytes, engine_core


cdef void numbers_read(engine_core* c, core_numbers* numbers) noexcept nogil:
    """Copy the numbers; makes no Python object."""
    cdef int state
    numbers.counters = c.counters
    numbers.budget = c.b.budget
    for state in range(<int>N_STATES):
        numbers.n_by_state[state] = c.rmap.n_by_state[state]
    numbers.n_shared = c.store.n_shared
    numbers.n_used = c.store.n_used
    numbers.n_frozen = c.store.n_frozen
    numbers.n_compares = c.stable.one.n_compares + c.unstable.one.n_compares + c.quiet.one.n_compares
    numbers.n_regions = c.regions.n
    numbers.metadata_bytes = core_bytes(c)
    numbers.n_quiet = c.quiet.n_nodes
    numbers.with_pagemap = c.pm.file.fd >= 0
    numbers.with_tracker = c.may_watch


cdef dict numbers_as_dict(const core_numbers* numbers):
    """The numbers by the names that `ksmcore.Stats` gives them."""
    cdef const uint64_t* skips = &numbers.counters.skips[0]
    return {
        "full_scans": numbers.counters.full_scans,
        "pages_scanned": numbers.counters.pages_scanned,
        "pages_hashed": numbers.counters.pages_hashed,
        "pages_merged": numbers.counters.pages_merged,
        "pages_reshared": numbers.counters.pages_reshared,
        "pages_zeroed": numbers.counters.pages_zeroed,
        "cow_breaks": numbers.counters.cow_breaks,
        "pages_shared": numbers.n_shared,
        "pages_sharing": numbers.n_by_state[<int>PAGE_SHARED] - numbers.n_shared,
        "pages_unshared": numbers.n_by_state[<int>PAGE_UNSHARED],
        "pages_quiet": numbers.n_quiet,
        "pages_volatile": numbers.n_by_state[<int>PAGE_VOLATILE],
        "ksm_zero_pages": numbers.n_by_state[<int>PAGE_ZERO],
        "store_pages": numbers.n_used,
        "store_pages_frozen": numbers.n_frozen,
        "metadata_bytes": numbers.metadata_bytes,
        "page_compares": numbers.n_compares,
        "regions": numbers.n_regions,
        "maps_used": max(numbers.budget.used, <int64_t>0),
        "maps_allowed": max(numbers.budget.allowed, <int64_t>0),
        "with_pagemap": bool(numbers.with_pagemap),
        "with_tracker": bool(numbers.with_tracker),
        "guard_waits": guard_n_waits(),
        "skipped": {
            "changed": skips[<int>SKIP_CHANGED],
            "refused": skips[<int>SKIP_REFUSED],
            "map_budget": skips[<int>SKIP_MAP_BUDGET],
            "store": skips[<int>SKIP_STORE],
            "max_shared_pages": skips[<int>SKIP_MAX_SHARED],
            "partner": skips[<int>SKIP_PARTNER],
            "away": skips[<int>SKIP_AWAY],
            "pinned": skips[<int>SKIP_PINNED],
            "altered": skips[<int>SKIP_ALTERED],
            "held": skips[<int>SKIP_HELD],
            "smart_scan": skips[<int>SKIP_SMART],
            "max_page_sharing": skips[<int>SKIP_MAX_SHARING],
        },
        "seconds": {
            "pagemap": numbers.counters.stage_ns[<int>STAGE_PAGEMAP] / 1e9,
            "checksum": numbers.counters.stage_ns[<int>STAGE_CHECKSUM] / 1e9,
            "trees": numbers.counters.stage_ns[<int>STAGE_TREES] / 1e9,
            "store": numbers.counters.stage_ns[<int>STAGE_STORE] / 1e9,
            "guard": numbers.counters.stage_ns[<int>STAGE_GUARD] / 1e9,
        },
    }
