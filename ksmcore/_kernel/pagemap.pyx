"""What the kernel knows of a page: present, still the shared one, swapped, written since it was looked at.

/proc/self/pagemap has 8 bytes for each virtual page; the bits used here are shown to every process
about itself (Documentation/admin-guide/mm/pagemap.rst), the page frame numbers are not needed. Where
the file cannot be opened, or not be read at the moment, mincore tells which pages are resident, and the caller must
compare bytes to learn whether a shared page was written.

A survey leaves out the pages that need no look. Where the kernel has PAGEMAP_SCAN it passes them over by
itself: 0.9 ms for 1 GiB of 4 KiB pages that were not written, 0.05 ms where huge pages map it. Telling
pages of files from others costs 6 ms more, because each page's descriptor is read; so what was written is
looked for first, and asked about then.
"""

from libc.errno cimport ENOTTY
from libc.stdint cimport uint8_t, uint64_t, uintptr_t

from ksmcore._kernel.syscalls cimport (
    CALL_PAGEMAP_SCAN, sys_check, sys_drop, sys_error, sys_error_clear, sys_injected, sys_is_kept, sys_keep,
    sys_mincore, sys_open_read, sys_read_at,
)

cdef extern from "_kernel/pagemap.h" nogil:
    ctypedef struct ksm_page_range:
        uint64_t start, end, categories
    enum:
        KSM_PAGE_FILE, KSM_PAGE_PRESENT, KSM_PAGE_SWAPPED, KSM_PAGE_ZERO_PFN, KSM_PAGE_HUGE
    ctypedef enum files_wanted "ksm_files":
        FILES_UNTOLD "KSM_FILES_UNTOLD"
        FILES_TOLD "KSM_FILES_TOLD"
        FILES_LEFT_OUT "KSM_FILES_LEFT_OUT"
    int ksm_scan(
        int fd, uintptr_t start, uintptr_t end, bint only_written, files_wanted files, ksm_page_range* ranges,
        size_t max_pages
    )
    int ksm_scan_private(int fd, uintptr_t start, uintptr_t end, ksm_page_range* there)
    int ksm_scan_written(int fd, uintptr_t start, uintptr_t end, ksm_page_range* there)
    int ksm_scan_hole(int fd, uintptr_t start, uintptr_t end, ksm_page_range* there)
    int ksm_scan_protect(int fd, uintptr_t start, uintptr_t end)

cdef enum:
    ENTRIES = 512            # read at once; 4 KiB on the stack
    HUGE_BYTES = 0x200000    # of a huge page that is one span; where pages are larger, huge ones are not told
    BIT_EXCLUSIVE = 56
    BIT_FILE = 61
    BIT_SWAPPED = 62
    BIT_PRESENT = 63


cdef int pagemap_open(pagemap* pm, size_t page_bytes, bint allowed) noexcept nogil:
    """Returns errno where the file cannot be opened. `allowed` False: pretend that it cannot be."""
    cdef sys_error err
    sys_error_clear(&err)
    pm.page_bytes = page_bytes
    pm.allowed = allowed
    sys_keep(&pm.file, sys_open_read(b"/proc/self/pagemap", &err) if allowed else -1)
    pm.scans = False
    return err.code


cdef void pagemap_reopen(pagemap* pm) noexcept nogil:
    """Where it could not be opened, or the program has closed it, there may be a descriptor for it by now."""
    if pm.allowed and not sys_is_kept(&pm.file):
        pagemap_open(pm, pm.page_bytes, True)
        pagemap_try_scanning(pm)


cdef void pagemap_try_scanning(pagemap* pm) noexcept nogil:
    """Let surveys use PAGEMAP_SCAN if the kernel knows it: it is asked of no pages."""
    cdef sys_error ignored
    sys_error_clear(&ignored)
    pm.scans = pm.file.fd >= 0 and _scan(pm, 0, 0, False, FILES_UNTOLD, NULL, 0, &ignored) >= 0


cdef void pagemap_close(pagemap* pm) noexcept nogil:
    sys_drop(&pm.file)


