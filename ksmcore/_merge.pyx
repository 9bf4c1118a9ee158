"""The merge protocol: what happens to a run of pages inside a guard window, and how it is undone.

Called by: _runs (merge, reshare, zero), _walk (restore). Calls: _pages, _store (reading), _guard, _sys.

Every operation has the same steps: protect, compare again, remap, release. Whatever fails, each page
of the run afterwards holds the bytes that its program last wrote, and is writable:

  protect   guard_open: from here no write gets in. On failure nothing was changed.
  compare   against bytes that cannot change (the store's copy, or zero). A page that differs is left
            out, and gets its permission back when the window closes.
  remap     one call for each stretch of equal pages. It replaces the mapping at once for everybody.
            On failure the old mapping stands, and the stretch is left out like a changed page.
  release   the private memory goes back to the system with its mapping.

All functions return 0, or -1 when the guard could not give a permission back (the one failure that
must be reported at once); everything else is told by page in `outcomes`. None needs the GIL, and none
allocates inside a window.
"""

from libc.errno cimport EINVAL
from libc.stdint cimport uint8_t, uint32_t, uintptr_t
from libc.string cimport memcpy

from ksmcore._guard cimport guard_close, guard_open
from ksmcore._pages cimport page_compare, page_is_zero
from ksmcore._store cimport store_is_there, store_page, store_t
from ksmcore._sys cimport (
    ADVISE_DONTDUMP, ADVISE_DONTFORK, ADVISE_DONTNEED, ADVISE_HUGEPAGE, ADVISE_NOHUGEPAGE,
    ADVISE_POPULATE_WRITE, error_clear, sys_advise, sys_error, sys_map_anon, sys_map_anon_at,
    sys_is_mapped, sys_map_store_at, sys_move, sys_pause, sys_unmap,
)

# What to do with a stretch of pages that passed the comparison.
ctypedef enum remap_kind:
    MAP_STORE
    DROP_COPY                # of a page over the store: its private copy; what shows again is the store
    DROP_ZERO                # of a page of anonymous memory: all; what shows again is zeros
    MAP_ZERO


cdef void _advise_again(uintptr_t addr, size_t len_bytes, int flags, sys_error* err) noexcept nogil:
    """Give a new mapping the flags of its region. Advice that is refused costs no correctness."""
    if flags & REGION_DONTFORK:
        sys_advise(addr, len_bytes, ADVISE_DONTFORK, err)
    if flags & REGION_DONTDUMP:
        sys_advise(addr, len_bytes, ADVISE_DONTDUMP, err)
    if flags & REGION_HUGEPAGE:
        sys_advise(addr, len_bytes, ADVISE_HUGEPAGE, err)
    if flags & REGION_NOHUGEPAGE:
        sys_advise(addr, len_bytes, ADVISE_NOHUGEPAGE, err)


# How often a mapping that the kernel took away in a failing call is asked for again, a millisecond apart.
cdef enum:
    HEAL_TRIES = 1000


cdef int _remap(
    store_t* store, remap_kind kind, uintptr_t addr, uint32_t slot, size_t len_bytes, size_t page_bytes,
    int flags, sys_error* err
) noexcept nogil:
    cdef sys_error ignored
    cdef int tries = 0, rc
    if kind == DROP_COPY or kind == DROP_ZERO:
        return sys_advise(addr, len_bytes, ADVISE_DONTNEED, err)
    error_clear(&ignored)
    while True:
        if kind == MAP_ZERO:
            rc = sys_map_anon_at(addr, len_bytes, &ignored)
        else:
            rc = sys_map_store_at(
                addr, len_bytes, store.file.fd, <long long>(<size_t>slot * page_bytes), &ignored
            )
        # Kernels before 6.12 unmap the range before the last thing that can fail. The window is still
        # open and the bytes are known to be those of the new mapping, so it is simply asked for again.
        if rc == 0 or tries == HEAL_TRIES or sys_is_mapped(addr, len_bytes):
            break
        tries += 1
        sys_pause()
    if rc != 0 and err.code == 0:
        err[0] = ignored
    if rc == 0 and flags != 0:
        error_clear(&ignored)
        _advise_again(addr, len_bytes, flags, &ignored)
    return rc


cdef int _window(
    store_t* store, remap_kind kind, size_t page_bytes, uintptr_t addr, uint32_t slot, uint32_t n_pages,
    int flags, uint8_t* outcomes, sys_error* err
) noexcept nogil:
    """One window, at most WINDOW_PAGES pages: protect, compare, remap each equal stretch, close."""
    cdef uint32_t i, start, n_remapped = 0
    cdef const uint8_t* page
    cdef bint equal
    if guard_open(addr, n_pages * page_bytes, err) != 0:
        for i in range(n_pages):
            outcomes[i] = REFUSED
        return 0
    for i in range(n_pages):
        page = <const uint8_t*>(addr + i * page_bytes)
        if kind == DROP_ZERO or kind == MAP_ZERO:
            equal = page_is_zero(page, page_bytes)
        else:
            equal = page_compare(page, store_page(store, slot + i), page_bytes) == 0
        outcomes[i] = DONE if equal else CHANGED
    i = 0
    while i < n_pages:
        if outcomes[i] != DONE:
            i += 1
            continue
        start = i
        while i < n_pages and outcomes[i] == DONE:
            i += 1
        if _remap(
            store, kind, addr + start * page_bytes, slot + start, (i - start) * page_bytes, page_bytes,
            flags, err
        ) == 0:
            n_remapped += i - start
        else:
            while start < i:
                outcomes[start] = REFUSED
                start += 1
    # Dropping memory keeps the mapping, and with it the missing write permission.
    return guard_close(
        addr, n_pages * page_bytes,
        n_remapped == n_pages and (kind == MAP_STORE or kind == MAP_ZERO), err
    )


