"""The numbers of an engine: the last stage of the path, where all that was counted is read.

The caller holds the engine's lock for `numbers_read`, and not for `numbers_as_dict`.
"""

from libc.stdint cimport int64_t, uint32_t

from ksmcore._guard.guard cimport guard_n_waits
from ksmcore._pass.state cimport engine_core, state_bytes
from ksmcore._records.rmap cimport PAGE_SHARED, PAGE_UNSHARED, PAGE_VOLATILE, PAGE_ZERO
from ksmcore._records.store cimport store_frozen


cdef void numbers_read(engine_core* c, core_numbers* numbers) noexcept nogil:
    """Copy the numbers; makes no Python object."""
    cdef const uint32_t* n_by_state = &c.rmap.n_by_state[0]
    numbers.counters = c.counters
    numbers.regions = c.regions.n
    numbers.pages_shared = c.store.n_shared
    numbers.pages_sharing = n_by_state[<int>PAGE_SHARED] - c.store.n_shared
    numbers.pages_unshared = n_by_state[<int>PAGE_UNSHARED]
    numbers.pages_quiet = c.quiet.n_nodes
    numbers.pages_volatile = n_by_state[<int>PAGE_VOLATILE]
    numbers.pages_left_out = c.rmap.n_left_out
    numbers.ksm_zero_pages = n_by_state[<int>PAGE_ZERO]
    numbers.store_pages = c.store.n_used - c.store.n_hollow
    numbers.store_pages_frozen = store_frozen(&c.store)
    numbers.guard_waits = guard_n_waits()
    numbers.page_compares = c.stable.one.n_compares + c.unstable.one.n_compares + c.quiet.one.n_compares
    numbers.metadata_bytes = state_bytes(c)
    numbers.maps_used = max(c.budget.used, <int64_t>0)
    numbers.maps_allowed = max(c.budget.allowed, <int64_t>0)
    numbers.with_pagemap = c.pm.file.fd >= 0
    numbers.with_tracker = c.may_watch


cdef dict numbers_as_dict(const core_numbers* numbers):
    """The numbers by the names of their fields; the time of each stage in seconds."""
    cdef dict found = numbers[0]
    found.update(found.pop("counters"))
    found["seconds"] = {stage: spent_ns / 1e9 for stage, spent_ns in found.pop("stage_ns").items()}
    return found
