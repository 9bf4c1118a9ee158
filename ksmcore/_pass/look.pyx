"""The look: what the program has advised and decided about memory since it was registered.

A new mapping has none of what madvise(2), mbind(2), mlock(2), pkey_mprotect(2) or another's userfaultfd have given to
the old one. So before anything is remapped the mappings are looked at as they are:

  - What a new mapping can be given as well (no fork, no dump, huge pages or none, sequential, random, mergeable) it is
    given, page by page as it was.
  - A region with anything else is barred: no pass looks at it until a look shows that it was taken back.

Only smaps tells, and reading it takes a walk over all page tables. So it is read when something is to be remapped, and
then once for all regions. Within a pass a look is good for LOOK_NS and LOOK_SHARE times what another would take; none
is older than the pass. That bounds what a look can miss: advice that another thread gives in the middle of a pass, in
the time that its look is good for, to pages that are remapped in just that time. A region that was registered after the
look was no part of it: of that, what was seen when it was registered counts; where nothing was (REGION_UNSEEN), a look
comes first.

And how many mappings there are, for the map budget: a pass in which nothing is to be merged does not ask.

The caller holds the engine's lock.
"""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t, uintptr_t
from libc.string cimport memset

from ksmcore._kernel.maps cimport (
    TRAITS_BARRED, TRAITS_KEEP, TRAITS_KEY, TRAITS_WATCHED, TRAITS_WATCHED_ELSE, maps_each, maps_has_policy,
    maps_traits_each, vma_t,
)
from ksmcore._kernel.syscalls cimport sys_error, sys_error_clear, sys_now_ns
from ksmcore._pass.batch cimport OPEN, batch_leave, intent
from ksmcore._pass.blocks cimport blocks_give_up_unwanted
from ksmcore._pass.state cimport engine_core
from ksmcore._records.budget cimport budget_refresh
from ksmcore._records.ranges cimport ranges_add, ranges_at
from ksmcore._records.regions cimport (
    BARRED_ALTERED, BARRED_WATCHED, NOT_BARRED, REGION_BOUND, REGION_UNSEEN, REGION_WATCHED, region_bar, region_t,
    regions_at, regions_end_of, regions_maps_to_watch, regions_next,
)

# ---- how many mappings ----------------------------------------------------------------------------

cdef void look_tally(maps_tally* tally, const vma_t* vma) noexcept nogil:
    """Count one more; they come by address. A mapping of a store costs itself, and what it cut off behind it; those of
    other engines count as ours."""
    tally.n_maps += 1
    if vma.is_store or tally.end_of_store == vma.start:
        tally.n_ours += 1
    tally.end_of_store = vma.end if vma.is_store else 0


cdef void look_take_room(engine_core* c, const maps_tally* tally) noexcept nogil:
    """What that leaves the engine. NULL: they could not be counted, and the budget allows no more than is used."""
    cdef int64_t n_ours, n_pages = 0
    cdef size_t i
    c.counted.at_ns = sys_now_ns() if tally != NULL else 0
    c.counted.in_pass = True
    if tally == NULL:
        budget_refresh(&c.budget, -1, -1, -1, c.counted.asked_maps, c.counted.max_map_count)
        return
    n_ours = tally.n_ours
    for i in range(c.regions.n):
        n_pages += c.regions.all[i].n_pages
        if c.regions.all[i].flags & REGION_WATCHED:
            # Ends of what is watched: of this region's two those at which no other goes on.
            n_ours += regions_maps_to_watch(&c.regions, &c.regions.all[i]) // 2 + 1
    c.counted.n_ours = n_ours
    c.n_maps = <size_t>tally.n_maps
    budget_refresh(&c.budget, tally.n_maps, n_ours, n_pages, c.counted.asked_maps, c.counted.max_map_count)


cdef int64_t look_n_maps(const engine_core* c) noexcept nogil:
    """Of the process at this moment, about: those that were counted, and those that merging has made since."""
    return max(<int64_t>c.n_maps + c.budget.used - c.counted.n_ours, <int64_t>1)


cdef void _count(const vma_t* vma, void* context) noexcept nogil:
    look_tally(<maps_tally*>context, vma)


