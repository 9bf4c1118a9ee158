"""The engine's core as Python sees it: passes without the GIL, settings and numbers, over its regions.

The lock, and what holds of it, is that of LockedCore (see locked).
"""

from libc.stdint cimport UINT64_MAX, int64_t, uint32_t, uint64_t, uintptr_t
from libc.string cimport memcpy

from ksmcore._core.census cimport census_of_range, census_take
from ksmcore._core.check cimport check_engine
from ksmcore._core.copy cimport copy_span
from ksmcore._core.numbers cimport core_numbers, numbers_as_dict, numbers_read
from ksmcore._core.registry cimport Registry
from ksmcore._core.release cimport release_idle, release_if_worth
from ksmcore._core.unmerge cimport unmerge_settle
from ksmcore._guard.guard cimport guard_leave, guard_name, guard_tidy
from ksmcore._guard.window cimport guard_kind
from ksmcore._kernel.forks cimport forks_is_coming
from ksmcore._kernel.pagemap cimport SPAN_PAGES
from ksmcore._kernel.pool cimport pool_end, pool_init, pool_t
from ksmcore._kernel.reader cimport reader_enter, reader_leave
from ksmcore._kernel.syscalls cimport (
    CALL_MINCORE, sys_error, sys_error_clear, sys_error_raise, sys_is_kept, sys_locks_future, sys_page_bytes,
)
from ksmcore._pass.blocks cimport blocks_offer_all
from ksmcore._pass.look cimport look_begin_pass
from ksmcore._pass.quiet cimport quiet_begin_pass, quiet_stop
from ksmcore._pass.scan cimport scan_at, scan_pass_over
from ksmcore._pass.state cimport state_begin_pass
from ksmcore._records.regions cimport region_t, regions_at, regions_end_of, regions_next
from ksmcore._records.store cimport MAX_SHARERS
from ksmcore._records.store_files cimport MAX_FILES

from ksmcore.errors import InternalError


cdef enum:
    MOST_ALONE = 256           # walks, of some ten milliseconds each


