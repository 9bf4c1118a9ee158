/* PAGEMAP_SCAN (Linux 6.7), an ioctl of /proc/self/pagemap. Included by pagemap.pyx only.

   The structures and numbers are those of the kernel's interface
   (Documentation/admin-guide/mm/pagemap.rst); they are newer than the headers that a distribution may
   have, so they are written down here. */

#ifndef KSMCORE_PAGEMAP_H
#define KSMCORE_PAGEMAP_H

#include <errno.h>
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

/* Pages of files, beside others: not told from them (that costs more), told, left out. */
typedef enum { KSM_FILES_UNTOLD, KSM_FILES_TOLD, KSM_FILES_LEFT_OUT } ksm_files;

/* Ask: for ranges of up to `max_pages` pages; returns how many ranges. The rest of *a says which, 0: not so. */
static int ksm_scan_call(int fd, uintptr_t start, uintptr_t end, ksm_page_range *ranges, size_t max_pages,
                         struct ksm_scan_args *a) {
    a->size = sizeof *a;
    a->start = start;
    a->end = end;
    a->vec = (uintptr_t)ranges;
    a->vec_len = max_pages;
    a->max_pages = max_pages;
    a->walk_end = (uint64_t)-1;
    int n = ioctl(fd, KSM_PAGEMAP_SCAN, a);
    if (n < 0 || a->walk_end != (uint64_t)-1) return n;
    errno = ENOSYS; /* answered by somebody who has not looked */
    return -1;
}

/* `only_written`: those that were written, or are not there. */
static int ksm_scan(int fd, uintptr_t start, uintptr_t end, int only_written, ksm_files files,
                    ksm_page_range *ranges, size_t max_pages) {
    struct ksm_scan_args a = {0};
    if (only_written) {
        a.any_of = KSM_PAGE_WRITTEN | KSM_PAGE_PRESENT;
        a.inverted = KSM_PAGE_PRESENT;
    }
    if (files == KSM_FILES_LEFT_OUT) {
        a.all_of = KSM_PAGE_FILE;
        a.inverted |= KSM_PAGE_FILE;
    }
    a.returned = KSM_PAGE_PRESENT | KSM_PAGE_SWAPPED | KSM_PAGE_ZERO_PFN | KSM_PAGE_HUGE
               | (files == KSM_FILES_UNTOLD ? 0 : KSM_PAGE_FILE);
    return ksm_scan_call(fd, start, end, ranges, max_pages, &a);
}

/* The first page that is there, or was swapped out: 1 and *there; 0: there is none. */
static int ksm_scan_hole(int fd, uintptr_t start, uintptr_t end, ksm_page_range *there) {
    struct ksm_scan_args a = {0};
    a.any_of = a.returned = KSM_PAGE_PRESENT | KSM_PAGE_SWAPPED;
    return ksm_scan_call(fd, start, end, there, 1, &a);
}

/* The first page that was written: 1 and *there; 0: there is none. Asked for exactly this, the kernel takes a path of
   its own, in two fifths of the time; pages that are not there count as written, but not all of them: where there is
   no page table, say. */
static int ksm_scan_written(int fd, uintptr_t start, uintptr_t end, ksm_page_range *there) {
    struct ksm_scan_args a = {0};
    a.all_of = a.returned = KSM_PAGE_WRITTEN;
    return ksm_scan_call(fd, start, end, there, 1, &a);
}

/* The first page that is no page of a file, there or swapped out, and was written, or that nobody watches. */
static int ksm_scan_private(int fd, uintptr_t start, uintptr_t end, ksm_page_range *there) {
    struct ksm_scan_args a = {0};
    a.all_of = KSM_PAGE_WRITTEN | KSM_PAGE_FILE;
    a.inverted = KSM_PAGE_FILE;
    a.any_of = a.returned = KSM_PAGE_PRESENT | KSM_PAGE_SWAPPED;
    return ksm_scan_call(fd, start, end, there, 1, &a);
}

/* From here on a write to these pages is seen. EPERM: they are not all watched by asynchronous userfaultfd. */
static int ksm_scan_protect(int fd, uintptr_t start, uintptr_t end) {
    struct ksm_scan_args a = {0};
    a.flags = KSM_SCAN_PROTECT | KSM_SCAN_ONLY_ASYNC;
    a.all_of = KSM_PAGE_PRESENT | KSM_PAGE_WRITTEN;
    return ksm_scan_call(fd, start, end, (ksm_page_range *)0, 0, &a);
}

#endif
