"""The regions of an engine's core, as Python and the arena see them.

The lock, and what holds of it, is the core's (see locked).
"""

from cpython.buffer cimport PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.errno cimport EEXIST, EFAULT, ENOMEM
from libc.stdint cimport uint8_t, uint64_t, uintptr_t
from libc.string cimport memset

from ksmcore._core.census cimport census_of_region
from ksmcore._core.locked cimport LockedCore
from ksmcore._core.region_numbers cimport (
    region_counts, region_numbers_as_dict, region_numbers_map, region_numbers_read,
)
from ksmcore._core.release cimport release_if_worth
from ksmcore._core.unmerge cimport (
    unmerge_abandon, unmerge_discard, unmerge_forget, unmerge_is_due, unmerge_lose, unmerge_region,
)
from ksmcore._guard.guard cimport guard_enter, guard_leave, guard_weaker
from ksmcore._guard.merge cimport merge_restore_range, run_t
from ksmcore._guard.window cimport guard_kind
from ksmcore._kernel.forks cimport forks_generation
from ksmcore._kernel.reader cimport reader_enter, reader_leave
from ksmcore._kernel.syscalls cimport (
    sys_error, sys_error_clear, sys_error_raise, sys_is_mapped, sys_map_anon_at, sys_page_bytes,
)
from ksmcore._pass.quiet cimport quiet_unwatch
from ksmcore._records.ranges cimport range_list
from ksmcore._records.regions cimport region_t, regions_at, regions_drop, regions_insert

cdef enum:
    LOOK_TRIES = 100           # while the program takes memory away, and gives it back, as it is restored


cdef bint _went_away(const region_t* region, size_t page_bytes, const sys_error* err) noexcept nogil:
    """Is this how a call fails on pages of a region that the program has taken away, or their permissions, after they
    were looked at?"""
    return err.code == EFAULT or (
        region.addr <= err.addr < region.addr + region.n_pages * page_bytes
        and not sys_is_mapped(err.addr, err.len_bytes)
    )


