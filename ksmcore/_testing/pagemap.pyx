"""What the kernel knows of pages, as Python sees it: for tests."""

from libc.errno cimport ENOTTY
from libc.stdint cimport uint8_t, uintptr_t

from ksmcore._kernel.pagemap cimport (
    page_survey, pagemap, pagemap_close, pagemap_open, pagemap_query, pagemap_survey, pagemap_try_scanning,
)
from ksmcore._kernel.syscalls cimport sys_error, sys_error_clear, sys_error_raise, sys_page_bytes


def query(uintptr_t addr, size_t n_pages, bint with_pagemap=True):
    """The flag bytes of `n_pages` pages from `addr` on. OSError when the kernel refuses the range."""
    cdef pagemap pm
    cdef sys_error err
    cdef int rc
    cdef bytearray flags = bytearray(n_pages)
    sys_error_clear(&err)
    if n_pages == 0:
        return b""
    pagemap_open(&pm, sys_page_bytes(), with_pagemap)
    rc = pagemap_query(&pm, addr, n_pages, <uint8_t*><char*>flags, &err)
    pagemap_close(&pm)
    if rc != 0:
        sys_error_raise(&err, "page query")
    return bytes(flags)


def survey(uintptr_t addr, size_t n_pages, bint watched):
    """Of `n_pages` pages from `addr` on the ranges that are absent or, if `watched`, were written since they
    were protected: (first page, pages, flags) with page numbers from 0 on.

    Raises OSError when the kernel refuses, or has no PAGEMAP_SCAN.
    """
    cdef pagemap pm
    cdef page_survey found
    cdef sys_error err
    cdef size_t page_bytes = sys_page_bytes(), k
    cdef uintptr_t cursor = addr, end = addr + n_pages * page_bytes
    cdef int rc = 0
    sys_error_clear(&err)
    pagemap_open(&pm, page_bytes, True)
    pagemap_try_scanning(&pm)
    if not pm.scans:
        pagemap_close(&pm)
        raise OSError(ENOTTY, "this kernel has no PAGEMAP_SCAN")
    ranges = []
    while cursor < end and rc == 0:
        rc = pagemap_survey(&pm, cursor, end, end, watched, True, &found, &err)
        for k in range(found.n_ranges if rc == 0 else 0):
            first = (found.ranges[k].addr - addr) // page_bytes
            ranges.append((first, found.ranges[k].n_pages, found.ranges[k].flags))
        cursor = found.next
    pagemap_close(&pm)
    if rc != 0:
        sys_error_raise(&err, "survey")
    return ranges