cdef int pagemap_query(
    pagemap* pm, uintptr_t addr, size_t n_pages, uint8_t* flags, sys_error* err
) noexcept nogil:
    """Fill one byte of enum page_flag bits for each page from `addr` on (HUGE is never told). Faults nothing
    in."""
    cdef sys_error ignored
    cdef size_t i
    if pm.file.fd >= 0 and not sys_is_kept(&pm.file):
        pagemap_open(pm, pm.page_bytes, True)
    sys_error_clear(&ignored)
    if pm.file.fd >= 0 and _read_entries(pm, addr, n_pages, flags, &ignored) == 0:
        return 0
    if sys_mincore(addr, n_pages * pm.page_bytes, flags, err) != 0:
        return -1
    for i in range(n_pages):
        flags[i] = PAGE_PRESENT | PAGE_UNSURE if flags[i] & 1 else PAGE_UNSURE
    return 0


cdef int _read_entries(
    pagemap* pm, uintptr_t addr, size_t n_pages, uint8_t* flags, sys_error* err
) noexcept nogil:
    cdef uint64_t entries[ENTRIES]
    cdef uint64_t entry
    cdef size_t done = 0, n, i
    cdef uint8_t flag
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
                    flag |= PAGE_OWNED
            elif entry >> BIT_SWAPPED & 1 and not entry >> BIT_FILE & 1:
                # With the file bit it is a page of the store that the kernel is moving: still mapped.
                flag = PAGE_SWAPPED
            flags[done + i] = flag
        done += n
    return 0


# ---- surveys ----------------------------------------------------------------------------------------

cdef int _scan(
    pagemap* pm, uintptr_t addr, uintptr_t end, bint only_written, files_wanted files, ksm_page_range* ranges,
    size_t max_pages, sys_error* err
) noexcept nogil:
    cdef int n
    if sys_injected(CALL_PAGEMAP_SCAN, addr, end - addr, err):
        return -1
    n = ksm_scan(pm.file.fd, addr, end, only_written, files, ranges, max_pages)
    if sys_check(n < 0, CALL_PAGEMAP_SCAN, addr, end - addr, err):
        return -1
    return n


cdef uint8_t _flags_of(const pagemap* pm, uint64_t categories) noexcept nogil:
    cdef uint8_t flags = 0
    if categories & KSM_PAGE_PRESENT:
        flags = PAGE_PRESENT
        if categories & KSM_PAGE_FILE:
            flags |= PAGE_OF_FILE
        elif not categories & KSM_PAGE_ZERO_PFN:
            flags |= PAGE_OWNED
        if categories & KSM_PAGE_HUGE and pm.page_bytes == <size_t>HUGE_BYTES // SPAN_PAGES:
            flags |= PAGE_HUGE
    elif categories & KSM_PAGE_SWAPPED and not categories & KSM_PAGE_FILE:
        # With the file bit it is a page of the store that the kernel is moving: still mapped.
        flags = PAGE_SWAPPED
    return flags


cdef inline uintptr_t _span_end(const pagemap* pm, uintptr_t addr) noexcept nogil:
    cdef uintptr_t span_bytes = <uintptr_t>SPAN_PAGES * pm.page_bytes
    return addr - addr % span_bytes + span_bytes


cdef int _survey_by_scan(
    pagemap* pm, uintptr_t addr, uintptr_t end, uintptr_t limit, bint watched, bint with_files, page_survey* survey,
    sys_error* err
) noexcept nogil:
    cdef ksm_page_range found[<int>SPAN_PAGES]
    cdef page_range* put
    cdef files_wanted files = FILES_TOLD if with_files else FILES_LEFT_OUT
    cdef int n = 1, i
    survey.next = end
    # The first page, and then the span that it lies in: what comes after that would be looked for again.
    if watched:
        n = _scan(pm, addr, end, True, FILES_UNTOLD, found, 1, err)
        addr = found[0].start if n > 0 else addr
    if n > 0:
        n = _scan(pm, addr, end, watched, files, found, 1, err)
    if n <= 0:
        return n
    addr = found[0].start
    survey.next = min(end, _span_end(pm, addr))
    n = _scan(pm, addr, survey.next, watched, files, found, SPAN_PAGES, err)
    for i in range(n):
        put = &survey.ranges[i]
        put.addr = found[i].start
        put.n_pages = (found[i].end - found[i].start) // pm.page_bytes
        put.flags = _flags_of(pm, found[i].categories)
    survey.n_ranges = max(n, 0)
    if n == 1 and survey.ranges[0].flags == 0 and survey.ranges[0].n_pages == (survey.next - addr) // pm.page_bytes:
        # Nothing is there. The rest of the hole costs the kernel next to nothing.
        survey.next = max(pagemap_hole_end(pm, addr, limit), survey.next)
        survey.ranges[0].n_pages = (survey.next - addr) // pm.page_bytes
    return min(n, 0)


