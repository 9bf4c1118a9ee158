"""How much could be saved: counts equal pages without registering, protecting or mapping anything.

All present pages are given their checksum, sorted by it, and within equal checksums compared byte by
byte. Pages that change meanwhile make the answer inexact, nothing worse.
"""

from libc.stdint cimport uint8_t, uint32_t, uintptr_t
from libc.stdlib cimport free, qsort, realloc

from ksmcore._guard.guard cimport guard_enter, guard_leave
from ksmcore._guard.window cimport GUARD_MPROTECT
from ksmcore._kernel.pagemap cimport (
    PAGE_OF_FILE, PAGE_OWNED, PAGE_PRESENT, PAGE_UNSURE, pagemap, pagemap_close, pagemap_hole_end,
    pagemap_open, pagemap_query, pagemap_try_scanning,
)
from ksmcore._kernel.reader cimport reader_enter, reader_leave
from ksmcore._kernel.syscalls cimport sys_error, sys_error_clear, sys_error_raise, sys_page_bytes
from ksmcore._pages cimport checksum_by_name, checksum_pages_t, checksum_safely, page_compare, page_is_zero

cdef enum:
    SIGNAL_PAGES = 1024         # pages between two looks at signals


cdef int _enter() except -1:
    """Read under protection. The handler of a guard is there for it, though nothing is guarded."""
    cdef sys_error err
    sys_error_clear(&err)
    if guard_enter(GUARD_MPROTECT, &err) != 0:
        sys_error_raise(&err, "estimate")
    reader_enter()
    return 0


cdef void _leave() noexcept:
    reader_leave()
    with nogil:
        guard_leave(GUARD_MPROTECT)


ctypedef struct found_page:
    const uint8_t* page
    uint32_t digest
    uint32_t order             # position among the pages, so that equal checksums sort stably


cdef int _by_digest(const void* a, const void* b) noexcept nogil:
    cdef const found_page* left = <const found_page*>a
    cdef const found_page* right = <const found_page*>b
    if left.digest != right.digest:
        return 1 if left.digest > right.digest else -1
    return (left.order > right.order) - (left.order < right.order)


cdef class Tally:
    """Counts of the pages added so far."""

    cdef found_page* found
    cdef size_t n_found
    cdef size_t capacity
    cdef checksum_pages_t checksum
    cdef size_t page_bytes
    cdef readonly size_t n_pages
    cdef readonly size_t n_zero

    def __cinit__(self, str checksum):
        self.checksum = checksum_by_name(checksum)
        self.page_bytes = sys_page_bytes()

    def __dealloc__(self):
        free(self.found)

    def add(self, uintptr_t addr, size_t n_pages):
        """Look at `n_pages` pages from `addr` on; the caller keeps them mapped until `distinct`."""
        cdef uint8_t flags[SIGNAL_PAGES]
        cdef const uint8_t* pages[SIGNAL_PAGES]
        cdef uint32_t digests[SIGNAL_PAGES]
        cdef pagemap pm
        cdef sys_error err
        cdef size_t done = 0, n, i, n_look
        cdef const uint8_t* page
        cdef int rc = 0
        cdef bint no_memory = False
        sys_error_clear(&err)
        self.n_pages += n_pages
        _enter()
        pagemap_open(&pm, self.page_bytes, True)
        try:
            while done < n_pages:
                with nogil:
                    n = min(n_pages - done, <size_t>SIGNAL_PAGES)
                    n_look = 0
                    rc = pagemap_query(&pm, addr + done * self.page_bytes, n, flags, &err)
                    for i in range(n if rc == 0 else 0):
                        page = <const uint8_t*>(addr + (done + i) * self.page_bytes)
                        if not flags[i] & PAGE_PRESENT:
                            continue
                        if page_is_zero(page, self.page_bytes):
                            # The kernel's own zero page has no memory to save.
                            if flags[i] & (PAGE_OWNED | PAGE_OF_FILE | PAGE_UNSURE):
                                self.n_zero += 1
                            continue
                        pages[n_look] = page
                        n_look += 1
                    checksum_safely(self.checksum, pages, n_look, self.page_bytes, digests)
                    no_memory = not self._keep(pages, digests, n_look)
                    done += n
                if rc != 0:
                    sys_error_raise(&err, "estimate")
                if no_memory:
                    raise MemoryError("no memory to remember the pages of an estimate")
        finally:
            pagemap_close(&pm)
            _leave()

    def pass_hole(self, uintptr_t addr, uintptr_t end):
        """Count the pages before the first one in [addr, end) that is there, or was swapped out, and return where that
        is; `addr` where the kernel does not tell."""
        cdef pagemap pm
        cdef uintptr_t there
        pagemap_open(&pm, self.page_bytes, True)
        with nogil:
            pagemap_try_scanning(&pm)
            there = pagemap_hole_end(&pm, addr, end)
        pagemap_close(&pm)
        self.n_pages += (there - addr) // self.page_bytes
        return there

    cdef bint _keep(self, const uint8_t** pages, const uint32_t* digests, size_t n) noexcept nogil:
        cdef found_page* grown
        cdef size_t i
        if self.n_found + n > self.capacity:
            grown = <found_page*>realloc(
                self.found, (2 * self.capacity + <size_t>SIGNAL_PAGES) * sizeof(found_page)
            )
            if grown == NULL:
                return False
            self.found = grown
            self.capacity = 2 * self.capacity + SIGNAL_PAGES
        for i in range(n):
            self.found[self.n_found + i].page = pages[i]
            self.found[self.n_found + i].digest = digests[i]
            self.found[self.n_found + i].order = <uint32_t>(self.n_found + i)
        self.n_found += n
        return True

    @property
    def n_present(self):
        return self.n_found + self.n_zero

    def distinct(self):
        """Number of different contents among the pages that are not zero."""
        _enter()
        try:
            return self._distinct()
        finally:
            _leave()

    cdef size_t _distinct(self) except? 0:
        cdef size_t start = 0, end, n_distinct = 0, n
        if self.n_found == 0:
            return 0
        with nogil:
            qsort(self.found, self.n_found, sizeof(found_page), _by_digest)
        while start < self.n_found:
            with nogil:
                n = 0
                while start < self.n_found and n < <size_t>SIGNAL_PAGES:
                    end = start + 1
                    while end < self.n_found and self.found[end].digest == self.found[start].digest:
                        end += 1
                    n_distinct += self._distinct_in(start, end)
                    n += end - start
                    start = end
        return n_distinct

    cdef size_t _distinct_in(self, size_t start, size_t end) noexcept nogil:
        """Contents within one group of equal checksums: nearly always a single one. The first page of
        each content is moved to the front of the group."""
        cdef size_t n = 0, i, k
        for i in range(start, end):
            for k in range(start, start + n):
                if page_compare(self.found[i].page, self.found[k].page, self.page_bytes) == 0:
                    break
            else:
                self.found[start + n] = self.found[i]
                n += 1
        return n
