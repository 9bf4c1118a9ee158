/* The process's mappings: /proc/self/maps and smaps as text, and an ioctl. The types are for whoever visits, the rest
   for maps.pyx. */

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
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { KSM_VMA_READ = 1, KSM_VMA_WRITE = 2, KSM_VMA_EXEC = 4, KSM_VMA_SHARED = 8 };

typedef struct {
    uintptr_t start, end;
    uint64_t offset, dev_major, dev_minor, inode; /* of the file; inode 0: none */
    int flags;
    int is_store; /* the file is named as the stores of all engines are; not known by ksm_vma_at */
    int traits;   /* ksm_traits_each only */
} ksm_vma;

/* What the program has advised or decided about a mapping. KEEP: a new mapping can be given it as well, by
   madvise(2) or otherwise. The low bits, and the place of the protection key, are those of enum region_flag. */
enum {
    KSM_KEEP_DONTFORK = 1, KSM_KEEP_DONTDUMP = 2, KSM_KEEP_HUGEPAGE = 4, KSM_KEEP_NOHUGEPAGE = 8,
    KSM_KEEP_SEQUENTIAL = 32, KSM_KEEP_RANDOM = 64, KSM_KEEP_MERGEABLE = 128, KSM_KEEP_LOCKED = 256,
    KSM_BARRED = 512,         /* what merged pages would lose, or what cannot be mapped over */
    KSM_WATCHED = 1024,       /* by a userfaultfd, for write-protection: may be our own tracker's */
    KSM_WATCHED_ELSE = 2048,  /* for anything else, which is another's */
    KSM_KEY_SHIFT = 12, KSM_KEY_MASK = 15 << 12
};

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

/* Hand out a text line by line until `take` returns other than 0. A small buffer on the stack and no allocation; of a
   line longer than the buffer only the beginning is looked at. -1 and errno when it cannot be read. */
typedef int (*ksm_take_line)(char *line, size_t len, void *context);

static inline int ksm_each_line(int fd, ksm_take_line take, void *context) {
    char buf[16384];
    size_t kept = 0;
    int skip = 0; /* inside a line whose beginning has been taken */
    if (lseek(fd, 0, SEEK_SET) != 0) return -1;
    for (;;) {
        ssize_t got = read(fd, buf + kept, sizeof buf - 1 - kept);
        if (got < 0) {
            if (errno == EINTR) continue;
            return -1;
        }
        size_t len = kept + (size_t)got, start = 0;
        char *end;
        while ((end = memchr(buf + start, '\n', len - start))) {
            size_t line = (size_t)(end - (buf + start));
            if (!skip && take(buf + start, line, context)) return 0;
            skip = 0;
            start += line + 1;
        }
        if (got == 0) return 0;
        kept = len - start;
        if (kept == sizeof buf - 1) {
            if (!skip && take(buf, kept, context)) return 0;
            skip = 1;
            kept = 0;
        } else {
            memmove(buf, buf + start, kept);
        }
    }
}

/* Of the text of maps or smaps: the mapping whose lines are being read. */
typedef struct {
    ksm_vma_visit visit;
    void *context;
    uintptr_t end;    /* nothing from here on is of interest */
    ksm_vma vma;
    int is_begun;
} ksm_vma_reading;

static inline int ksm_take_vma(char *line, size_t len, void *context) {
    ksm_vma_reading *r = context;
    if (ksm_vma_parse(line, len, &r->vma) == 0) r->visit(&r->vma, r->context);
    return 0;
}

/* Visit all mappings, in the order of their addresses. */
static inline int ksm_vma_each(int fd, ksm_vma_visit visit, void *context) {
    ksm_vma_reading r = {visit, context, 0, {0}, 0};
    return ksm_each_line(fd, ksm_take_vma, &r);
}

