"""The merge protocol: what happens to a run of pages inside a guard window, and how it is undone.

Every operation has the same steps: protect, compare again, remap, release. Whatever fails, each page
of the run afterwards holds the bytes that its program last wrote, and is writable:

  protect   guard_open: from here no write gets in. On failure nothing was changed.
  compare   against bytes that cannot change (the store's copy, or zero). A page that differs is left
            out, and gets its permission back when the window closes.
  remap     one call for each stretch of equal pages. It replaces the mapping at once for everybody.
            On failure the old mapping stands, and the stretch is left out like a changed page. No page is
            given up in place (madvise): what would show then is up to the mapping that lies there at that
            moment, and the program may have moved another one there.
  release   the private memory goes back to the system with its mapping.

The functions for runs return 0, or -1 when the guard could not give something back (the one failure
that must be reported at once); everything else is told by page in `outcomes`. None needs the GIL, and none
allocates inside a window. The store is read only; whoever hands it in holds its engine's lock.
"""

from libc.errno cimport EAGAIN, EFAULT, ENOMEM
from libc.stdint cimport uint8_t, uint32_t, uintptr_t
from libc.string cimport memcpy, memset

from ksmcore._guard.guard cimport guard_calls, guard_close, guard_open, guard_takes_away
from ksmcore._guard.window cimport (
    BARRED, CHANGED, DONE, IN_CALL, REFUSED, USUAL_PAGES, WINDOW_BARRED, WINDOW_IN_CALL, WINDOW_PAGES, WINDOW_STUCK,
    window_t,
)
from ksmcore._kernel.maps cimport maps_give_key, maps_give_policy, maps_lock_pages
from ksmcore._kernel.reader cimport ksm_reader, reader_here
from ksmcore._kernel.syscalls cimport (
    ADVISE_DONTDUMP, ADVISE_DONTFORK, ADVISE_DONTNEED, ADVISE_HUGEPAGE, ADVISE_MERGEABLE, ADVISE_NOHUGEPAGE,
    ADVISE_POPULATE_WRITE, ADVISE_RANDOM, ADVISE_SEQUENTIAL, CALL_MREMAP, CALL_SIGNAL_MASKS, advice, sys_advise,
    sys_error, sys_error_clear, sys_is_mapped, sys_map_anon, sys_map_anon_at, sys_map_store_at, sys_move,
    sys_page_bytes, sys_pause, sys_unmap,
)
from ksmcore._kernel.tracker cimport tracker_let_go, tracker_take_back
from ksmcore._pages cimport page_compare, page_is_zero
from ksmcore._records.regions cimport (
    REGION_BOUND, REGION_DONTDUMP, REGION_DONTFORK, REGION_HUGEPAGE, REGION_KEY, REGION_KEY_SHIFT, REGION_LOCKED,
    REGION_MERGEABLE, REGION_NOHUGEPAGE, REGION_RANDOM, REGION_SEQUENTIAL, REGION_WATCHED,
)
from ksmcore._records.store cimport store_fd, store_file_of, store_is_there, store_offset, store_page, store_t

cdef extern from "_kernel/reader.h" nogil:
    int ksm_read_copy(ksm_reader* reader, void* target, const void* source, size_t len_bytes)

# What to do with a stretch of pages that passed the comparison.
ctypedef enum remap_kind:
    MAP_STORE
    MAP_ZERO                 # new anonymous memory
    LEAVE_ZERO               # of a page that the guard has moved away: it stays away, and zeros show


cdef int _tracker_fd(const run_t* run) noexcept nogil:
    return run.tracker.file.fd if run.flags & REGION_WATCHED and run.tracker != NULL else -1


