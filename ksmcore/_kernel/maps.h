/* The process's mappings: /proc/self/maps as text, and its ioctl. The types are for whoever visits, the rest for
   maps.pyx. */

#ifndef KSMCORE_MAPS_H
#define KSMCORE_MAPS_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <linux/ioctl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

enum { KSM_VMA_READ = 1, KSM_VMA_WRITE = 2, KSM_VMA_EXEC = 4, KSM_VMA_SHARED = 8 };

typedef struct {
    uintptr_t start, end;
    uint64_t offset, dev_major, dev_minor, inode; /* of the file; inode 0: none */
    int flags;
    int is_store; /* the file is named as the stores of all engines are; not known by ksm_vma_at */
} ksm_vma;

typedef void (*ksm_vma_visit)(const ksm_vma *vma, void *context);

#define KSM_STORE_NAME "/memfd:ksmcore-store"

/* One line: "start-end rwxp offset major:minor inode   path". */
static inline int ksm_vma_parse(char *line, size_t len, ksm_vma *vma) {
    char *at = line;
    line[len] = 0;
    vma->start = strtoull(at, &at, 16);
    if (*at++ != '-') return -1;
    vma->end = strtoull(at, &at, 16);
    if (len < (size_t)(at - line) + 6) return -1;
    at++;
    vma->flags = (at[0] == 'r' ? KSM_VMA_READ : 0) | (at[1] == 'w' ? KSM_VMA_WRITE : 0)
               | (at[2] == 'x' ? KSM_VMA_EXEC : 0) | (at[3] == 's' ? KSM_VMA_SHARED : 0);
    vma->offset = strtoull(at + 4, &at, 16);
    vma->dev_major = strtoull(at, &at, 16);
    vma->dev_minor = *at == ':' ? strtoull(at + 1, &at, 16) : 0;
    vma->inode = strtoull(at, &at, 10);
    while (*at == ' ') at++;
    vma->is_store = strncmp(at, KSM_STORE_NAME, sizeof KSM_STORE_NAME - 1) == 0;
    return 0;
}

/* Visit all mappings, in the order of their addresses. A small buffer on the stack and no allocation;
   of a line longer than the buffer only the beginning is looked at. -1 and errno when it cannot be read. */
static inline int ksm_vma_each(int fd, ksm_vma_visit visit, void *context) {
    char buf[16384];
    size_t kept = 0;
    int skip = 0; /* inside a line whose beginning has been visited */
    if (lseek(fd, 0, SEEK_SET) != 0) return -1;
    for (;;) {
        ssize_t got = read(fd, buf + kept, sizeof buf - 1 - kept);
        if (got < 0) {
            if (errno == EINTR) continue;
            return -1;
        }
        size_t len = kept + (size_t)got, start = 0;
        char *end;
        ksm_vma vma;
        while ((end = memchr(buf + start, '\n', len - start))) {
            size_t line = (size_t)(end - (buf + start));
            if (!skip && ksm_vma_parse(buf + start, line, &vma) == 0) visit(&vma, context);
            skip = 0;
            start += line + 1;
        }
        if (got == 0) return 0;
        kept = len - start;
        if (kept == sizeof buf - 1) {
            if (!skip && ksm_vma_parse(buf, kept, &vma) == 0) visit(&vma, context);
            skip = 1;
            kept = 0;
        } else {
            memmove(buf, buf + start, kept);
        }
    }
}

/* PROCMAP_QUERY (Linux 6.11). The structure is that of the kernel's interface. */
struct ksm_procmap_query {
    uint64_t size, query_flags, query_addr, vma_start, vma_end, vma_flags, vma_page_size, vma_offset, inode;
    uint32_t dev_major, dev_minor, vma_name_size, build_id_size;
    uint64_t vma_name_addr, build_id_addr;
};
#define KSM_PROCMAP_QUERY _IOWR('f', 17, struct ksm_procmap_query)
#define KSM_PROCMAP_OR_NEXT 0x10

/* The mapping at `addr`, or the next one. -1: there is none, or the kernel does not know the question, or somebody has
   answered in its place. */
static inline int ksm_vma_at(int fd, uintptr_t addr, ksm_vma *vma) {
    struct ksm_procmap_query q;
    memset(&q, 0, sizeof q);
    q.size = sizeof q;
    q.query_flags = KSM_PROCMAP_OR_NEXT;
    q.query_addr = addr;
    if (ioctl(fd, KSM_PROCMAP_QUERY, &q) != 0 || q.vma_end <= addr) return -1;
    vma->start = q.vma_start;
    vma->end = q.vma_end;
    vma->offset = q.vma_offset;
    vma->dev_major = q.dev_major;
    vma->dev_minor = q.dev_minor;
    vma->inode = q.inode;
    vma->flags = (int)(q.vma_flags & 15);
    vma->is_store = 0;
    return 0;
}

#endif