/* "VmFlags: rd wr mr mw ..." */
static inline int ksm_flags_parse(const char *at) {
    static const struct { char code[3]; int trait; } known[] = {
        {"dc", KSM_KEEP_DONTFORK}, {"dd", KSM_KEEP_DONTDUMP}, {"hg", KSM_KEEP_HUGEPAGE}, {"nh", KSM_KEEP_NOHUGEPAGE},
        {"sr", KSM_KEEP_SEQUENTIAL}, {"rr", KSM_KEEP_RANDOM}, {"mg", KSM_KEEP_MERGEABLE},
        {"lo", KSM_KEEP_LOCKED | KSM_BARRED},
        {"io", KSM_BARRED}, {"pf", KSM_BARRED}, {"mm", KSM_BARRED}, {"ss", KSM_BARRED}, {"gd", KSM_BARRED},
        {"ht", KSM_BARRED}, {"wf", KSM_BARRED}, {"dp", KSM_BARRED}, {"sl", KSM_BARRED}, {"mt", KSM_BARRED},
        {"uw", KSM_WATCHED}, {"um", KSM_WATCHED_ELSE}, {"ui", KSM_WATCHED_ELSE},
    };
    int traits = 0;
    for (; *at; at++)
        for (size_t i = 0; at[-1] == ' ' && i < sizeof known / sizeof known[0]; i++)
            if (at[0] == known[i].code[0] && at[1] == known[i].code[1]) traits |= known[i].trait;
    return traits;
}

static inline int ksm_take_traits(char *line, size_t len, void *context) {
    ksm_vma_reading *r = context;
    line[len] = 0;
    if (line[0] >= 'A' && line[0] <= 'Z') {
        if (strncmp(line, "VmFlags:", 8) == 0) r->vma.traits |= ksm_flags_parse(line + 8);
        else if (strncmp(line, "ProtectionKey:", 14) == 0) r->vma.traits |= (atoi(line + 14) & 15) << KSM_KEY_SHIFT;
        return 0;
    }
    if (r->is_begun) r->visit(&r->vma, r->context);
    r->is_begun = ksm_vma_parse(line, len, &r->vma) == 0;
    r->vma.traits = 0;
    return r->is_begun && r->vma.start >= r->end;
}

/* The same with traits, from smaps; up to `end`, for it costs much more: the kernel walks all page tables. */
static inline int ksm_traits_each(int fd, uintptr_t end, ksm_vma_visit visit, void *context) {
    ksm_vma_reading r = {visit, context, end, {0}, 0};
    if (ksm_each_line(fd, ksm_take_traits, &r) != 0) return -1;
    if (r.is_begun && r.vma.start < end) visit(&r.vma, context);
    return 0;
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
    vma->is_store = vma->traits = 0;
    return 0;
}

/* NUMA: the policy that a mapping has for itself. It can be given to another mapping; the numbers are the kernel's. */
typedef struct {
    int mode; /* 0: none */
    unsigned long nodes[16];
} ksm_policy;

static inline int ksm_policy_at(uintptr_t addr, ksm_policy *policy) {
#ifdef SYS_get_mempolicy
    memset(policy, 0, sizeof *policy);
    return (int)syscall(SYS_get_mempolicy, &policy->mode, policy->nodes, 8 * sizeof policy->nodes, addr, 2ul);
#else
    (void)addr, (void)policy;
    errno = ENOSYS;
    return -1;
#endif
}

static inline int ksm_policy_set(uintptr_t addr, size_t len, const ksm_policy *policy) {
#ifdef SYS_mbind
    return (int)syscall(SYS_mbind, addr, len, policy->mode, policy->nodes, 8 * sizeof policy->nodes, 0ul);
#else
    (void)addr, (void)len, (void)policy;
    errno = ENOSYS;
    return -1;
#endif
}

static inline int ksm_key_set(uintptr_t addr, size_t len, int key) {
#ifdef SYS_pkey_mprotect
    return (int)syscall(SYS_pkey_mprotect, addr, len, PROT_READ | PROT_WRITE, key);
#else
    (void)addr, (void)len, (void)key;
    errno = ENOSYS;
    return -1;
#endif
}

#endif
