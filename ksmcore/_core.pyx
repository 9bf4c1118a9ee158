"""The engine's core as Python sees it: a lock, regions, and passes without the GIL.

Called by: engine.py, arrays.py. Calls: _scan, _unmerge, _guard, _merge, _runs.

Every method takes the lock for as long as it touches the core, and never holds it while Python code
could run, so a garbage collection cannot meet it from inside. The lock is taken without the GIL, since
a scanning thread holds it for a span at a time (some milliseconds at most).

A forked child inherits a copy of the core that belongs to its parent: the first call in the child
throws it away and begins anew, empty. What is given up on purpose: the child's share of the lock.
"""

from cpython.pythread cimport (
    PyThread_acquire_lock, PyThread_allocate_lock, PyThread_free_lock, PyThread_release_lock,
    PyThread_type_lock, WAIT_LOCK,
)
from libc.stdint cimport int64_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport realloc
from libc.string cimport memmove

from ksmcore._budget cimport budget_refresh
from ksmcore._guard cimport guard_enter, guard_leave, guard_n_waits
from ksmcore._merge cimport restore_range
from ksmcore._pages cimport checksum_by_name
from ksmcore._rmap cimport PAGE_SHARED, PAGE_UNSHARED, PAGE_VOLATILE, PAGE_ZERO
from ksmcore._runs cimport (
    SKIP_AWAY, SKIP_CHANGED, SKIP_MAP_BUDGET, SKIP_MAX_SHARED, SKIP_PARTNER, SKIP_REFUSED, SKIP_STORE,
)
from ksmcore._scan cimport (
    SPAN_PAGES, core_begin_pass, core_bytes, core_destroy, core_init, core_region_at, core_scan_span,
    engine_core, region_t,
)
from ksmcore._sys cimport (
    CALL_MPROTECT, error_clear, error_raise, gate_generation, sys_error, sys_page_bytes,
)
from ksmcore._unmerge cimport core_check, core_forget, core_restore

from ksmcore.errors import InternalError


