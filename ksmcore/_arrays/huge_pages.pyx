"""Huge pages that nobody asked for.

Where transparent huge pages are set to `always`, the first write to new memory brings 2 MiB of it, zeros but for the
page that was written. What a small array did not touch, and what the arena has not handed out, would be looked at,
given back, and counted as saved, though no program ever wanted it: nothing tells such zeros from those that were
written. So memory for arrays of less than HUGE_BYTES takes none, as where the setting is `madvise`, the kernel's own
default. Larger arrays have what the kernel gives them.
"""

from libc.stdint cimport uint64_t, uintptr_t
from libc.string cimport strstr

from ksmcore._kernel.syscalls cimport (
    ADVISE_NOHUGEPAGE, sys_advise, sys_error, sys_error_clear, sys_now_ns, sys_read_text,
)
from ksmcore._records.regions cimport REGION_NOHUGEPAGE

cdef extern from *:
    int __ATOMIC_RELAXED
    uint64_t load "__atomic_load_n"(uint64_t* word, int order) nogil
    void store "__atomic_store_n"(uint64_t* word, uint64_t value, int order) nogil

cdef enum:
    GOOD_NS = 1_000_000_000

cdef uint64_t _told = 0


cdef bint _come_unasked() noexcept nogil:
    """An administrator may change it at any moment, so an answer is good for a second."""
    cdef char modes[128]
    cdef uint64_t now_ns = sys_now_ns(), told = load(&_told, __ATOMIC_RELAXED)
    if told == 0 or now_ns - told >= <uint64_t>GOOD_NS:
        sys_read_text(b"/sys/kernel/mm/transparent_hugepage/enabled", modes, sizeof(modes))
        # When, and in its last bit what: one word, so that no thread sees half of it.
        told = now_ns & ~<uint64_t>1 | (strstr(modes, b"[always]") != NULL)
        store(&_told, told, __ATOMIC_RELAXED)
    return told & 1


cdef int huge_pages_refuse(uintptr_t addr, size_t len_bytes) noexcept nogil:
    """Have new memory get no huge pages, where they come unasked. The flags (enum region_flag) of its region, so
    that what is mapped over it later gets none either."""
    cdef sys_error ignored
    if not _come_unasked():
        return 0
    sys_error_clear(&ignored)
    # Unchecked: memory that gets them all the same is right, and no more than counted too high.
    sys_advise(addr, len_bytes, ADVISE_NOHUGEPAGE, &ignored)
    return REGION_NOHUGEPAGE