cdef int _windows(
    store_t* store, remap_kind kind, size_t page_bytes, uintptr_t addr, uint32_t slot, uint32_t n_pages,
    int flags, uint8_t* outcomes, sys_error* err
) noexcept nogil:
    """A run of any length, window by window; adjacent mappings of the store fuse in the kernel."""
    cdef uint32_t done = 0, n
    cdef int rc = 0
    while done < n_pages and rc == 0:
        n = min(n_pages - done, <uint32_t>WINDOW_PAGES)
        rc = _window(
            store, kind, page_bytes, addr + done * page_bytes, slot + done, n, flags, outcomes + done, err
        )
        done += n
    while done < n_pages:
        outcomes[done] = REFUSED
        done += 1
    return rc


cdef int merge_run(
    store_t* store, uintptr_t addr, uint32_t slot, uint32_t n_pages, int flags,
    uint8_t* outcomes, sys_error* err
) noexcept nogil:
    """Map slots [slot, slot + n_pages) of the store over the pages from `addr` on, where equal."""
    cdef uint32_t i
    if not store_is_there(store):
        for i in range(n_pages):
            outcomes[i] = REFUSED
        return 0
    return _windows(store, MAP_STORE, store.page_bytes, addr, slot, n_pages, flags, outcomes, err)


cdef int reshare_run(
    store_t* store, uintptr_t addr, uint32_t slot, uint32_t n_pages,
    uint8_t* outcomes, sys_error* err
) noexcept nogil:
    """Drop the private copies over these slots, where equal; the mapping already is of the slots."""
    return _windows(store, DROP_COPY, store.page_bytes, addr, slot, n_pages, 0, outcomes, err)


cdef int zero_run(
    size_t page_bytes, uintptr_t addr, uint32_t n_pages, bint over_store, int flags,
    uint8_t* outcomes, sys_error* err
) noexcept nogil:
    """Give back pages that hold only zeros."""
    return _windows(
        NULL, MAP_ZERO if over_store else DROP_ZERO, page_bytes, addr, 0, n_pages, flags, outcomes, err
    )


cdef int _move(uintptr_t fresh, uintptr_t target, size_t len_bytes, sys_error* err) noexcept nogil:
    """sys_move, tried again where the kernel unmapped the target before it failed (see _remap)."""
    cdef sys_error failed
    cdef int tries = 0
    error_clear(&failed)
    while sys_move(fresh, target, len_bytes, &failed) != 0:
        if tries == HEAL_TRIES or sys_is_mapped(target, len_bytes):
            if err.code == 0:
                err[0] = failed
            return -1
        tries += 1
        sys_pause()
    return 0


cdef int restore_range(
    size_t page_bytes, uintptr_t addr, size_t n_pages, int flags, size_t* n_restored, sys_error* err
) noexcept nogil:
    """Make pages over the store plain private anonymous memory again, with the bytes they show.

    The bytes go to fresh memory, window by window, and that is moved over the pages in one step each,
    so other threads see the same bytes throughout and lose no write. The fresh memory is one mapping
    for the whole range, because only pieces of one mapping fuse again at their new place.

    0 with *n_restored == n_pages, or -1 with *err: the first *n_restored pages are plain memory, the
    others are as they were. All bytes are right in both cases.
    """
    cdef sys_error ignored
    cdef size_t len_bytes = n_pages * page_bytes
    cdef size_t n, window_bytes
    cdef uintptr_t fresh, target
    cdef int rc = 0
    n_restored[0] = 0
    error_clear(&ignored)
    fresh = <uintptr_t>sys_map_anon(len_bytes, err)
    if fresh == 0:
        return -1
    _advise_again(fresh, len_bytes, flags, &ignored)
    while n_restored[0] < n_pages:
        n = min(n_pages - n_restored[0], <size_t>WINDOW_PAGES)
        window_bytes = n * page_bytes
        target = addr + n_restored[0] * page_bytes
        # Faulted in here, so that the copy inside the window neither allocates nor fails. Kernels
        # before 5.14 do not know the advice; then the copy faults, and the window is longer.
        error_clear(&ignored)
        if sys_advise(fresh, window_bytes, ADVISE_POPULATE_WRITE, &ignored) != 0 and ignored.code != EINVAL:
            err[0] = ignored
            rc = -1
            break
        if guard_open(target, window_bytes, err) != 0:
            rc = -1
            break
        memcpy(<void*>fresh, <const void*>target, window_bytes)
        rc = _move(fresh, target, window_bytes, err)
        if guard_close(target, window_bytes, rc == 0, err) != 0 or rc != 0:
            rc = -1
            break
        n_restored[0] += n
        fresh += window_bytes
    if n_restored[0] < n_pages:
        # Unchecked: our own mapping, whole from here to its end.
        sys_unmap(fresh, (n_pages - n_restored[0]) * page_bytes, &ignored)
    return rc