cdef class Core:
    """Regions, both trees, the rmap table and the store of one engine."""

    cdef engine_core c
    cdef PyThread_type_lock lock
    cdef uint32_t generation
    cdef uint32_t n_buckets
    cdef bint with_pagemap
    cdef uint64_t next_id

    def __cinit__(self, *, str order, str checksum, bint with_pagemap, uint32_t n_buckets):
        self.n_buckets = n_buckets
        self.with_pagemap = with_pagemap
        self.c.by_content = order == "content"
        self.c.checksum = checksum_by_name(checksum)
        self.c.use_zero_pages = True
        self.c.max_shared_pages = -1
        self.next_id = 1
        self._begin()

    def __dealloc__(self):
        if self.lock != NULL:
            core_destroy(&self.c, self.generation != gate_generation())
            PyThread_free_lock(self.lock)

    cdef int _begin(self) except -1:
        cdef sys_error err
        error_clear(&err)
        if core_init(&self.c, self.n_buckets, self.with_pagemap, &err) != 0:
            if err.code == 0:
                raise MemoryError("no memory for an engine")
            error_raise(&err, "engine")
        self.lock = PyThread_allocate_lock()
        if self.lock == NULL:
            core_destroy(&self.c, False)
            raise MemoryError("no lock")
        self.generation = gate_generation()
        return 0

    cdef int _own(self) except -1:
        """In a forked child: leave the parent's state alone and begin empty.

        The lock is not freed: a thread that does not exist here may hold it.
        """
        if self.generation != gate_generation():
            if self.lock != NULL:
                core_destroy(&self.c, True)
                self.lock = NULL
            # When this fails, the next call tries again.
            self._begin()
        return 0

    # ---- regions ----------------------------------------------------------------------------

    def add(self, uintptr_t addr, size_t n_pages, int flags):
        """Register `n_pages` pages from `addr` on; returns the region's id.

        ValueError when they overlap a region; MemoryError. The caller keeps the memory mapped until
        `remove` has returned.
        """
        cdef region_t* regions
        cdef const region_t* after
        cdef size_t index, len_bytes = n_pages * sys_page_bytes()
        cdef bint overlaps, grown = True
        self._own()
        cdef uint64_t region_id = self.next_id
        self.next_id += 1
        with nogil:
            PyThread_acquire_lock(self.lock, WAIT_LOCK)
            after = core_region_at(&self.c, addr)
            overlaps = after != NULL and after.addr < addr + len_bytes
            if not overlaps:
                index = after - self.c.regions if after != NULL else self.c.n_regions
                if self.c.n_regions == self.c.regions_capacity:
                    regions = <region_t*>realloc(
                        self.c.regions, (2 * self.c.regions_capacity + 8) * sizeof(region_t)
                    )
                    grown = regions != NULL
                    if grown:
                        self.c.regions = regions
                        self.c.regions_capacity = 2 * self.c.regions_capacity + 8
                if grown:
                    memmove(
                        &self.c.regions[index + 1], &self.c.regions[index],
                        (self.c.n_regions - index) * sizeof(region_t),
                    )
                    self.c.regions[index].addr = addr
                    self.c.regions[index].n_pages = n_pages
                    self.c.regions[index].id = region_id
                    self.c.regions[index].flags = flags
                    self.c.n_regions += 1
            PyThread_release_lock(self.lock)
        if overlaps:
            raise ValueError(f"{addr:#x} to {addr + len_bytes:#x} overlaps memory that is already registered")
        if not grown:
            raise MemoryError("no memory for a region")
        return region_id

    def remove(self, uint64_t region_id, uintptr_t addr, bint restore):
        """Forget the region with this id at `addr`; with `restore`, make it plain private memory first.

        False when there is no such region (in a forked child, say). MemoryError: it could not be
        restored; it is still registered, and all its bytes are right.
        """
        cdef const region_t* region
        cdef sys_error err
        cdef bint found
        cdef int rc = 0
        error_clear(&err)
        self._own()
        with nogil:
            PyThread_acquire_lock(self.lock, WAIT_LOCK)
            region = core_region_at(&self.c, addr)
            found = region != NULL and region.id == region_id
            if found:
                if restore:
                    rc = self._restore_locked(region, &err)
                if rc == 0:
                    core_forget(&self.c, region)
                    self._drop_locked(region - self.c.regions)
            PyThread_release_lock(self.lock)
        if rc != 0:
            error_raise(&err, "unregister")
        return bool(found)

    cdef int _restore_locked(self, const region_t* region, sys_error* err) noexcept nogil:
        cdef int rc = guard_enter(err)
        if rc == 0:
            rc = core_restore(&self.c, region, err)
            guard_leave()
        return rc

    cdef void _drop_locked(self, size_t index) noexcept nogil:
        self.c.n_regions -= 1
        memmove(
            &self.c.regions[index], &self.c.regions[index + 1],
            (self.c.n_regions - index) * sizeof(region_t),
        )

    def find(self, uintptr_t addr, size_t len_bytes):
        """(id, address, number of pages) of the region that holds all of [addr, addr + len_bytes), or
        None when nothing of that range is registered.

        ValueError when only a part of it is registered, or when it spans regions.
        """
        cdef const region_t* region
        cdef uint64_t region_id = 0
        cdef uintptr_t start = 0, end = 0
        cdef size_t n_pages = 0
        self._own()
        with nogil:
            PyThread_acquire_lock(self.lock, WAIT_LOCK)
            region = core_region_at(&self.c, addr)
            if region != NULL and region.addr < addr + len_bytes:
                region_id = region.id
                start = region.addr
                n_pages = region.n_pages
                end = start + n_pages * self.c.page_bytes
            PyThread_release_lock(self.lock)
        if region_id == 0:
            return None
        if addr < start or addr + len_bytes > end:
            raise ValueError(
                f"{addr:#x} to {addr + len_bytes:#x} overlaps memory that is already registered "
                f"({start:#x} to {end:#x})"
            )
        return region_id, start, n_pages

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
                PyThread_acquire_lock(self.lock, WAIT_LOCK)
                region = core_region_at(&self.c, cursor)
                region_id = 0
                if region != NULL:
                    region_id = region.id
                    cursor = region.addr
                    n_pages = region.n_pages
                PyThread_release_lock(self.lock)
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
        cdef size_t n_restored
        cdef int rc
        error_clear(&err)
        self._own()
        with nogil:
            rc = guard_enter(&err)
            if rc == 0:
                rc = restore_range(sys_page_bytes(), addr, n_pages, flags, &n_restored, &err)
                guard_leave()
        if rc != 0:
            error_raise(&err, "privatize")

    # ---- passes -----------------------------------------------------------------------------

    def enter_guard(self):
        """Get ready to open windows; pair with leave_guard. OSError when the handler cannot be installed."""
        cdef sys_error err
        cdef int rc
        error_clear(&err)
        with nogil:
            rc = guard_enter(&err)
        if rc != 0:
            error_raise(&err, "guard")

    def leave_guard(self):
        with nogil:
            guard_leave()

    def begin_pass(self):
        """Throw the unstable tree away."""
        self._own()
        with nogil:
            PyThread_acquire_lock(self.lock, WAIT_LOCK)
            core_begin_pass(&self.c)
            PyThread_release_lock(self.lock)

    def end_pass(self):
        """Count a full pass."""
        self._own()
        with nogil:
            PyThread_acquire_lock(self.lock, WAIT_LOCK)
            self.c.counters.full_scans += 1
            PyThread_release_lock(self.lock)

    def spend_reserve(self):
        """Let short runs have more of the map budget from now on."""
        self._own()
        with nogil:
            PyThread_acquire_lock(self.lock, WAIT_LOCK)
            if self.c.b.budget.reserve_shift < 16:
                self.c.b.budget.reserve_shift += 1
            PyThread_release_lock(self.lock)

    def refresh_budget(self, int64_t asked, int64_t max_map_count):
        """Count the process's mappings and set how many the engine may use (-1: half of the free ones)."""
        self._own()
        with nogil:
            PyThread_acquire_lock(self.lock, WAIT_LOCK)
            budget_refresh(&self.c.b.budget, asked, max_map_count)
            PyThread_release_lock(self.lock)

    def walk(self, uintptr_t cursor, uintptr_t end, size_t max_pages, bint immediate):
        """Scan the registered pages in [cursor, end), at most about `max_pages` of them.

        Returns the address to go on at, `end` when there is nothing left. The lock is given up after
        every span, so regions may come and go in between: the cursor is an address, and what is
        registered there when the walk goes on is what is scanned.

        OSError when the kernel does not answer for a page; InternalError when it would not give back a
        write permission that the guard had taken.
        """
        cdef const region_t* region
        cdef sys_error err
        cdef size_t first_page, n_pages, done = 0
        cdef size_t page_bytes = sys_page_bytes()
        cdef bint entered
        cdef int rc
        error_clear(&err)
        self._own()
        with nogil:
            rc = guard_enter(&err)
            entered = rc == 0
            while rc == 0 and done < max_pages and cursor < end:
                PyThread_acquire_lock(self.lock, WAIT_LOCK)
                region = core_region_at(&self.c, cursor)
                if region == NULL or region.addr >= end:
                    cursor = end
                else:
                    if cursor < region.addr:
                        cursor = region.addr
                    first_page = (cursor - region.addr) // page_bytes
                    n_pages = min(region.n_pages - first_page, <size_t>SPAN_PAGES)
                    if end - cursor < n_pages * page_bytes:
                        n_pages = (end - cursor) // page_bytes
                    if n_pages == 0:
                        cursor = end
                    else:
                        rc = core_scan_span(&self.c, region, first_page, n_pages, immediate, &err)
                        cursor += n_pages * page_bytes
                        done += n_pages
                PyThread_release_lock(self.lock)
            if entered:
                guard_leave()
        if rc != 0:
            if err.call == <int>CALL_MPROTECT:
                raise InternalError(
                    f"memory at {err.addr:#x} ({err.len_bytes} bytes) could not be made writable again"
                )
            error_raise(&err, "scan")
        return cursor

    # ---- settings and numbers ---------------------------------------------------------------

    def configure(self, bint use_zero_pages, int64_t max_shared_pages):
        """Settings that may change at any time; -1 shared pages: no limit."""
        self._own()
        with nogil:
            PyThread_acquire_lock(self.lock, WAIT_LOCK)
            self.c.use_zero_pages = use_zero_pages
            self.c.max_shared_pages = max_shared_pages
            PyThread_release_lock(self.lock)

    def snapshot(self):
        """All numbers of this moment, taken together under the lock."""
        cdef engine_core* c = &self.c
        self._own()
        with nogil:
            PyThread_acquire_lock(self.lock, WAIT_LOCK)
        # Only numbers are read below; making Python integers may collect garbage, and a finaliser
        # that wants the lock would wait for ever. So they are copied first.
        cdef uint64_t numbers[32]
        cdef int i
        numbers[0] = c.counters.full_scans
        numbers[1] = c.counters.pages_scanned
        numbers[2] = c.counters.pages_hashed
        numbers[3] = c.counters.pages_merged
        numbers[4] = c.counters.pages_reshared
        numbers[5] = c.counters.pages_zeroed
        numbers[6] = c.counters.cow_breaks
        numbers[7] = c.store.n_shared
        numbers[8] = c.rmap.n_by_state[<int>PAGE_SHARED]
        numbers[9] = c.rmap.n_by_state[<int>PAGE_UNSHARED]
        numbers[10] = c.rmap.n_by_state[<int>PAGE_VOLATILE]
        numbers[11] = c.rmap.n_by_state[<int>PAGE_ZERO]
        numbers[12] = c.store.n_used
        numbers[13] = c.store.n_frozen
        numbers[14] = core_bytes(c)
        numbers[15] = c.stable.n_compares + c.unstable.n_compares
        numbers[16] = c.n_regions
        numbers[17] = <uint64_t>max(c.b.budget.used, <int64_t>0)
        numbers[18] = <uint64_t>max(c.b.budget.allowed, <int64_t>0)
        numbers[19] = c.pm.fd >= 0
        numbers[20] = c.counters.skips[<int>SKIP_CHANGED]
        numbers[21] = c.counters.skips[<int>SKIP_REFUSED]
        numbers[22] = c.counters.skips[<int>SKIP_MAP_BUDGET]
        numbers[23] = c.counters.skips[<int>SKIP_STORE]
        numbers[24] = c.counters.skips[<int>SKIP_MAX_SHARED]
        numbers[25] = c.counters.skips[<int>SKIP_PARTNER]
        numbers[26] = c.counters.skips[<int>SKIP_AWAY]
        PyThread_release_lock(self.lock)
        return {
            "full_scans": numbers[0],
            "pages_scanned": numbers[1],
            "pages_hashed": numbers[2],
            "pages_merged": numbers[3],
            "pages_reshared": numbers[4],
            "pages_zeroed": numbers[5],
            "cow_breaks": numbers[6],
            "pages_shared": numbers[7],
            "pages_sharing": numbers[8] - numbers[7],
            "pages_unshared": numbers[9],
            "pages_volatile": numbers[10],
            "ksm_zero_pages": numbers[11],
            "store_pages": numbers[12],
            "store_pages_frozen": numbers[13],
            "metadata_bytes": numbers[14],
            "page_compares": numbers[15],
            "regions": numbers[16],
            "maps_used": numbers[17],
            "maps_allowed": numbers[18],
            "with_pagemap": bool(numbers[19]),
            "guard_waits": guard_n_waits(),
            "skipped": {
                "changed": numbers[20],
                "refused": numbers[21],
                "map_budget": numbers[22],
                "store": numbers[23],
                "max_shared_pages": numbers[24],
                "partner": numbers[25],
                "away": numbers[26],
            },
        }

    def check(self):
        """Check every invariant of the trees, the table and the store; InternalError names the first
        that is broken. For tests: it visits everything."""
        cdef int rc
        self._own()
        with nogil:
            PyThread_acquire_lock(self.lock, WAIT_LOCK)
            rc = core_check(&self.c)
            PyThread_release_lock(self.lock)
        if rc != 0:
            raise InternalError(f"invariant {rc} is broken (see core_check)")

    @property
    def store_fd(self):
        """Descriptor of the memory file, -1 before the first shared page; for tests."""
        return self.c.store.fd