cdef void look_at_room(engine_core* c) noexcept nogil:
    """Before mappings are made: count, unless that was done since the last pass began. Where it cannot be done nothing
    is merged: what was to be is left, and not for want of room."""
    cdef maps_tally tally
    cdef uint32_t i
    if not c.counted.in_pass:
        memset(&tally, 0, sizeof(tally))
        look_take_room(c, &tally if maps_each(_count, &tally, &c.b.err) == 0 else NULL)
    if c.counted.at_ns == 0:
        for i in range(c.b.n_intents):
            if c.b.intents[i].fate == OPEN:
                batch_leave(&c.b, &c.b.intents[i], &c.counters.skipped.refused)


# ---- what was advised -----------------------------------------------------------------------------

cdef enum:
    LOOK_SHARE = 40            # looks take one part in so many of the time, or less
    LOOK_NS = 100000000        # but one is good for so long in any case
    MAP_NS = 3000              # what a mapping more adds to it; measured: 3 to 5 us
    CHEAP_NS = 2000000         # whatever restores memory looks anew if that takes no longer, ...
    RESTORE_SHARE = 10         # ... and else, after another that did, one part in so many of the time at most


ctypedef struct looking:
    engine_core* c
    bint asks_policies
    bint is_full               # no memory for what was seen


cdef bint _has_policy(looking* all, uintptr_t addr) noexcept nogil:
    cdef int has_policy = maps_has_policy(addr) if all.asks_policies else 0
    # Where it is not told, by a filter or a kernel without NUMA, there is no setting one either.
    all.asks_policies &= has_policy >= 0
    return has_policy > 0


cdef region_bar _judge(const region_t* region, const vma_t* vma, int flags) noexcept nogil:
    cdef int watched = vma.traits & (TRAITS_WATCHED | TRAITS_WATCHED_ELSE)
    if vma.traits & TRAITS_BARRED or flags & (TRAITS_KEY | REGION_BOUND):
        return BARRED_ALTERED
    # Our own tracker watches anonymous memory, for nothing but writes; then nobody else can watch it.
    if watched and not (watched == TRAITS_WATCHED and vma.inode == 0 and region.flags & REGION_WATCHED):
        return BARRED_WATCHED
    return NOT_BARRED


cdef void _see(const vma_t* vma, void* context) noexcept nogil:
    cdef looking* all = <looking*>context
    cdef engine_core* c = all.c
    cdef region_t* region = regions_at(&c.regions, vma.start)
    cdef int flags = vma.traits & (TRAITS_KEEP | TRAITS_KEY)
    if region == NULL or region.addr >= vma.end:
        return
    if _has_policy(all, max(vma.start, region.addr)):
        flags |= REGION_BOUND
    if flags != 0 and not ranges_add(&c.advice.ranges, vma.start, vma.end, flags):
        all.is_full = True
    while region != NULL and region.addr < vma.end:
        if region.seen_bar == NOT_BARRED:
            region.seen_bar = _judge(region, vma, flags)
        region = regions_next(&c.regions, region)


cdef int _take(engine_core* c, sys_error* err) noexcept nogil:
    """-1 with *err when the kernel does not tell (err.code 0: no memory): then what is known stays barred, and no
    advice is known of."""
    cdef looking all
    cdef region_t* region
    cdef size_t i
    cdef uintptr_t end
    cdef uint64_t begun_ns = sys_now_ns()
    all.c = c
    all.asks_policies = True
    all.is_full = False
    c.advice.ranges.n = 0
    c.advice.seen_ns = 0
    c.advice.for_restoring = False
    if c.regions.n == 0:
        return 0
    for i in range(c.regions.n):
        c.regions.all[i].seen_bar = NOT_BARRED
        c.regions.all[i].looked = False
    end = regions_end_of(&c.regions, &c.regions.all[c.regions.n - 1])
    if maps_traits_each(end, _see, &all, err) != 0 or all.is_full:
        return -1
    c.advice.n_barred = c.regions.n_unseen = 0
    for i in range(c.regions.n):
        region = &c.regions.all[i]
        region.looked = True
        region.flags &= ~REGION_UNSEEN
        region.bar = region.seen_bar
        c.advice.n_barred += region.bar != NOT_BARRED
    c.advice.seen_ns = begun_ns
    c.advice.cost_ns = sys_now_ns() - begun_ns
    c.advice.n_maps = look_n_maps(c)
    return 0


