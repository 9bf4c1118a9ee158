/* PAGEMAP_SCAN (Linux 6.7), an ioctl of /proc/self/pagemap. Included by _pagemap.pyx only.

   The structures and numbers are those of the kernel's interface
   (Documentation/admin-guide/mm/pagemap.rst); they are newer than the headers that a distribution may
   have, so they are written down here. */

#ifndef KSMCORE_PAGEMAP_H
#define KSMCORE_PAGEMAP_H

#include <linux/ioctl.h>
#include <stdint.h>
#include <string.h>
#include <sys/ioctl.h>

typedef struct {
    uint64_t start, end, categories;
} ksm_page_range;

struct ksm_scan_args {
    uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
    uint64_t inverted, all_of, any_of, returned;
};

#define KSM_PAGEMAP_SCAN _IOWR('f', 16, struct ksm_scan_args)

enum { KSM_SCAN_PROTECT = 1, KSM_SCAN_ONLY_ASYNC = 2 };
enum {
    KSM_PAGE_WRITTEN = 2, KSM_PAGE_FILE = 4, KSM_PAGE_PRESENT = 8, KSM_PAGE_SWAPPED = 16,
    KSM_PAGE_ZERO_PFN = 32, KSM_PAGE_HUGE = 64
};

/* Ranges of pages, up to `max_pages` pages; returns how many ranges, and where the walk ended. `only_written`:
   those that were written, or are not there. Those of files are told from others if `tell_files`, and then
   left out if not `with_files`. */
static int ksm_scan(int fd, uintptr_t start, uintptr_t end, int only_written, int with_files, int tell_files,
                    ksm_page_range *ranges, size_t n_ranges, size_t max_pages, uintptr_t *walk_end) {
    struct ksm_scan_args a;
    int rc;
    memset(&a, 0, sizeof a);
    a.size = sizeof a;
    a.start = start;
    a.end = end;
    a.vec = (uintptr_t)ranges;
    a.vec_len = n_ranges;
    a.max_pages = max_pages;
    if (only_written) {
        a.any_of = KSM_PAGE_WRITTEN | KSM_PAGE_PRESENT;
        a.inverted = KSM_PAGE_PRESENT;
    }
    if (tell_files && !with_files) {
        a.all_of = KSM_PAGE_FILE;
        a.inverted |= KSM_PAGE_FILE;
    }
    a.returned = KSM_PAGE_PRESENT | KSM_PAGE_SWAPPED | KSM_PAGE_ZERO_PFN | KSM_PAGE_HUGE
               | (tell_files ? KSM_PAGE_FILE : 0);
    rc = ioctl(fd, KSM_PAGEMAP_SCAN, &a);
    *walk_end = a.walk_end;
    return rc;
}

/* From here on a write to these pages is seen. EPERM: they are not all watched by asynchronous userfaultfd. */
static int ksm_scan_protect(int fd, uintptr_t start, uintptr_t end) {
    struct ksm_scan_args a;
    memset(&a, 0, sizeof a);
    a.size = sizeof a;
    a.flags = KSM_SCAN_PROTECT | KSM_SCAN_ONLY_ASYNC;
    a.start = start;
    a.end = end;
    a.all_of = KSM_PAGE_PRESENT | KSM_PAGE_WRITTEN;
    return ioctl(fd, KSM_PAGEMAP_SCAN, &a);
}

#endif