cdef void _advise(uintptr_t addr, size_t len_bytes, advice given) noexcept nogil:
    """For the mappings of a window a call for all of them ends at the first for which there is no memory: then each
    page is asked for."""
    cdef sys_error failed
    cdef size_t i, page_bytes = sys_page_bytes()
    sys_error_clear(&failed)
    if sys_advise(addr, len_bytes, given, &failed) == 0 or (failed.code != ENOMEM and failed.code != EAGAIN):
        return
    for i in range(len_bytes // page_bytes if len_bytes <= <size_t>WINDOW_PAGES * page_bytes else 0):
        sys_advise(addr + i * page_bytes, page_bytes, given, &failed)


cdef void _advise_again(uintptr_t addr, size_t len_bytes, int flags) noexcept nogil:
    """Give new mappings, neighbours, the flags of their region. Advice that is refused costs no correctness."""
    if flags & REGION_DONTFORK:
        _advise(addr, len_bytes, ADVISE_DONTFORK)
    if flags & REGION_DONTDUMP:
        _advise(addr, len_bytes, ADVISE_DONTDUMP)
    if flags & REGION_HUGEPAGE:
        _advise(addr, len_bytes, ADVISE_HUGEPAGE)
    if flags & REGION_NOHUGEPAGE:
        _advise(addr, len_bytes, ADVISE_NOHUGEPAGE)
    if flags & REGION_SEQUENTIAL:
        _advise(addr, len_bytes, ADVISE_SEQUENTIAL)
    if flags & REGION_RANDOM:
        _advise(addr, len_bytes, ADVISE_RANDOM)
    if flags & REGION_MERGEABLE:
        _advise(addr, len_bytes, ADVISE_MERGEABLE)


# How often a mapping that the kernel took away in a failing call is asked for again, a millisecond apart.
cdef enum:
    HEAL_TRIES = 1000
    WINDOW_MAPS = 16           # mappings that one window makes at most, some microseconds each


cdef int _map_over(
    store_t* store, remap_kind kind, uintptr_t addr, uint32_t slot, size_t len_bytes, sys_error* err
) noexcept nogil:
    """One new mapping, which is to be given its flags by _advise_again."""
    cdef sys_error ignored
    cdef int tries = 0, rc
    sys_error_clear(&ignored)
    while True:
        if kind == MAP_ZERO:
            rc = sys_map_anon_at(addr, len_bytes, &ignored)
        else:
            rc = sys_map_store_at(
                addr, len_bytes, store_fd(store, slot), store_offset(store, slot), &ignored
            )
        # Kernels before 6.12 unmap the range before the last thing that can fail. The window is still
        # open and the bytes are known to be those of the new mapping, so it is simply asked for again.
        if rc == 0 or tries == HEAL_TRIES or sys_is_mapped(addr, len_bytes):
            break
        tries += 1
        sys_pause()
    if rc != 0 and err.code == 0:
        err[0] = ignored
    return rc


cdef int _window(
    store_t* store, remap_kind kind, window_t* w, const uint32_t* slots, int flags, sys_error* err
) noexcept nogil:
    """One window: protect, compare, remap each equal stretch, close."""
    cdef uint32_t i, start, n_remapped = 0, n_bare = 0
    cdef const uint8_t* page
    cdef bint equal
    cdef int rc
    if kind == MAP_ZERO and guard_takes_away(w):
        kind = LEAVE_ZERO
    rc = guard_open(w, err)
    if rc != 0:
        memset(
            w.outcomes, BARRED if rc == WINDOW_BARRED else IN_CALL if rc == WINDOW_IN_CALL else REFUSED, w.n_pages
        )
        return -1 if rc == WINDOW_STUCK else 0
    for i in range(w.n_pages):
        if w.outcomes[i] != DONE:
            continue
        page = w.bytes + i * w.page_bytes
        if kind != MAP_STORE:
            equal = page_is_zero(page, w.page_bytes)
        else:
            equal = page_compare(page, store_page(store, slots[i]), w.page_bytes) == 0
        if not equal:
            w.outcomes[i] = CHANGED
    i = 0
    while i < w.n_pages:
        if w.outcomes[i] != DONE:
            i += 1
            continue
        start = i
        i += 1
        while i < w.n_pages and w.outcomes[i] == DONE and (kind != MAP_STORE or slots[i] == slots[i - 1] + 1):
            i += 1
        rc = 0 if kind == LEAVE_ZERO else _map_over(
            store, kind, w.addr + start * w.page_bytes, slots[start] if kind == MAP_STORE else 0,
            (i - start) * w.page_bytes, err
        )
        if rc == 0:
            n_remapped += i - start
            n_bare += i - start
        else:
            memset(w.outcomes + start, REFUSED, i - start)
        # Advised together, as far as they are neighbours: one call for many copies of a page.
        if n_bare != 0 and kind != LEAVE_ZERO and (rc != 0 or i == w.n_pages or w.outcomes[i] != DONE):
            _advise_again(w.addr + ((i if rc == 0 else start) - n_bare) * w.page_bytes, n_bare * w.page_bytes, flags)
            n_bare = 0
    # A page that is left away keeps its mapping, and with it what the guard has done to it.
    return guard_close(w, n_remapped == w.n_pages and kind != LEAVE_ZERO, err)


cdef void _take_back(int tracker_fd, remap_kind kind, const window_t* w) noexcept nogil:
    """Have the tracker watch again what is anonymous memory after the window."""
    cdef uint32_t i, start = 0
    cdef bint is_anon
    for i in range(w.n_pages):
        is_anon = kind != MAP_STORE if w.outcomes[i] == DONE else not w.over_store
        if not is_anon:
            if start < i:
                tracker_take_back(tracker_fd, w.addr + start * w.page_bytes, (i - start) * w.page_bytes)
            start = i + 1
    if start < w.n_pages:
        tracker_take_back(tracker_fd, w.addr + start * w.page_bytes, (w.n_pages - start) * w.page_bytes)


cdef uint32_t _window_pages(
    const run_t* run, const uint32_t* slots, uintptr_t addr, size_t n_pages
) noexcept nogil:
    """Pages of the next window, of n_pages to come from addr on: a huge page as a whole where one begins.
    slots: NULL where no mapping of the store is made."""
    cdef size_t left = WINDOW_PAGES - addr // run.page_bytes % WINDOW_PAGES
    cdef uint32_t n = <uint32_t>min(n_pages, <size_t>USUAL_PAGES), i, n_maps = 0
    if run.is_huge:
        if left == <size_t>WINDOW_PAGES and n_pages >= <size_t>WINDOW_PAGES:
            n = WINDOW_PAGES
        else:
            n = min(n, <uint32_t>left)
    if slots == NULL:
        return n
    for i in range(n):
        n_maps += i == 0 or slots[i] != slots[i - 1] + 1
        if n_maps > <uint32_t>WINDOW_MAPS:
            return min(i, <uint32_t>USUAL_PAGES)
    return n


cdef uint32_t _leave_out_calls(window_t* w) noexcept nogil:
    """Cut a window before the first page that a call in flight may write into; if that is its own first, return how
    many such pages there are."""
    cdef uintptr_t lo = w.addr, hi = w.addr + w.n_pages * w.page_bytes
    if not guard_calls(w, &lo, &hi):
        return 0
    if (lo - w.addr) // w.page_bytes != 0:
        w.n_pages = <uint32_t>((lo - w.addr) // w.page_bytes)
        return 0
    return <uint32_t>((hi - w.addr + w.page_bytes - 1) // w.page_bytes)


cdef int _windows(
    store_t* store, remap_kind kind, const run_t* run, const uint32_t* slots, uint8_t* outcomes, sys_error* err
) noexcept nogil:
    """Pages of any number, window by window; adjacent mappings of the store fuse in the kernel."""
    cdef window_t w
    cdef uint32_t done = 0, n_in_call
    cdef int rc = 0, tracker_fd = _tracker_fd(run)
    w.guard = run.guard
    w.over_store = run.over_store
    w.page_bytes = run.page_bytes
    w.is_way_back = w.is_due = False
    while done < run.n_pages and rc == 0:
        w.addr = run.addr + done * run.page_bytes
        w.n_pages = _window_pages(
            run, slots + done if kind == MAP_STORE else NULL, w.addr, run.n_pages - done
        )
        w.outcomes = outcomes + done
        n_in_call = _leave_out_calls(&w)
        if n_in_call != 0:
            memset(w.outcomes, IN_CALL, n_in_call)
            done += n_in_call
            continue
        w.is_huge = w.n_pages == <uint32_t>WINDOW_PAGES
        if not run.over_store and tracker_let_go(tracker_fd, w.addr, w.n_pages * w.page_bytes, err) != 0:
            memset(w.outcomes, REFUSED, w.n_pages)
        else:
            rc = _window(store, kind, &w, slots + done if slots != NULL else NULL, run.flags, err)
        if tracker_fd >= 0:
            _take_back(tracker_fd, kind, &w)
        done += w.n_pages
    if done < run.n_pages:
        memset(outcomes + done, REFUSED, run.n_pages - done)
    return rc


cdef int merge_run(
    store_t* store, const run_t* run, const uint32_t* slots, uint8_t* outcomes, sys_error* err
) noexcept nogil:
    """Map its slot over each page, where equal."""
    cdef size_t i
    for i in range(run.n_pages):
        if i > 0 and store_file_of(store, slots[i]) == store_file_of(store, slots[i - 1]):
            continue
        if not store_is_there(store, slots[i]):
            memset(outcomes, REFUSED, run.n_pages)
            return 0
    return _windows(store, MAP_STORE, run, slots, outcomes, err)


cdef int merge_zero_run(const run_t* run, uint8_t* outcomes, sys_error* err) noexcept nogil:
    """Give back pages that hold only zeros."""
    return _windows(NULL, MAP_ZERO, run, NULL, outcomes, err)


cdef int merge_move(uintptr_t fresh, uintptr_t target, size_t len_bytes, sys_error* err) noexcept nogil:
    """sys_move, tried again where the kernel unmapped the target before it failed (see _map_over)."""
    cdef sys_error failed
    cdef int tries = 0
    sys_error_clear(&failed)
    while sys_move(fresh, target, len_bytes, &failed) != 0:
        if tries == HEAL_TRIES or sys_is_mapped(target, len_bytes):
            if err.code == 0:
                err[0] = failed
            return -1
        tries += 1
        sys_pause()
    return 0


cdef int merge_restore_range(const run_t* run, bint due, size_t* n_restored, sys_error* err) noexcept nogil:
    """Make pages over the store plain private anonymous memory again, with the bytes they show.

    The bytes go to fresh memory, window by window, and that is moved over the pages in one step each,
    so other threads see the same bytes throughout and lose no write. The fresh memory is one mapping
    for the whole range, because only pieces of one mapping fuse again at their new place.

    due: also where a call in flight, that does not end, may write into them; else that is where it stops, with err.code
    0.

    0 with *n_restored == run.n_pages, or -1 with *err: the first *n_restored pages are plain memory, the
    others are as they were. All bytes are right in both cases.
    """
    cdef sys_error ignored
    cdef window_t w
    cdef uint8_t outcomes[<int>USUAL_PAGES]
    cdef size_t window_bytes
    cdef uintptr_t fresh
    cdef ksm_reader* reader
    cdef bint has_moved
    cdef int rc = 0
    n_restored[0] = 0
    sys_error_clear(&ignored)
    fresh = <uintptr_t>sys_map_anon(run.n_pages * run.page_bytes, err)
    if fresh == 0:
        return -1
    _advise_again(fresh, run.n_pages * run.page_bytes, run.flags)
    w.guard = run.guard
    w.over_store = True
    w.page_bytes = run.page_bytes
    w.is_huge = False
    w.is_way_back = True
    w.is_due = due
    w.outcomes = outcomes
    while n_restored[0] < run.n_pages:
        w.n_pages = <uint32_t>min(run.n_pages - n_restored[0], <size_t>USUAL_PAGES)
        window_bytes = w.n_pages * run.page_bytes
        w.addr = run.addr + n_restored[0] * run.page_bytes
        if run.flags & REGION_BOUND:
            maps_give_policy(w.addr, fresh, window_bytes)
        if run.flags & REGION_LOCKED:
            maps_lock_pages(fresh, window_bytes)
        # Faulted in here, so that the copy inside the window neither allocates nor fails. Kernels
        # before 5.14 do not know the advice, and filters may refuse it; then the copy faults, and the window is longer.
        sys_error_clear(&ignored)
        if sys_advise(fresh, window_bytes, ADVISE_POPULATE_WRITE, &ignored) != 0 and (
            ignored.code == ENOMEM or ignored.code == EFAULT
        ):
            err[0] = ignored
            rc = -1
            break
        rc = guard_open(&w, err)
        if rc != 0:
            if rc == WINDOW_BARRED:
                err.code = EAGAIN
                err.call = <int>CALL_SIGNAL_MASKS
                err.addr = w.addr
                err.len_bytes = window_bytes
            rc = -1
            break
        reader = reader_here()
        if reader == NULL:
            memcpy(<void*>fresh, w.bytes, window_bytes)
        elif ksm_read_copy(reader, <void*>fresh, w.bytes, window_bytes):
            err.code = EFAULT
            err.call = <int>CALL_MREMAP
            err.addr = w.addr
            err.len_bytes = window_bytes
            rc = -1
        if rc == 0 and run.flags & REGION_KEY:
            # Only now: with the key it may be that this thread must not write there.
            maps_give_key(fresh, window_bytes, (run.flags & REGION_KEY) >> <int>REGION_KEY_SHIFT)
        if rc == 0:
            rc = merge_move(fresh, w.addr, window_bytes, err)
        has_moved = rc == 0
        if guard_close(&w, has_moved, err) != 0:
            rc = -1
        if has_moved:
            # Also where the window could not be opened again: what was moved away is no longer ours to unmap.
            tracker_take_back(_tracker_fd(run), w.addr, window_bytes)
            n_restored[0] += w.n_pages
            fresh += window_bytes
        if rc != 0:
            break
    if n_restored[0] < run.n_pages:
        # Unchecked: our own mapping, whole from here to its end.
        sys_unmap(fresh, (run.n_pages - n_restored[0]) * run.page_bytes, &ignored)
    return rc


cdef int merge_share_range(store_t* store, const run_t* run, uint32_t slot, sys_error* err) noexcept nogil:
    """Map slots that follow each other, from `slot` on, over pages that nobody uses yet. So there is no window.

    -1 with *err: the pages are as they were.
    """
    cdef size_t len_bytes = run.n_pages * run.page_bytes
    if _map_over(store, MAP_STORE, run.addr, slot, len_bytes, err) != 0:
        return -1
    _advise_again(run.addr, len_bytes, run.flags)
    return 0


cdef int merge_empty_range(const run_t* run, sys_error* err) noexcept nogil:
    """Take the memory of pages that nobody uses: zeros show there afterwards. No window, since nobody looks.

    -1 with *err: the pages are as they were.
    """
    cdef size_t len_bytes = run.n_pages * run.page_bytes
    if not run.over_store:
        return sys_advise(run.addr, len_bytes, ADVISE_DONTNEED, err)
    # To drop the pages of a mapping of the store would let the store show again.
    if _map_over(NULL, MAP_ZERO, run.addr, 0, len_bytes, err) != 0:
        return -1
    _advise_again(run.addr, len_bytes, run.flags)
    tracker_take_back(_tracker_fd(run), run.addr, len_bytes)
    return 0