cdef class Registry(LockedCore):
    """The part of a core that registration needs."""

    cdef region_t* _region(self, uint64_t region_id, uintptr_t addr) noexcept nogil:
        """The region with this id at `addr`, or NULL. The caller holds the lock."""
        cdef region_t* region = regions_at(&self.c.regions, addr)
        return region if region != NULL and region.id == region_id else NULL

    cdef int enlist(
        self, uint64_t region_id, uintptr_t addr, size_t n_pages, int flags, bint fresh
    ) noexcept nogil:
        """`add`, for who has seen to it that this process owns the core: 0, EEXIST or ENOMEM."""
        cdef region_t* after
        cdef bint overlaps, added = False
        self._lock()
        while True:
            after = regions_at(&self.c.regions, addr)
            overlaps = after != NULL and after.addr < addr + n_pages * self.c.page_bytes
            if not overlaps or not fresh:
                break
            quiet_unwatch(&self.c, after)
            unmerge_abandon(&self.c, after)
            regions_drop(&self.c.regions, after)
        if not overlaps:
            added = regions_insert(&self.c.regions, region_id, addr, n_pages, flags) != NULL
        self.n_enlisted += added
        self._unlock()
        return EEXIST if overlaps else 0 if added else ENOMEM

    cdef void strike(self, uint64_t region_id, uintptr_t addr) noexcept nogil:
        """Forget a region that is about to be unmapped; nothing where it is not, or in a forked child."""
        cdef region_t* region
        if self.generation != forks_generation():
            return
        self._lock()
        region = self._region(region_id, addr)
        if region != NULL:
            self._drop(region)
        self._unlock()

    cdef bint let_move(self, uint64_t region_id, uintptr_t addr) noexcept nogil:
        """Forget a region whose memory is about to be moved elsewhere. False, and nothing is changed, where pages of it
        lie over the store: they would go on doing so there."""
        cdef region_t* region
        cdef bint is_free = True
        if self.generation != forks_generation():
            return False
        self._lock()
        region = self._region(region_id, addr)
        if region != NULL:
            is_free = not unmerge_is_due(&self.c, region)
        if region != NULL and is_free:
            quiet_unwatch(&self.c, region)
            unmerge_forget(&self.c, region)
            regions_drop(&self.c.regions, region)
        self._unlock()
        return is_free

    cdef void _drop(self, region_t* region) noexcept nogil:
        """Forget a region that is about to be unmapped. The caller holds the lock."""
        cdef size_t n_blocked
        cdef sys_error ignored
        sys_error_clear(&ignored)
        self._look_at(region, &n_blocked)
        quiet_unwatch(&self.c, region)
        # Nobody looks there any more; and from here on nothing maps what is to be released, and nothing else.
        if unmerge_is_due(&self.c, region) and (
            sys_map_anon_at(region.addr, region.n_pages * self.c.page_bytes, &ignored) != 0
        ):
            unmerge_lose(&self.c, region)
        unmerge_forget(&self.c, region)
        regions_drop(&self.c.regions, region)
        release_if_worth(&self.c, False)

    cdef void leave_unsettled(self, range_list* ranges) noexcept nogil:
        """Leave these alone in patient walks, in the place of those that are put into *ranges."""
        if self.generation != forks_generation():
            return
        self._lock()
        self.c.unsettled, ranges[0] = ranges[0], self.c.unsettled
        self._unlock()

    cdef bint discard(self, uint64_t region_id, uintptr_t addr, size_t n_pages, bint* emptied) noexcept nogil:
        """Empty pages of the region with this id, which nobody uses; *emptied: all of them. False where they are
        not of that region."""
        cdef region_t* region
        cdef bint found = False
        if self.generation != forks_generation():
            return False
        self._lock()
        region = regions_at(&self.c.regions, addr)
        if region != NULL and region.id == region_id and region.addr <= addr:
            found = True
            emptied[0] = unmerge_discard(&self.c, region, addr, n_pages)
        self._unlock()
        return found

    def add(self, uint64_t region_id, uintptr_t addr, size_t n_pages, int flags, bint fresh=False):
        """Register `n_pages` pages from `addr` on, under an id that no other region of the process has.

        `fresh`: the kernel has just handed out this memory. So a region that was there before has been
        unmapped behind its owner's back, and is given up.

        ValueError when they overlap a region; MemoryError. The caller keeps the memory mapped until
        `remove` has returned.
        """
        cdef size_t len_bytes = n_pages * sys_page_bytes()
        cdef int rc
        self._own()
        with nogil:
            rc = self.enlist(region_id, addr, n_pages, flags, fresh)
        if rc == EEXIST:
            raise ValueError(f"{addr:#x} to {addr + len_bytes:#x} overlaps memory that is already registered")
        if rc != 0:
            raise MemoryError("no memory for a region")

    def remove(self, uint64_t region_id, uintptr_t addr, bint restore, bint keep=False):
        """Forget the region with this id at `addr`; with `restore`, make it plain private memory first;
        with `keep` as well, do only that.

        False when there is no such region (in a forked child, say). MemoryError: it could not be
        restored; it is still registered, and all its bytes are right. RuntimeError: it is held, or the
        program has taken its permissions away.

        Any guard will do: where the kernel refuses the engine's, a weaker one takes its place for this. Without
        `restore` nothing can fail.
        """
        cdef size_t n_blocked = 0
        cdef sys_error err
        cdef bint found = False, held = False, entered
        cdef guard_kind guard
        cdef int rc = -1
        self._own()
        with nogil:
            guard = self.c.guard
            reader_enter()
            while rc != 0:
                sys_error_clear(&err)
                entered = not restore or guard_enter(guard, &err) == 0
                if entered:
                    rc = self._take_out(region_id, addr, guard, restore, keep, &found, &held, &n_blocked, &err)
                    if restore:
                        guard_leave(guard)
                if rc != 0 and not guard_weaker(&guard, entered, &err):
                    break
            reader_leave()
        if held:
            raise RuntimeError("this memory is held: leave its hold() first")
        if restore and n_blocked != 0:
            raise RuntimeError(
                f"{n_blocked} pages of this memory cannot be read and written any more, so they cannot be "
                "unmerged: undo the mprotect(2) first"
            )
        if rc != 0:
            sys_error_raise(&err, "unregister")
        return bool(found)

    cdef int _take_out(
        self, uint64_t region_id, uintptr_t addr, guard_kind guard, bint restore, bint keep, bint* found, bint* held,
        size_t* n_blocked, sys_error* err
    ) noexcept nogil:
        """What `remove` does, under a guard that has been entered. -1 with *err when it could not be restored."""
        cdef region_t* region
        cdef int rc = 0, tries = 0
        self._lock()
        region = self._region(region_id, addr)
        found[0] = region != NULL
        held[0] = found[0] and restore and region.n_holds != 0
        if found[0] and not restore:
            self._drop(region)
        elif found[0] and not held[0]:
            self._look_at(region, n_blocked)
            if n_blocked[0] == 0:
                if not keep:
                    quiet_unwatch(&self.c, region)   # so that no window need let go of it
                rc = unmerge_region(&self.c, region, guard, err)
                # The program may have taken pages away, or their permissions, since they were looked at.
                while rc != 0 and _went_away(region, self.c.page_bytes, err) and n_blocked[0] == 0:
                    if tries == <int>LOOK_TRIES:
                        n_blocked[0] = err.len_bytes // self.c.page_bytes
                        break
                    tries += 1
                    sys_error_clear(err)
                    self._look_at(region, n_blocked)
                    rc = unmerge_region(&self.c, region, guard, err) if n_blocked[0] == 0 else -1
                if rc == 0 and not keep:
                    unmerge_forget(&self.c, region)
                    regions_drop(&self.c.regions, region)
                release_if_worth(&self.c, True)
        self._unlock()
        return rc

    cdef void _look_at(self, region_t* region, size_t* n_blocked) noexcept nogil:
        """Before slots of a region are released: what the program has mapped elsewhere is kept for it. Where it cannot
        be known, all is. The caller holds the lock."""
        cdef sys_error ignored
        n_blocked[0] = 0
        sys_error_clear(&ignored)
        if self.c.rmap.n_over_store != 0 and census_of_region(&self.c, region, n_blocked, &ignored) < 0:
            unmerge_lose(&self.c, region)

    def hold(self, uintptr_t addr, size_t len_bytes):
        """Hold every region that overlaps [addr, addr + len_bytes); returns (id, address) of each.

        Once it has returned, no window is open in these regions, and none is opened until `let_go` was
        called for each. Holds are counted.
        """
        cdef region_t* region
        cdef uint64_t region_id
        cdef uintptr_t cursor = addr, start = 0
        held = []
        self._own()
        while True:
            with nogil:
                self._lock()
                region = regions_at(&self.c.regions, cursor)
                region_id = 0
                if region != NULL and region.addr < addr + len_bytes:
                    region.n_holds += 1
                    region_id = region.id
                    start = region.addr
                    cursor = start + region.n_pages * self.c.page_bytes
                self._unlock()
            if region_id == 0:
                return held
            held.append((region_id, start))

    def let_go(self, uint64_t region_id, uintptr_t addr):
        """Take back one hold of the region with this id; nothing when the region is gone."""
        cdef region_t* region
        self._own()
        with nogil:
            self._lock()
            region = self._region(region_id, addr)
            if region != NULL and region.n_holds != 0:
                region.n_holds -= 1
            self._unlock()

    def tally(self, uint64_t region_id, uintptr_t addr):
        """The pages of a region by what they are, as a dict; all 0 when there is no such region. Visits every
        page's record."""
        cdef const region_t* region
        cdef region_counts tally
        memset(&tally, 0, sizeof(tally))
        self._own()
        with nogil:
            self._lock()
            region = self._region(region_id, addr)
            if region != NULL:
                region_numbers_read(&self.c, region, &tally)
            self._unlock()
        return region_numbers_as_dict(&tally)

    def page_map(self, uint64_t region_id, uintptr_t addr, states):
        """Fill one byte for each page of the region (see ksmcore.PageState); False when there is no such region.
        OSError when the kernel does not answer."""
        cdef const region_t* region
        cdef sys_error err
        cdef bint found
        cdef int rc = 0
        cdef Py_buffer view
        sys_error_clear(&err)
        self._own()
        PyObject_GetBuffer(states, &view, PyBUF_WRITABLE)
        with nogil:
            self._lock()
            region = self._region(region_id, addr)
            found = region != NULL and region.n_pages == <size_t>view.len
            if found:
                rc = region_numbers_map(&self.c, region, <uint8_t*>view.buf, &err)
            self._unlock()
        PyBuffer_Release(&view)
        if rc != 0:
            sys_error_raise(&err, "page map")
        return found

    def find(self, uintptr_t addr, size_t len_bytes):
        """(id, address, number of pages) of the region that holds all of [addr, addr + len_bytes), or
        None when nothing of that range is registered.

        ValueError when only a part of it is registered, or when it reaches over regions.
        """
        cdef const region_t* region
        cdef uint64_t region_id = 0
        cdef uintptr_t start = 0, end = 0
        cdef size_t n_pages = 0
        self._own()
        with nogil:
            self._lock()
            region = regions_at(&self.c.regions, addr)
            if region != NULL and region.addr < addr + len_bytes:
                region_id = region.id
                start = region.addr
                n_pages = region.n_pages
                end = start + n_pages * self.c.page_bytes
            self._unlock()
        if region_id == 0:
            return None
        if addr < start or addr + len_bytes > end:
            raise ValueError(
                f"{addr:#x} to {addr + len_bytes:#x} overlaps memory that is already registered "
                f"({start:#x} to {end:#x})"
            )
        return region_id, start, n_pages

    def pages_before(self, uintptr_t addr):
        """Registered pages below `addr`, and in all."""
        cdef size_t i, n_before = 0, n_pages = 0
        cdef const region_t* region
        self._own()
        with nogil:
            self._lock()
            for i in range(self.c.regions.n):
                region = &self.c.regions.all[i]
                n_pages += region.n_pages
                if region.addr < addr:
                    n_before += min(region.n_pages, (addr - region.addr) // self.c.page_bytes)
            self._unlock()
        return n_before, n_pages

    def regions(self):
        """(id, address, number of pages) of every region, by address."""
        cdef const region_t* region
        cdef uint64_t region_id
        cdef uintptr_t cursor = 0
        cdef size_t n_pages
        found = []
        self._own()
        while True:
            with nogil:
                self._lock()
                region = regions_at(&self.c.regions, cursor)
                region_id = 0
                if region != NULL:
                    region_id = region.id
                    cursor = region.addr
                    n_pages = region.n_pages
                self._unlock()
            if region_id == 0:
                return found
            found.append((region_id, cursor, n_pages))
            cursor += n_pages * sys_page_bytes()

    def privatize(self, uintptr_t addr, size_t n_pages, int flags):
        """Turn `n_pages` pages of shared memory into private memory with the same bytes, in place.

        On failure (MemoryError, OSError) the pages before the failing one are private already; all
        bytes are right.
        """
        cdef sys_error err
        cdef run_t run
        cdef size_t n_restored
        cdef bint entered
        cdef int rc = -1
        self._own()
        run.addr = addr
        run.n_pages = n_pages
        run.page_bytes = sys_page_bytes()
        run.over_store = True
        run.flags = flags
        run.tracker = NULL
        with nogil:
            reader_enter()
            run.guard = self.c.guard
            while rc != 0:
                sys_error_clear(&err)
                entered = guard_enter(run.guard, &err) == 0
                if entered:
                    rc = merge_restore_range(&run, True, &n_restored, &err)
                    guard_leave(run.guard)
                    run.addr += n_restored * run.page_bytes
                    run.n_pages -= n_restored
                if rc != 0 and not guard_weaker(&run.guard, entered, &err):
                    break
            reader_leave()
        if rc != 0:
            sys_error_raise(&err, "privatize")
