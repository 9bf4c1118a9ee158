"""Quiet pages: unchanged, equal to no other, and protected so that the kernel tells when they are written.

A page that stood in the unstable tree at the end of a pass is protected when the next one meets it, before
it is read. If it still did not change it moves to the quiet tree, which stays from pass to pass. Surveys then
leave it out, at no cost for the page, until it is written.

Protected and in the quiet tree is the same. So whoever is protected and does not come to stand there, or
leaves it, has its protection lifted: no survey would ever show it again. A region is protected only while it
is watched; when it is not, its pages all show, whatever tree they stand in.
"""

from libc.errno cimport EINVAL
from libc.stdint cimport UINT32_MAX, uint32_t, uintptr_t
from libc.string cimport memset

from ksmcore._kernel.pagemap cimport SPAN_PAGES, pagemap_is_unwritten, pagemap_protect
from ksmcore._kernel.syscalls cimport CALL_TRACKER, CALL_UFFD_UNREGISTER, sys_error, sys_error_clear, sys_is_passing
from ksmcore._kernel.tracker cimport (
    tracker_close, tracker_disarm, tracker_is_there, tracker_open, tracker_unwatch, tracker_watch,
)
from ksmcore._pass.state cimport HAS_STOOD, IS_ARMED, IS_HUGE, engine_core, state_page_of
from ksmcore._records.budget cimport budget_affords, budget_spares
from ksmcore._records.regions cimport (
    REGION_WATCHED, region_t, regions_at, regions_end_of, regions_maps_to_watch, regions_pages_around,
)
from ksmcore._records.rmap cimport PAGE_UNSHARED

# To watch a region costs each pass some 3 us, two mappings among them; to read a page of a small one 1 us.
cdef size_t quiet_min_pages = 4

cdef enum:
    LARGE_PAGES = 256          # watched together they are worth two mappings, as a run that saves so much would be


cdef bint _has_stood(engine_core* c, uint32_t item) noexcept nogil:
    """Did this page stand in the unstable tree at the end of the last pass? (A quiet one that was written
    did not: it has to show again that it is worth a fault.)"""
    return item != 0 and c.rmap.tags[item].state == PAGE_UNSHARED and c.rmap.tags[item].epoch == c.last_epoch


cdef bint _may_be_armed(engine_core* c, size_t i) noexcept nogil:
    """Over the store there is nothing that could be watched."""
    return c.marks[i] & HAS_STOOD and not c.rmap.tags[c.items[i]].over_store


cdef void quiet_arm(engine_core* c, region_t* region, size_t n_look) noexcept nogil:
    """Protect the pages that are to stand in the quiet tree, before they are read: so a write is seen
    either by the checksum or by the next survey. c.marks[i] tells from here on which are.

    A huge page is protected as a whole or not at all: one of its pages would split it. A huge page
    is a span, so here that is the whole span or nothing.
    """
    cdef size_t i = 0, start
    cdef sys_error err
    for start in range(n_look):
        if _has_stood(c, c.items[start]):
            c.marks[start] |= HAS_STOOD
    if not c.may_watch:
        return
    while i < n_look:
        start = i
        while i < n_look and _may_be_armed(c, i) and c.pages[i] == c.pages[start] + (i - start) * c.page_bytes:
            i += 1
        if i == start:
            i += 1
            continue
        sys_error_clear(&err)
        if (
            (c.marks[start] & IS_HUGE and i - start < <size_t>SPAN_PAGES) or not _watch(c, region)
            or pagemap_protect(&c.pm, <uintptr_t>c.pages[start], i - start, &err) != 0
        ):
            if err.code != 0:
                quiet_unwatch(c, region)
        else:
            memset(c.marks + start, c.marks[start] | IS_ARMED, i - start)


cdef void _disarm(engine_core* c, size_t start, size_t end) noexcept nogil:
    """Lift the protection of the pages from `start` to `end` of those looked at, all neighbours."""
    cdef size_t i
    tracker_disarm(&c.tracker, <uintptr_t>c.pages[start], (end - start) * c.page_bytes)
    for i in range(start, end):
        c.marks[i] &= ~IS_ARMED


