"""What other Cython modules may call in _pages: pure functions over bytes, none of which needs the GIL.

Pointers need no alignment. Every pointed-at page must stay readable for len_bytes during the call; nothing is kept.
"""

from libc.stdint cimport uint8_t, uint32_t

from ksmcore._kernel.reader cimport ksm_reader

# One checksum over a batch: digests[i] receives the checksum of the len_bytes bytes at pages[i], for i < n_pages.
ctypedef void (*checksum_pages_t)(const uint8_t* const* pages, size_t n_pages, size_t len_bytes,
                                  uint32_t* digests) noexcept nogil

# memcmp order: negative, zero or positive.
cdef int page_compare(const uint8_t* a, const uint8_t* b, size_t len_bytes) noexcept nogil

# What reads below is safe against pages that go away, between reader_enter and reader_leave: such a page
# differs from every other, is not zero, and has the checksum 0.

# True when all len_bytes bytes are zero (so also for no bytes); leaves at the first that is not, or soon after.
cdef bint page_is_zero(const uint8_t* page, size_t len_bytes) noexcept nogil

# lookup3 over any number of bytes: the scalar reference.
cdef uint32_t jhash_page(const uint8_t* page, size_t len_bytes, uint32_t initval) noexcept nogil

# lookup3 with initval 17 over each page, by the best kernel of this machine; a checksum_pages_t.
cdef void jhash_pages(const uint8_t* const* pages, size_t n_pages, size_t len_bytes, uint32_t* digests) noexcept nogil

# checksum(pages, n_pages, len_bytes, digests), safe against pages that go away.
cdef void checksum_safely(
    checksum_pages_t checksum, const uint8_t** pages, size_t n_pages, size_t len_bytes, uint32_t* digests
) noexcept nogil

# The same for a thread that has borrowed its reader.
cdef void checksum_with(
    ksm_reader* reader, checksum_pages_t checksum, const uint8_t** pages, size_t n_pages, size_t len_bytes,
    uint32_t* digests
) noexcept nogil

# "jhash" or "mmh3"; ValueError naming the valid ones. Needs the GIL; what it returns does not.
cdef checksum_pages_t checksum_by_name(str name) except NULL
