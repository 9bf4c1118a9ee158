"""Huge pages that nobody asked for.

Where transparent huge pages are set to `always`, the first write to new memory brings 2 MiB of it, zeros but for the
page that was written. What a small array did not touch, and what the arena has not handed out, would be looked at,
given back, and counted as saved, though no program ever wanted it: nothing tells such zeros from those that were
written. So memory for arrays of less than HUGE_BYTES takes none, as where the setting is `madvise`, the kernel's own
default. Larger arrays have what the kernel gives them.
"""

from libc.stdint cimport uintptr_t
from libc.string cimport strstr

from ksmcore._kernel.syscalls cimport (
    ADVISE_NOHUGEPAGE, sys_advise, sys_error, sys_error_clear, sys_read_text,
)
from ksmcore._records.regions cimport REGION_NOHUGEPAGE


cdef bint _come_unasked() noexcept nogil:
    """Asked each time: an administrator may change it at any moment."""
    cdef char modes[128]
    sys_read_text(b"/sys/kernel/mm/transparent_hugepage/enabled", modes, sizeof(modes))
    return strstr(modes, b"[always]") != NULL


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