cdef void quiet_disarm_changed(engine_core* c, size_t n_look) noexcept nogil:
    """What changed since the last pass is not quiet. In a huge page then nothing is."""
    cdef size_t i
    for i in range(n_look):
        if c.marks[i] & IS_ARMED and c.rmap.nodes[c.items[i]].digest != c.digests[i]:
            if c.marks[i] & IS_HUGE:
                _disarm(c, 0, n_look)
                return
            _disarm(c, i, i + 1)


cdef void quiet_disarm_others(engine_core* c, size_t n_look) noexcept nogil:
    """Whoever was protected and does not stand in the quiet tree after all is to be looked at again."""
    cdef size_t i
    for i in range(n_look):
        if c.marks[i] & IS_ARMED and not c.rmap.tags[c.items[i]].quiet:
            _disarm(c, i, i + 1)


cdef void quiet_disarm_item(engine_core* c, uint32_t item) noexcept nogil:
    """A page of the quiet tree is about to leave it."""
    tracker_disarm(&c.tracker, <uintptr_t>state_page_of(c, item), c.page_bytes)


cdef bint quiet_is_still(engine_core* c, uint32_t item) noexcept nogil:
    """A page of the quiet tree: is it where it was, and has nobody written to it since?"""
    cdef uintptr_t addr = <uintptr_t>state_page_of(c, item)
    cdef const region_t* home = regions_at(&c.regions, addr)
    return home.flags & REGION_WATCHED and not home.altered and pagemap_is_unwritten(&c.pm, addr)


cdef bint _watch(engine_core* c, region_t* region) noexcept nogil:
    """Have the tracker watch a region, if that is worth it and allowed; once a pass it is tried."""
    cdef sys_error ignored
    cdef size_t n_pages
    cdef int n_maps
    cdef bint is_afforded
    if region.flags & REGION_WATCHED:
        return True
    if region.watch_tried == c.epoch or not c.may_watch:
        return False
    region.watch_tried = c.epoch
    n_maps = regions_maps_to_watch(&c.regions, region)
    n_pages = regions_pages_around(&c.regions, region, <size_t>LARGE_PAGES)
    if n_maps > 0 and n_pages < quiet_min_pages:
        return False
    if c.pm.file.fd < 0:
        return False             # a pass may have its descriptor again
    sys_error_clear(&ignored)
    if c.tracker.file.fd < 0 and tracker_open(&c.tracker, &c.pm, &ignored) != 0:
        c.may_watch = sys_is_passing(ignored.code)
        return False
    if n_pages >= <size_t>LARGE_PAGES:
        is_afforded = budget_affords(&c.budget, n_maps, UINT32_MAX)
    else:
        is_afforded = budget_spares(&c.budget, n_maps)
    if not is_afforded:
        return False
    if tracker_watch(&c.tracker, region.addr, regions_end_of(&c.regions, region), &ignored) != 0:
        return False
    c.budget.used += n_maps
    region.flags |= REGION_WATCHED
    return True


cdef void quiet_begin_pass(engine_core* c) noexcept nogil:
    """Once the program has closed the tracker's descriptor nothing is watched any more."""
    cdef size_t i
    if not tracker_is_there(&c.tracker):
        for i in range(c.regions.n):
            quiet_unwatch(c, &c.regions.all[i])


cdef void quiet_stop(engine_core* c) noexcept nogil:
    """No region is watched from here on."""
    c.may_watch = False
    tracker_close(&c.tracker)
    quiet_begin_pass(c)


cdef void quiet_after_flush(engine_core* c) noexcept nogil:
    """Where a page could not be merged because the tracker would not let go of it, there is to be no tracker: closed,
    it lets go of everything."""
    if (
        c.b.err.code != 0 and not sys_is_passing(c.b.err.code) and c.b.err.code != EINVAL
        and c.b.err.call in (<int>CALL_TRACKER, <int>CALL_UFFD_UNREGISTER)
    ):
        quiet_stop(c)


cdef void quiet_unwatch(engine_core* c, region_t* region) noexcept nogil:
    """The region is no longer watched, and none of its pages is protected."""
    if region.flags & REGION_WATCHED:
        if tracker_is_there(&c.tracker):
            tracker_unwatch(&c.tracker, region.addr, regions_end_of(&c.regions, region))
        region.flags &= ~REGION_WATCHED
        c.budget.used -= regions_maps_to_watch(&c.regions, region)