cdef class Core(Registry):
    """Regions, both trees, the rmap table and the store of one engine."""

    cdef uint32_t n_alone        # walks without other threads, since those have got no processor; under the pass lock
    cdef uint32_t n_alone_next   # the next time that happens
    cdef readonly uint64_t helpers_ns  # processor time of the other threads, in patient walks

    # ---- passes -----------------------------------------------------------------------------

    @property
    def guard_in_use(self):
        """Name of the guard."""
        return guard_name(self.c.guard)

    def enter_guard(self):
        """Get ready to open windows; pass what is returned to leave_guard. OSError when none can be had."""
        cdef guard_kind entered = self.guard
        cdef sys_error err
        cdef int rc
        sys_error_clear(&err)
        with nogil:
            rc = self._enter(&entered, &err)
        if rc != 0:
            sys_error_raise(&err, "guard")
        return <int>entered

    def leave_guard(self, int entered):
        with nogil:
            guard_leave(<guard_kind>entered)

    def begin_pass(self, bint patient=False, *, bint again=False):
        """Throw the unstable tree away. `patient`: what this pass leaves it can leave to the next. `again`: this is
        another round of the last pass; what the program had advised then need not be asked anew for that."""
        self._own()
        with nogil:
            self._lock()
            quiet_begin_pass(&self.c)
            state_begin_pass(&self.c)
            if not again:
                look_begin_pass(&self.c, patient)
            self._unlock()

    def release(self):
        """Give back the shared pages that nobody shares any more. At the end of a pass."""
        cdef guard_kind guard = self.guard
        cdef sys_error ignored
        cdef bint entered
        sys_error_clear(&ignored)
        self._own()
        if self.c.store.n_idle == 0:
            return               # a look without the lock: what comes to be idle meanwhile waits for the next pass
        with nogil:
            # For where it takes reading.
            reader_enter()
            entered = self._enter(&guard, &ignored) == 0
            self._lock()
            release_idle(&self.c, entered)
            self._unlock()
            if entered:
                guard_leave(guard)
            reader_leave()

    def end_pass(self, *, bint full, bint spend_reserve):
        """Count a `full` pass; `spend_reserve`: let short runs have more of the map budget from now on."""
        self._own()
        with nogil:
            self._lock()
            self.c.counters.full_scans += full
            if spend_reserve and self.c.budget.reserve_shift < 16:
                self.c.budget.reserve_shift += 1
            self._unlock()

    def stop_watching(self):
        """Close the tracker's descriptor for good; no region is watched from here on."""
        self._own()
        with nogil:
            self._lock()
            quiet_stop(&self.c)
            self._unlock()

    def take_census(self, int64_t asked_maps, int64_t max_map_count):
        """Look at the process's mappings: how many the engine may use (asked_maps -1: half of the free
        ones), and which regions are not what they were registered as. OSError or MemoryError when that cannot be
        known: then nothing should be merged."""
        cdef sys_error err
        cdef int rc
        sys_error_clear(&err)
        self._own()
        with nogil:
            self._lock()
            rc = census_take(&self.c, asked_maps, max_map_count, &err)
            self._unlock()
        if rc != 0:
            if err.code == 0:
                raise MemoryError("no memory to look at the mappings")
            sys_error_raise(&err, "mappings")

    def pass_over(self, uintptr_t addr, uintptr_t end):
        """Take what is registered in [addr, end) for altered, until the next census."""
        cdef region_t* region
        self._own()
        with nogil:
            self._lock()
            region = regions_at(&self.c.regions, addr)
            while region != NULL and region.addr < end:
                region.altered = region.passed_over = True
                unmerge_settle(&self.c, region)
                region = regions_next(&self.c.regions, region)
            self._unlock()

    def walk(
        self, uintptr_t cursor, uintptr_t end, size_t max_pages, bint immediate, uint64_t max_merges=0, *,
        bint patient=False, uint32_t n_threads=1
    ):
        """Scan the registered pages in [cursor, end), at most about `max_pages` of them, until exactly `max_merges`
        are merged at most (0: no bound). `patient`: unsettled memory is left alone (see leave_unsettled), and it ends
        early where a fork is about to come. `n_threads`: this one and those that help it, which end with the walk.

        Returns the address to go on at, `end` when there is nothing left. The lock is given up after
        every span, so regions may come and go in between: the cursor is an address, and what is
        registered there when the walk goes on is what is scanned.

        OSError when the kernel does not answer for a page; InternalError when it would not give back a
        write permission that the guard had taken.
        """
        cdef sys_error err
        cdef size_t done = 0
        cdef uint64_t merges_left = max_merges if max_merges != 0 else UINT64_MAX
        cdef bint entered
        cdef guard_kind guard = self.guard
        cdef pool_t pool
        cdef int rc
        sys_error_clear(&err)
        self._own()
        with nogil:
            cursor = self._pass_over(cursor, end, max_pages, patient, &done)
        if cursor >= end or done >= max_pages:
            return cursor
        with nogil:
            reader_enter()
            if self.n_alone != 0:
                self.n_alone -= 1
                n_threads = 1
            pool_init(&pool, n_threads)
            rc = self._enter(&guard, &err)
            entered = rc == 0
            while rc == 0 and done < max_pages and merges_left != 0 and cursor < end:
                self._take_lock()
                self.c.merges_left = merges_left
                self.c.pool = &pool
                rc = scan_at(&self.c, &cursor, end, immediate, patient, &done, &err)
                merges_left = self.c.merges_left
                release_if_worth(&self.c, True)
                self._unlock()
                if patient and forks_is_coming():
                    break
                self._let_others()
            pool_end(&pool)
            if patient:
                self.helpers_ns += pool.spent_ns
            if pool.was_late:
                self.n_alone_next = self.n_alone = min(max(2 * self.n_alone_next, 2), <uint32_t>MOST_ALONE)
            elif n_threads > 1:
                self.n_alone_next //= 2
            if entered:
                guard_tidy(guard)
                guard_leave(guard)
            reader_leave()
        if rc != 0:
            if entered and err.call != <int>CALL_MINCORE:
                raise InternalError(
                    f"memory at {err.addr:#x} ({err.len_bytes} bytes) could not be made writable again"
                )
            sys_error_raise(&err, "scan")
        return cursor

    cdef uintptr_t _pass_over(
        self, uintptr_t cursor, uintptr_t end, size_t max_pages, bint patient, size_t* done
    ) noexcept nogil:
        """The beginning of a walk, as far as nobody wrote there: mostly all of it."""
        cdef bint goes_on = True
        while goes_on and done[0] < max_pages and cursor < end and not (patient and forks_is_coming()):
            self._lock()
            goes_on = scan_pass_over(&self.c, &cursor, end, done)
            self._unlock()
        return cursor

    cdef void _set_being_made(self, uintptr_t target, bint being_made) noexcept nogil:
        """The region of a copy, unless it has been unregistered since. The caller holds the lock."""
        cdef region_t* region = regions_at(&self.c.regions, target)
        if region != NULL and region.addr <= target:
            region.being_made = being_made

    cdef int _look_at_range(self, uintptr_t addr, uintptr_t end, sys_error* err) noexcept nogil:
        """The census of what is registered in [addr, end): 1 if all of it is as remembered, 0 if it was put right, -1
        with *err if it is not known. The caller holds the lock."""
        cdef region_t* region = regions_at(&self.c.regions, addr)
        cdef size_t page_bytes = self.c.page_bytes, n_blocked
        cdef uintptr_t start = addr // page_bytes * page_bytes, stop = (end + page_bytes - 1) // page_bytes * page_bytes
        cdef bint is_plain = True
        cdef int rc = 1, one
        while rc >= 0 and region != NULL and region.addr < end:
            one = census_of_range(
                &self.c, max(start, region.addr), min(stop, regions_end_of(&self.c.regions, region)), &is_plain,
                &n_blocked, err
            )
            rc = min(rc, one)
            # What lies there now is the program's: its bytes are copied, whatever is remembered.
            region.altered = region.altered or (one >= 0 and not is_plain)
            region = regions_next(&self.c.regions, region)
        return rc

    def copy_memory(self, uintptr_t source, uintptr_t target, size_t len_bytes):
        """Copy bytes into fresh memory that begins as far into a page, is registered and was never touched, and that
        nobody else knows yet. Whole pages that are shared in the source are shared by both, what is not is copied.
        Returns how many whole pages had to be copied: all, where the kernel does not tell what is mapped, or where new
        memory is locked.

        The caller keeps both mapped.
        """
        cdef size_t page_bytes = sys_page_bytes(), n, done = 0, n_plain = 0
        cdef bint may_share = not sys_locks_future()
        cdef sys_error ignored
        sys_error_clear(&ignored)
        self._own()
        with nogil:
            self._lock()
            # No pass looks at the target while it is made: one that did, between two spans, would give
            # items of its own to pages that the first bytes brought a huge page to.
            self._set_being_made(target, True)
            may_share = self._look_at_range(source, source + len_bytes, &ignored) >= 0 and may_share
            self._unlock()
            while done < len_bytes:
                n = min(len_bytes - done, page_bytes - (source + done) % page_bytes)
                if n == page_bytes:
                    n = min((len_bytes - done) // page_bytes, <size_t>SPAN_PAGES) * page_bytes
                    self._lock()
                    copy_span(&self.c, source + done, target + done, n // page_bytes, may_share, &n_plain)
                    self._unlock()
                else:
                    memcpy(<void*>(target + done), <const void*>(source + done), n)
                done += n
            self._lock()
            if may_share and self._look_at_range(source, source + len_bytes, &ignored) != 1:
                # Mapped otherwise now than it was: what was shared may be what lay there at no time.
                memcpy(<void*>target, <const void*>source, len_bytes)
                n_plain = len_bytes // page_bytes
            self._set_being_made(target, False)
            self._unlock()
        return n_plain

    # ---- settings and numbers ---------------------------------------------------------------

    def configure(
        self, bint use_zero_pages, bint smart_scan, int64_t max_shared_pages, int64_t max_page_sharing
    ):
        """Settings that may change at any time; -1: no limit."""
        cdef bint raised
        max_page_sharing = max_page_sharing if max_page_sharing >= 0 else <int64_t>MAX_SHARERS
        self._own()
        with nogil:
            self._lock()
            self.c.use_zero_pages = use_zero_pages
            self.c.smart_scan = smart_scan
            self.c.max_shared_pages = max_shared_pages
            raised = self.c.max_page_sharing < min(max_page_sharing, <int64_t>MAX_SHARERS)
            self.c.max_page_sharing = <uint32_t>min(max_page_sharing, <int64_t>MAX_SHARERS)
            if raised:
                blocks_offer_all(&self.c.b)
            self._unlock()

    def snapshot(self):
        """All numbers of this moment, taken together under the lock.

        They are copied first: making Python objects may collect garbage, and a finaliser that wants the
        lock would wait for ever.
        """
        cdef core_numbers numbers
        self._own()
        with nogil:
            self._lock()
            numbers_read(&self.c, &numbers)
            self._unlock()
        return numbers_as_dict(&numbers)

    def check(self, bint are_filed=False):
        """Check every invariant of the trees, the table and the store; InternalError names the first
        that is broken. For tests: it visits everything. `are_filed`: also the checksums of shared pages, which must be
        right where nothing was written while they were made."""
        cdef int rc
        self._own()
        with nogil:
            self._lock()
            rc = check_engine(&self.c, are_filed)
            self._unlock()
        if rc != 0:
            raise InternalError(f"invariant {rc} is broken (see ksmcore/_core/check.pyx)")

    @property
    def maps_used(self):
        """Mappings that the engine is taken to use."""
        return self.c.budget.used

    @property
    def look_ns(self):
        """What the last look took (see _pass.look), if it was made in this pass; else 0."""
        return self.c.advice.cost_ns if self.c.advice.seen_ns >= self.c.advice.pass_ns else 0

    @property
    def n_maps(self):
        """Mappings of the process, by the last census."""
        return self.c.n_maps

    @property
    def store_fds(self):
        """Descriptors of the memory files."""
        cdef uint32_t i, n = 0
        cdef int fds[<int>MAX_FILES]
        self._own()
        with nogil:
            self._lock()
            for i in range(self.c.store.n_files):
                if sys_is_kept(&self.c.store.files[i].file):
                    fds[n] = self.c.store.files[i].file.fd
                    n += 1
            self._unlock()
        return [fds[i] for i in range(n)]

    @property
    def store_fd(self):
        """Descriptor of the memory file that takes new shared pages, -1 before the first."""
        cdef int fd = -1
        self._own()
        with nogil:
            self._lock()
            if self.c.store.n_open != 0:
                fd = self.c.store.files[self.c.store.growing].file.fd
            self._unlock()
        return fd
