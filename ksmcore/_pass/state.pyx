"""What an engine owns: trees, table, store and working memory; made, begun anew for a pass, and given back.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memset

from ksmcore._guard.window cimport guard_kind
from ksmcore._kernel.maps cimport maps_enter, maps_leave
from ksmcore._kernel.pagemap cimport SPAN_PAGES, pagemap_close, pagemap_open, pagemap_reopen, pagemap_try_scanning
from ksmcore._kernel.syscalls cimport sys_error, sys_error_clear, sys_is_passing, sys_page_bytes
from ksmcore._kernel.tracker cimport tracker_close, tracker_open
from ksmcore._pass.batch cimport batch_destroy, batch_init, batch_stable_page
from ksmcore._records.budget cimport budget_is_used_up
from ksmcore._records.forest cimport (
    forest_bytes, forest_clear, forest_destroy, forest_erase, forest_expect, forest_holds, forest_init,
)
from ksmcore._records.ranges cimport ranges_destroy
from ksmcore._records.regions cimport region_t, regions_destroy, regions_init
from ksmcore._records.rmap cimport rmap_bytes, rmap_destroy, rmap_forget_epochs, rmap_init
from ksmcore._records.store cimport store_begin_pass, store_bytes, store_destroy, store_init

cdef enum:
    LAST_EPOCH = 255           # rmap_tag.epoch has 8 bits, and 0 is in no tree
    NO_EPOCH = 256
    ALL_MEET = 8               # passes, of which in one all pages are looked at


cdef const uint8_t* state_page_of(const engine_core* c, uint32_t item) noexcept nogil:
    return <const uint8_t*><uintptr_t>(<uint64_t>c.rmap.tags[item].page_no * c.page_bytes)


cdef const uint8_t* _page_of_node(void* owner, uint32_t item) noexcept nogil:
    """A page_of_t, of the unstable and the quiet tree."""
    return state_page_of(<engine_core*>owner, item)


cdef void _forget_slot(void* owner, uint32_t slot) noexcept nogil:
    """A store_forget. A full one stands in no tree."""
    cdef engine_core* c = <engine_core*>owner
    if forest_holds(&c.stable, slot):
        forest_erase(&c.stable, slot)


cdef void _forget_stretch(engine_core* c) noexcept nogil:
    memset(&c.stretch, 0, sizeof(stretch_t))


cdef int state_init(
    engine_core* c, guard_kind guard, uint32_t n_buckets, bint with_pagemap, bint with_tracker, sys_error* err
) noexcept nogil:
    """Empty trees, table and store; the settings of *c are set by the caller, before or after.

    The tree keys depend on `by_content` and `checksum`, which must not change afterwards.
    -1 with *err set, or with err.code 0 when malloc failed.
    """
    cdef uint8_t* zeros
    cdef const uint8_t* zero_page
    cdef sys_error ignored
    cdef int pagemap_errno
    c.page_bytes = sys_page_bytes()
    memset(&c.counters, 0, sizeof(c.counters))
    c.epoch = 1
    c.last_epoch = NO_EPOCH
    _forget_stretch(c)
    regions_init(&c.regions, c.page_bytes)
    c.pm.file.fd = -1
    c.tracker.file.fd = -1
    store_init(&c.store, c.page_bytes)
    # So that state_destroy finds nothing in what could not be made.
    memset(&c.rmap, 0, sizeof(c.rmap))
    memset(&c.stable, 0, sizeof(c.stable))
    memset(&c.unstable, 0, sizeof(c.unstable))
    memset(&c.quiet, 0, sizeof(c.quiet))
    memset(&c.b, 0, sizeof(c.b))
    memset(&c.budget, 0, sizeof(c.budget))
    memset(&c.advice, 0, sizeof(c.advice))
    memset(&c.counted, 0, sizeof(c.counted))
    memset(&c.unsettled, 0, sizeof(c.unsettled))
    c.n_maps = c.n_idle_left = 0
    c.guard = guard
    c.pool = NULL
    c.b.tracker = &c.tracker
    c.b.store = &c.store
    c.b.rmap = &c.rmap
    c.b.stable = &c.stable
    c.b.counters = &c.counters
    c.b.budget = &c.budget
    c.b.guard = &c.guard
    c.b.page_bytes = c.page_bytes
    c.b.max_page_sharing = &c.max_page_sharing
    maps_enter()
    c.marks = <uint8_t*>malloc(SPAN_PAGES)
    c.items = <uint32_t*>malloc(SPAN_PAGES * sizeof(uint32_t))
    c.pages = <const uint8_t**>malloc(SPAN_PAGES * sizeof(uint8_t*))
    c.digests = <uint32_t*>malloc(SPAN_PAGES * sizeof(uint32_t))
    zeros = <uint8_t*>calloc(1, c.page_bytes)
    if (
        c.marks == NULL or c.items == NULL or c.pages == NULL or c.digests == NULL or zeros == NULL
        or forest_init(
            &c.stable, &c.store.nodes, c.by_content, c.page_bytes, batch_stable_page, &c.b, err
        ) != 0
        or forest_init(
            &c.unstable, &c.rmap.nodes, c.by_content, c.page_bytes, _page_of_node, c, err
        ) != 0
        or forest_init(
            &c.quiet, &c.rmap.nodes, c.by_content, c.page_bytes, _page_of_node, c, err
        ) != 0
        or batch_init(&c.b, 2 * SPAN_PAGES) != 0 or rmap_init(&c.rmap, n_buckets, err) != 0
    ):
        free(zeros)
        state_destroy(c, False)
        return -1
    zero_page = zeros
    c.checksum(&zero_page, 1, c.page_bytes, &c.zero_digest)
    free(zeros)
    sys_error_clear(&ignored)
    pagemap_errno = pagemap_open(&c.pm, c.page_bytes, with_pagemap)
    pagemap_try_scanning(&c.pm)
    # In content order a quiet page that is written would break the order of the tree it stays in.
    c.may_watch = with_tracker and not c.by_content and (
        tracker_open(&c.tracker, &c.pm, &ignored) == 0 or sys_is_passing(ignored.code) or sys_is_passing(pagemap_errno)
    )
    tracker_close(&c.tracker)
    return 0


cdef void state_destroy(engine_core* c, bint in_child) noexcept nogil:
    """Give back all metadata. Memory that still maps the store stays right: the kernel keeps the file.

    `in_child`: this is a forked child's copy, and at the fork a thread that does not exist here may have
    been in the middle of changing it. So all of it is leaked on purpose; it costs memory only where the
    parent changes its own. The descriptors were closed when the child began.
    """
    if in_child:
        return
    maps_leave()
    batch_destroy(&c.b)
    rmap_destroy(&c.rmap)
    store_destroy(&c.store)
    forest_destroy(&c.stable)
    forest_destroy(&c.unstable)
    forest_destroy(&c.quiet)
    tracker_close(&c.tracker)
    pagemap_close(&c.pm)
    regions_destroy(&c.regions)
    ranges_destroy(&c.advice.ranges)
    ranges_destroy(&c.unsettled)
    free(c.marks)
    free(c.items)
    free(c.pages)
    free(c.digests)
    c.marks = NULL
    c.items = NULL
    c.pages = NULL
    c.digests = NULL


cdef void state_begin_pass(engine_core* c) noexcept nogil:
    """Throw the unstable tree away; the items in it are told by their epoch, not visited. A census was taken before, and
    of all mappings if slots are kept for children."""
    cdef size_t i, n_pages = 0
    for i in range(c.regions.n):
        n_pages += c.regions.all[i].n_pages
    pagemap_reopen(&c.pm)
    store_begin_pass(&c.store, &c.pm, _forget_slot, c)
    forest_clear(&c.unstable)
    forest_expect(&c.unstable, n_pages // 2)
    forest_expect(&c.stable, n_pages // 2)
    c.n_passes += 1
    c.last_epoch = c.epoch
    c.epoch += 1
    if c.epoch > LAST_EPOCH:
        rmap_forget_epochs(&c.rmap)
        c.epoch = 1
        c.last_epoch = NO_EPOCH
    # Of the whole pass or not at all: of two equal pages the one finds no partner while the other rests.
    c.left_out_rests = c.counters.full_scans % ALL_MEET != 0 and budget_is_used_up(&c.budget)
    _forget_stretch(c)


cdef size_t state_bytes(engine_core* c) noexcept nogil:
    """Bytes of metadata that grow with the pages tracked."""
    return (
        rmap_bytes(&c.rmap) + store_bytes(&c.store) + forest_bytes(&c.stable) + forest_bytes(&c.unstable)
        + forest_bytes(&c.quiet)
        + c.regions.capacity * sizeof(region_t)
    )
