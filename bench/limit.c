/* What cannot be left out by whoever merges pages through a memory file: to read each page once, to write each content
   once, to map that over the pages, which frees their memory. No checksum, no record, no comparison, and nothing that
   keeps writers out: it would lose bytes, and is here for its time only. */

#define _GNU_SOURCE
#include <stdint.h>
#include <sys/mman.h>
#include <unistd.h>

/* Of a stretch of pages. READ: it is read. WRITE: and written to the file, behind what is there, and mapped to that.
   MAP: read, and mapped to what the file has from `offset` on. SCATTERED: the same, page by page in another order.
   REPEAT: read, and mapped to one block of the file, again and again. ZERO: read, and given back. */
enum { READ, WRITE, MAP, SCATTERED, REPEAT, ZERO };

struct part {
    char *addr;
    uint64_t kind, n_pages, offset; /* all in pages */
};

/* A window's worth: what is read is still in the processor's cache when it is written. */
#define SPAN_PAGES 128

static volatile uint64_t limit_sum;

static void read_pages(const char *at, uint64_t n_bytes) {
    const uint64_t *words = (const uint64_t *)at;
    uint64_t sums[8] = {0};
    for (uint64_t i = 0; i < n_bytes / 8; i += 8)
        for (int k = 0; k < 8; k++) sums[k] += words[i + k];
    for (int k = 0; k < 8; k++) limit_sum += sums[k];
}

static int put(char *at, uint64_t n_bytes, int fd, uint64_t offset) {
    return mmap(at, n_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED, fd, (off_t)offset) == MAP_FAILED;
}

/* 0, or -1 where the kernel refuses something. *end: where the file ends, in pages. */
int limit_merge(const struct part *parts, uint64_t n_parts, int fd, uint64_t page, uint64_t block_pages, uint64_t *end) {
    for (uint64_t p = 0; p < n_parts; p++) {
        const struct part *one = &parts[p];
        uint64_t span = one->kind == REPEAT ? block_pages : SPAN_PAGES;
        for (uint64_t done = 0; done < one->n_pages; done += span) {
            uint64_t n = one->n_pages - done < span ? one->n_pages - done : span;
            char *at = one->addr + done * page;
            read_pages(at, n * page);
            if (one->kind == WRITE) {
                if (pwrite(fd, at, n * page, (off_t)(*end * page)) != (ssize_t)(n * page)) return -1;
                if (put(at, n * page, fd, *end * page)) return -1;
                *end += n;
            } else if (one->kind == MAP) {
                if (put(at, n * page, fd, (one->offset + done) * page)) return -1;
            } else if (one->kind == SCATTERED) {
                for (uint64_t i = 0; i < n; i++)
                    if (put(at + i * page, page, fd, (one->offset + (done + i) * 7919 % one->n_pages) * page)) return -1;
            } else if (one->kind == REPEAT) {
                if (put(at, n * page, fd, one->offset * page)) return -1;
            } else if (one->kind == ZERO) {
                if (madvise(at, n * page, MADV_DONTNEED) != 0) return -1;
            }
        }
    }
    return 0;
}
