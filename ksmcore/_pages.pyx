# cython: language_level=3
"""Bytes of pages: compare them, test them for zero, compute their checksums. Pure functions; nothing is kept.

The scanner and the trees call the C functions of _pages.pxd, without the GIL and on batches of pages. The Python
functions at the end are thin wrappers for tests, benches and inspection. The arithmetic of jhash, and the argument why
its kernels agree, is in _jhash.h; which kernel runs is chosen here, once, when the module is loaded. That of mmh3 is in
_murmur.h.

A page may be written by other threads while it is read here. Every function then still ends and stays within
len_bytes; its answer describes bytes that may already be different, and callers decide under the guard.
"""

cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.exc cimport PyErr_CheckSignals
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcmp, memcpy

from ksmcore._kernel.reader cimport reader_here


cdef extern from "_kernel/reader.h" nogil:
    int ksm_read_compare(ksm_reader* reader, const uint8_t* a, const uint8_t* b, size_t len_bytes)
    int ksm_read_checksum(
        ksm_reader* reader, checksum_pages_t checksum, const uint8_t* const* pages, size_t n_pages,
        size_t len_bytes, uint32_t* digests
    )

cdef extern from "_jhash.h" nogil:
    enum:
        KSM_N_KERNELS
        KSM_JHASH_INITVAL
    uint32_t ksm_jhash(const uint8_t* data, size_t len_bytes, uint32_t initval) noexcept
    checksum_pages_t ksm_kernel(int i) noexcept
    const char* ksm_kernel_names[]

cdef extern from "_murmur.h" nogil:
    uint32_t ksm_murmur(const uint8_t* data, size_t len_bytes) noexcept


# ---- compare and zero test ----

cdef int page_compare(const uint8_t* a, const uint8_t* b, size_t len_bytes) noexcept nogil:
    cdef ksm_reader* reader = reader_here()
    return memcmp(a, b, len_bytes) if reader == NULL else ksm_read_compare(reader, a, b, len_bytes)


cdef void _zero_as_checksum(
    const uint8_t* const* pages, size_t n_pages, size_t len_bytes, uint32_t* digests
) noexcept nogil:
    digests[0] = _is_zero(pages[0], len_bytes)


cdef bint page_is_zero(const uint8_t* page, size_t len_bytes) noexcept nogil:
    cdef ksm_reader* reader = reader_here()
    cdef uint32_t is_zero = False
    if reader == NULL:
        return _is_zero(page, len_bytes)
    return ksm_read_checksum(reader, _zero_as_checksum, &page, 1, len_bytes, &is_zero) == 0 and is_zero


cdef bint _is_zero(const uint8_t* page, size_t len_bytes) noexcept nogil:
    # Most pages that are not zero show it in the first 64 bytes, so they are looked at by so many at a time.
    cdef uint64_t w[8]
    cdef size_t at = 0
    while len_bytes - at >= sizeof(w):
        memcpy(w, page + at, sizeof(w))
        if (w[0] | w[1] | w[2] | w[3] | w[4] | w[5] | w[6] | w[7]) != 0:
            return False
        at += sizeof(w)
    while at < len_bytes:
        if page[at] != 0:
            return False
        at += 1
    return True


# ---- jhash ----

cdef uint32_t jhash_page(const uint8_t* page, size_t len_bytes, uint32_t initval) noexcept nogil:
    return ksm_jhash(page, len_bytes, initval)


cdef checksum_pages_t _find_best_kernel() noexcept nogil:
    # The kernels stand best first, and the last, "scalar", is always there.
    cdef int i
    for i in range(KSM_N_KERNELS - 1):
        if ksm_kernel(i) != NULL:
            return ksm_kernel(i)
    return ksm_kernel(KSM_N_KERNELS - 1)


cdef checksum_pages_t _best_kernel = _find_best_kernel()


cdef void jhash_pages(const uint8_t* const* pages, size_t n_pages, size_t len_bytes, uint32_t* digests) noexcept nogil:
    _best_kernel(pages, n_pages, len_bytes, digests)


# ---- mmh3: the low 32 bits of murmurhash3_x64_128 with seed 0 ----
#
# The package of that name is what it must agree with. To call that would need the GIL, and a pass holds its engine's
# lock, for which another thread may wait inside the arena with the GIL in its hands.

cdef void mmh3_pages(const uint8_t* const* pages, size_t n_pages, size_t len_bytes, uint32_t* digests) noexcept nogil:
    cdef size_t i
    for i in range(n_pages):
        digests[i] = ksm_murmur(pages[i], len_bytes)


# ---- either of them ----

cdef void checksum_safely(
    checksum_pages_t checksum, const uint8_t** pages, size_t n_pages, size_t len_bytes, uint32_t* digests
) noexcept nogil:
    checksum_with(reader_here(), checksum, pages, n_pages, len_bytes, digests)


cdef void checksum_with(
    ksm_reader* reader, checksum_pages_t checksum, const uint8_t** pages, size_t n_pages, size_t len_bytes,
    uint32_t* digests
) noexcept nogil:
    cdef size_t i
    if reader == NULL:
        checksum(pages, n_pages, len_bytes, digests)
    elif ksm_read_checksum(reader, checksum, pages, n_pages, len_bytes, digests):
        for i in range(n_pages):
            if ksm_read_checksum(reader, checksum, pages + i, 1, len_bytes, digests + i):
                digests[i] = 0