cdef uintptr_t pagemap_hole_end(pagemap* pm, uintptr_t addr, uintptr_t end) noexcept nogil:
    """The first page in [addr, end) that is there, or was swapped out, or `end`; `addr` where it cannot be told."""
    cdef ksm_page_range there
    cdef int n = ksm_scan_hole(pm.file.fd, addr, end, &there) if pm.scans else -1
    return end if n == 0 else there.start if n > 0 else addr


cdef int pagemap_survey(
    pagemap* pm, uintptr_t addr, uintptr_t end, uintptr_t limit, bint watched, bint with_files, page_survey* survey,
    sys_error* err
) noexcept nogil:
    """The first pages in [addr, end) that need a look, by ranges, of one span at most; survey.next tells where to
    go on, survey.n_ranges is 0 when there are none before that. A span of which nothing is there goes on to the end of
    the hole, or to `limit`, which may lie far behind `end`.

    No look need pages that are present and were not written since they were protected, if the range is
    `watched`; and pages of files, if not `with_files`. Where PAGEMAP_SCAN is refused, for now or for good, the other
    file is read, and no page counts as watched. -1 with *err when the kernel does not answer at all.
    """
    cdef uint8_t flags[<int>SPAN_PAGES]
    cdef size_t i, n_pages
    cdef sys_error ignored
    survey.n_ranges = 0
    if pm.file.fd >= 0 and not sys_is_kept(&pm.file):
        pagemap_reopen(pm)
    sys_error_clear(&ignored)
    if pm.scans and _survey_by_scan(pm, addr, end, limit, watched, with_files, survey, &ignored) == 0:
        return 0
    survey.n_ranges = 0
    survey.next = min(end, _span_end(pm, addr))
    n_pages = (survey.next - addr) // pm.page_bytes
    if pagemap_query(pm, addr, n_pages, flags, err) != 0:
        return -1
    for i in range(n_pages):
        if flags[i] & PAGE_OF_FILE and not with_files:
            continue
        if (
            survey.n_ranges == 0 or survey.ranges[survey.n_ranges - 1].flags != flags[i]
            or survey.ranges[survey.n_ranges - 1].addr
            + survey.ranges[survey.n_ranges - 1].n_pages * pm.page_bytes != addr + i * pm.page_bytes
        ):
            survey.ranges[survey.n_ranges].addr = addr + i * pm.page_bytes
            survey.ranges[survey.n_ranges].n_pages = 0
            survey.ranges[survey.n_ranges].flags = flags[i]
            survey.n_ranges += 1
        survey.ranges[survey.n_ranges - 1].n_pages += 1
    return 0


cdef bint pagemap_is_unwritten(pagemap* pm, uintptr_t addr) noexcept nogil:
    """Is this page of a watched range there, and unwritten since it was protected? False if that is not known."""
    return pagemap_first(pm, addr, addr + pm.page_bytes, ASK_GONE) != addr


cdef uintptr_t pagemap_first(pagemap* pm, uintptr_t addr, uintptr_t end, page_question asked) noexcept nogil:
    """The first such page in [addr, end); `end` where there is none, `addr` where it cannot be told."""
    cdef ksm_page_range found
    cdef sys_error ignored
    cdef int n
    sys_error_clear(&ignored)
    if not pm.scans or not sys_is_kept(&pm.file):
        return addr
    if asked == ASK_GONE:
        n = _scan(pm, addr, end, True, FILES_UNTOLD, &found, 1, &ignored)
    elif sys_injected(CALL_PAGEMAP_SCAN, addr, end - addr, &ignored):
        n = -1
    elif asked == ASK_PRIVATE:
        n = ksm_scan_private(pm.file.fd, addr, end, &found)
    else:
        n = ksm_scan_written(pm.file.fd, addr, end, &found)
    return end if n == 0 else found.start if n > 0 else addr


cdef int pagemap_protect(pagemap* pm, uintptr_t addr, size_t n_pages, sys_error* err) noexcept nogil:
    """From here on a survey of a watched range shows these pages only once they are written. -1 with *err
    when they cannot be protected, all or in part; EPERM: they are not watched by a tracker."""
    cdef size_t len_bytes = n_pages * pm.page_bytes
    if sys_injected(CALL_PAGEMAP_SCAN, addr, len_bytes, err):
        return -1
    return sys_check(
        ksm_scan_protect(pm.file.fd, addr, addr + len_bytes) < 0, CALL_PAGEMAP_SCAN, addr, len_bytes, err
    )
