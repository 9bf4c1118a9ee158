"""What the kernel knows of a page; see pagemap.pyx."""

from libc.stdint cimport uint8_t, uintptr_t

from ksmcore._kernel.syscalls cimport sys_error, sys_file


# Bits of one page's answer.
cdef enum page_flag:
    PAGE_PRESENT = 1         # has memory that can be read without a fault that allocates
    PAGE_OF_FILE = 2         # PRESENT and still a page of a file: not copied by a write
    PAGE_SWAPPED = 4         # a private page, swapped out or being moved by the kernel
    PAGE_OWNED = 8           # PRESENT and surely not the kernel's zero page
    PAGE_UNSURE = 16         # only residency is known (no pagemap): OF_FILE and OWNED mean nothing
    PAGE_HUGE = 32           # in a huge page that is mapped as one; told by surveys only

# Which pages to look for; pages that nobody watches count as written. What one asks for is found by asking for any
# union of it with others, too.
cdef enum page_question:
    ASK_WRITTEN = 0          # written; in less than half the time, but pages that are not there may be missed
    ASK_PRIVATE = 1          # written, and no pages of a file
    ASK_GONE = 2             # written, or not there

cdef enum:
    SPAN_PAGES = 512         # a span, what a survey answers at most: so many pages, aligned; a huge page is one


ctypedef struct pagemap:
    sys_file file            # /proc/self/pagemap; none: residency only
    bint allowed             # to be opened
    bint scans               # the kernel finds ranges of pages by itself (PAGEMAP_SCAN)
    size_t page_bytes


# Neighbouring pages with the same flags.
ctypedef struct page_range:
    uintptr_t addr
    size_t n_pages
    uint8_t flags

ctypedef struct page_survey:
    size_t n_ranges
    uintptr_t next           # where to go on
    page_range ranges[<int>SPAN_PAGES]


cdef int pagemap_open(pagemap* pm, size_t page_bytes, bint allowed) noexcept nogil
cdef void pagemap_try_scanning(pagemap* pm) noexcept nogil
cdef void pagemap_reopen(pagemap* pm) noexcept nogil
cdef void pagemap_close(pagemap* pm) noexcept nogil
cdef int pagemap_query(
    pagemap* pm, uintptr_t addr, size_t n_pages, uint8_t* flags, sys_error* err
) noexcept nogil
cdef uintptr_t pagemap_hole_end(pagemap* pm, uintptr_t addr, uintptr_t end) noexcept nogil
cdef int pagemap_survey(
    pagemap* pm, uintptr_t addr, uintptr_t end, uintptr_t limit, bint watched, bint with_files, page_survey* survey,
    sys_error* err
) noexcept nogil
cdef bint pagemap_is_unwritten(pagemap* pm, uintptr_t addr) noexcept nogil
cdef uintptr_t pagemap_first(pagemap* pm, uintptr_t addr, uintptr_t end, page_question asked) noexcept nogil
cdef int pagemap_protect(pagemap* pm, uintptr_t addr, size_t n_pages, sys_error* err) noexcept nogil