cdef checksum_pages_t checksum_by_name(str name) except NULL:
    if name == "jhash":
        return jhash_pages
    if name == "mmh3":
        return mmh3_pages
    raise ValueError(f"unknown checksum {name!r}; valid: 'jhash', 'mmh3'")


# ---- Python wrappers ----

# Pages between two looks for signals, without the GIL: a few milliseconds with pages of 4 KiB.
cdef enum:
    SIGNAL_PAGES = 4096


@cython.final
cdef class _Bytes:
    """The bytes of one buffer argument, exported for as long as this object lives."""

    cdef Py_buffer view
    cdef const uint8_t* data
    cdef size_t len_bytes

    def __cinit__(self, buffer):
        try:
            PyObject_GetBuffer(buffer, &self.view, PyBUF_SIMPLE)
        except BufferError as error:
            raise ValueError(f"the buffer must be contiguous: {error}") from None
        self.data = <const uint8_t*>self.view.buf
        self.len_bytes = <size_t>self.view.len

    def __dealloc__(self):
        PyBuffer_Release(&self.view)  # does nothing when no export was acquired


cdef list _digest_all(_Bytes source, Py_ssize_t page_bytes, checksum_pages_t checksum):
    if page_bytes <= 0:
        raise ValueError(f"page_bytes must be positive, not {page_bytes}")
    cdef size_t len_page = <size_t>page_bytes, n_pages = source.len_bytes // len_page
    if source.len_bytes % len_page != 0:
        raise ValueError(f"the buffer's {source.len_bytes} bytes are not a whole number of pages of {page_bytes} bytes")
    cdef size_t n_now, at = 0, i
    cdef list result = []
    cdef const uint8_t** pages = NULL
    cdef uint32_t* digests = NULL
    try:
        pages = <const uint8_t**>malloc(SIGNAL_PAGES * sizeof(uint8_t*))
        digests = <uint32_t*>malloc(SIGNAL_PAGES * sizeof(uint32_t))
        if pages == NULL or digests == NULL:
            raise MemoryError("no memory for the digests")
        while at < n_pages:
            n_now = min(n_pages - at, <size_t>SIGNAL_PAGES)
            with nogil:
                for i in range(n_now):
                    pages[i] = source.data + (at + i) * len_page
                checksum(pages, n_now, len_page, digests)
            for i in range(n_now):
                result.append(digests[i])
            at += n_now
            PyErr_CheckSignals()
    finally:
        free(pages)
        free(digests)
    return result


def kernels():
    """Names of the jhash kernels that this machine can run, best first. "scalar" is always the last of them."""
    return tuple(ksm_kernel_names[i].decode() for i in range(KSM_N_KERNELS) if ksm_kernel(i) != NULL)


def jhash(buffer, initval=0):
    """lookup3 (`hashlittle`) over all bytes of a buffer, by the scalar reference.

    Args:
        buffer: any contiguous buffer.
        initval: 0 to 2**32 - 1; KSM uses 17.
    """
    if not 0 <= initval <= 0xffffffff:
        raise ValueError(f"initval must be 0 to 2**32 - 1, not {initval}")
    cdef _Bytes source = _Bytes(buffer)
    cdef uint32_t start = initval, digest
    with nogil:
        digest = ksm_jhash(source.data, source.len_bytes, start)
    return digest


def jhash_many(buffer, Py_ssize_t page_bytes, str kernel="auto"):
    """lookup3 with initval 17 over each page of a buffer, by the kernel of that name.

    Args:
        buffer: any contiguous buffer of a whole number of pages.
        page_bytes: length of a page.
        kernel: one of kernels(), or "auto" for the best of them. ValueError when this machine does not have it.
    """
    cdef checksum_pages_t chosen = NULL
    if kernel == "auto":
        chosen = _best_kernel
    else:
        for i in range(KSM_N_KERNELS):
            if ksm_kernel_names[i].decode() == kernel:
                chosen = ksm_kernel(i)
    if chosen == NULL:
        raise ValueError(f"no jhash kernel {kernel!r} on this machine; there are: {', '.join(kernels())}")
    return _digest_all(_Bytes(buffer), page_bytes, chosen)


def checksum_many(buffer, Py_ssize_t page_bytes, str name="jhash"):
    """The checksum of that name ("jhash" or "mmh3") over each page of a buffer, as the scanner computes it."""
    return _digest_all(_Bytes(buffer), page_bytes, checksum_by_name(name))


def compare(a, b):
    """-1, 0 or 1 as `a` is less than, equal to or greater than `b` in the order of bytes. Lengths must be equal."""
    cdef _Bytes left = _Bytes(a), right = _Bytes(b)
    cdef int sign
    if left.len_bytes != right.len_bytes:
        raise ValueError(f"lengths differ: {left.len_bytes} and {right.len_bytes} bytes")
    with nogil:
        sign = page_compare(left.data, right.data, left.len_bytes)
    return (sign > 0) - (sign < 0)


def is_zero(buffer):
    """Whether all bytes of a buffer are zero; true for an empty one."""
    cdef _Bytes source = _Bytes(buffer)
    cdef bint zero
    with nogil:
        zero = page_is_zero(source.data, source.len_bytes)
    return zero
