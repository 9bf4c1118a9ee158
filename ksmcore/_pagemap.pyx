"""What the kernel knows of a page: present, still the shared one, swapped, mapped here only.

Called by: _scan, _walk. Calls: _sys.

/proc/self/pagemap has 8 bytes for each virtual page; the bits used here are shown to every process
about itself (Documentation/admin-guide/mm/pagemap.rst), the page frame numbers are not needed. Where
the file cannot be read, mincore tells which pages are resident, and the caller must compare bytes to
learn whether a shared page was written.
"""

from libc.stdint cimport uint8_t, uint64_t, uintptr_t

from ksmcore._sys cimport (
    error_clear, error_raise, sys_drop, sys_error, sys_is_kept, sys_keep, sys_mincore, sys_open_read,
    sys_read_at,
)

cdef enum:
    ENTRIES = 512            # read at once; 4 KiB on the stack
    BIT_EXCLUSIVE = 56
    BIT_FILE = 61
    BIT_SWAPPED = 62
    BIT_PRESENT = 63


cdef void pagemap_open(pagemap* pm, size_t page_bytes, bint allowed) noexcept nogil:
    """`allowed` False: pretend that the file cannot be read."""
    cdef sys_error ignored
    error_clear(&ignored)
    pm.page_bytes = page_bytes
    sys_keep(&pm.file, sys_open_read(b"/proc/self/pagemap", &ignored) if allowed else -1)


cdef void pagemap_close(pagemap* pm) noexcept nogil:
    sys_drop(&pm.file)


cdef int pagemap_query(
    pagemap* pm, uintptr_t addr, size_t n_pages, uint8_t* flags, sys_error* err
) noexcept nogil:
    """Fill one byte of enum page_flag bits for each page from `addr` on. Faults nothing in."""
    cdef uint64_t entries[ENTRIES]
    cdef uint64_t entry
    cdef size_t done = 0, n, i
    cdef uint8_t flag
    if pm.file.fd >= 0 and not sys_is_kept(&pm.file):
        pagemap_open(pm, pm.page_bytes, True)
    if pm.file.fd < 0:
        if sys_mincore(addr, n_pages * pm.page_bytes, flags, err) != 0:
            return -1
        for i in range(n_pages):
            flags[i] = PAGE_PRESENT | PAGE_UNSURE if flags[i] & 1 else PAGE_UNSURE
        return 0
    while done < n_pages:
        n = min(n_pages - done, <size_t>ENTRIES)
        if sys_read_at(
            pm.file.fd, entries, n * sizeof(uint64_t),
            <long long>((addr // pm.page_bytes + done) * sizeof(uint64_t)), err
        ) != 0:
            return -1
        for i in range(n):
            entry = entries[i]
            flag = 0
            if entry >> BIT_PRESENT & 1:
                flag = PAGE_PRESENT
                if entry >> BIT_FILE & 1:
                    flag |= PAGE_OF_FILE
                if entry >> BIT_EXCLUSIVE & 1:
                    flag |= PAGE_EXCLUSIVE
            elif entry >> BIT_SWAPPED & 1 and not entry >> BIT_FILE & 1:
                # With the file bit it is a page of the store that the kernel is moving: still mapped.
                flag = PAGE_SWAPPED
            flags[done + i] = flag
        done += n
    return 0


def query(uintptr_t addr, size_t n_pages, bint with_pagemap=True):
    """The flag bytes of `n_pages` pages from `addr` on; for tests and page maps.

    Raises OSError when the kernel refuses the range.
    """
    from ksmcore._sys import page_bytes
    cdef pagemap pm
    cdef sys_error err
    cdef int rc
    error_clear(&err)
    result = bytearray(n_pages)
    if n_pages == 0:
        return bytes(result)
    cdef uint8_t[::1] flags = result
    cdef size_t bytes_per_page = page_bytes()
    with nogil:
        pagemap_open(&pm, bytes_per_page, with_pagemap)
        rc = pagemap_query(&pm, addr, n_pages, &flags[0], &err)
        pagemap_close(&pm)
    if rc != 0:
        error_raise(&err, "page query")
    return bytes(result)