cdef uint64_t _next_cost_ns(const engine_core* c) noexcept nogil:
    """Of another look: it takes longer with every mapping that was made since the last one."""
    return c.advice.cost_ns + MAP_NS * <uint64_t>max(look_n_maps(c) - c.advice.n_maps, <int64_t>0)


cdef void look_begin_pass(engine_core* c, bint patient) noexcept nogil:
    """What is barred is looked at again, to see whether it still has to be; by a `patient` pass, one of many, not every
    time."""
    cdef sys_error ignored
    sys_error_clear(&ignored)
    c.advice.pass_ns = sys_now_ns()
    if c.advice.n_barred != 0 and not (
        patient and c.advice.pass_ns - c.advice.seen_ns < LOOK_SHARE * c.advice.cost_ns
    ):
        _take(c, &ignored)


cdef bint _has_open(const engine_core* c) noexcept nogil:
    cdef uint32_t i
    for i in range(c.b.n_intents):
        if c.b.intents[i].fate == OPEN:
            return True
    return False


cdef bint _is_due(const engine_core* c) noexcept nogil:
    """Is a look wanted before the open intents are carried out? Sooner where one is in a region that no look has
    seen."""
    cdef uint64_t age_ns = sys_now_ns() - c.advice.seen_ns, good_ns = LOOK_SHARE * _next_cost_ns(c)
    cdef bint is_fresh = age_ns < good_ns
    cdef const region_t* region
    cdef uint32_t i
    if c.advice.seen_ns < c.advice.pass_ns or age_ns >= LOOK_NS + good_ns:
        return True
    if is_fresh and c.regions.n_unseen == 0:
        return False
    for i in range(c.b.n_intents):
        if c.b.intents[i].fate != OPEN:
            continue
        region = regions_at(&c.regions, <uintptr_t>(c.b.intents[i].page_no * c.page_bytes))
        if region.flags & REGION_UNSEEN or not (is_fresh or region.looked):
            return True
    return False


cdef void look_at_intents(engine_core* c) noexcept nogil:
    """Of the open intents, leave what must not be remapped, and give the rest the flags that its new mappings are to
    have."""
    cdef intent* wanted
    cdef const region_t* region
    cdef uintptr_t addr, end
    cdef uint32_t i
    cdef bint some_left = False, is_unknown = False
    if not _has_open(c):
        return
    if _is_due(c):
        is_unknown = _take(c, &c.b.err) != 0
    for i in range(c.b.n_intents):
        wanted = &c.b.intents[i]
        if wanted.fate != OPEN:
            continue
        addr = <uintptr_t>(wanted.page_no * c.page_bytes)
        region = regions_at(&c.regions, addr)
        if not is_unknown and region.bar == NOT_BARRED:
            wanted.flags = <uint8_t>look_flags(c, region, addr, &end)
            continue
        some_left = True
        if not is_unknown and region.bar == BARRED_ALTERED:
            batch_leave(&c.b, wanted, &c.counters.skipped.altered)
        else:
            batch_leave(&c.b, wanted, &c.counters.skipped.refused)
    if some_left:
        blocks_give_up_unwanted(&c.b, &c.counters.skipped.partner)


cdef void look_before_restoring(engine_core* c) noexcept nogil:
    """So that look_flags knows. Where it cannot be told, the flags are those of the registration. Of many regions that
    are restored one after the other not each is worth a look of its own, where one takes long."""
    cdef sys_error ignored
    sys_error_clear(&ignored)
    if (
        not c.advice.for_restoring or c.advice.cost_ns < <uint64_t>CHEAP_NS
        or sys_now_ns() - c.advice.seen_ns >= RESTORE_SHARE * c.advice.cost_ns
    ):
        c.advice.for_restoring = _take(c, &ignored) == 0


cdef int look_flags(const engine_core* c, const region_t* region, uintptr_t addr, uintptr_t* end) noexcept nogil:
    """What a new mapping of this page is to have, and of those behind it in the region before *end."""
    cdef int flags
    if region.looked and c.advice.seen_ns != 0:
        flags = ranges_at(&c.advice.ranges, addr, end)
    else:
        flags = region.flags & ~REGION_WATCHED
        end[0] = <uintptr_t>-1
    return flags | (region.flags & REGION_WATCHED)
