"""What the kernel knows of a page; see _pagemap.pyx."""

from libc.stdint cimport uint8_t, uintptr_t

from ksmcore._sys cimport sys_error, sys_file


# Bits of one page's answer.
cdef enum page_flag:
    PAGE_PRESENT = 1         # has memory that can be read without a fault that allocates
    PAGE_OF_FILE = 2         # PRESENT and still a page of a file: not copied by a write
    PAGE_SWAPPED = 4         # a private page, swapped out or being moved by the kernel
    PAGE_EXCLUSIVE = 8       # PRESENT and mapped only here; the zero page never is
    PAGE_UNSURE = 16         # only residency is known (no pagemap): OF_FILE and EXCLUSIVE mean nothing


ctypedef struct pagemap:
    sys_file file            # /proc/self/pagemap; none: residency only
    size_t page_bytes


cdef void pagemap_open(pagemap* pm, size_t page_bytes, bint allowed) noexcept nogil
cdef void pagemap_close(pagemap* pm) noexcept nogil
cdef int pagemap_query(
    pagemap* pm, uintptr_t addr, size_t n_pages, uint8_t* flags, sys_error* err
) noexcept nogil
