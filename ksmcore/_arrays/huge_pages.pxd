"""Which memory for arrays is to have huge pages; see huge_pages.pyx."""

from libc.stdint cimport uintptr_t

cdef enum:
    HUGE_BYTES = 4 << 20       # arrays of so much and more are worth huge pages, as they are to NumPy

cdef int huge_pages_refuse(uintptr_t addr, size_t len_bytes) noexcept nogil
