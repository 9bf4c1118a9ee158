/* System calls that need more than one line of C. Included by _sys.pyx only. */

#ifndef KSMCORE_SYS_H
#define KSMCORE_SYS_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

/* Newer than some C libraries; the values are part of the kernel's interface. */
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif
#ifndef MFD_NOEXEC_SEAL
#define MFD_NOEXEC_SEAL 8U
#endif
#ifndef MFD_CLOEXEC
#define MFD_CLOEXEC 1U
#endif
#ifndef MFD_ALLOW_SEALING
#define MFD_ALLOW_SEALING 2U
#endif
#ifndef F_ADD_SEALS
#define F_ADD_SEALS 1033
#endif
#ifndef F_SEAL_WRITE
#define F_SEAL_WRITE 8
#endif

/* memfd_create as a raw call: C libraries before glibc 2.27 lack the wrapper. Kernels from 6.3 on
   want to be told that nobody will execute the file; older ones refuse the flag. */
static int ksm_memfd(const char *name) {
    int fd = (int)syscall(SYS_memfd_create, name, MFD_CLOEXEC | MFD_ALLOW_SEALING | MFD_NOEXEC_SEAL);
    if (fd < 0 && errno == EINVAL)
        fd = (int)syscall(SYS_memfd_create, name, MFD_CLOEXEC | MFD_ALLOW_SEALING);
    return fd;
}

static void *ksm_map(void *addr, size_t len, int prot, int flags, int fd, off_t offset) {
    void *p = mmap(addr, len, prot, flags, fd, offset);
    return p == MAP_FAILED ? (void *)0 : p;
}

static void *ksm_grow(void *old, size_t old_len, size_t new_len) {
    void *p = mremap(old, old_len, new_len, MREMAP_MAYMOVE);
    return p == MAP_FAILED ? (void *)0 : p;
}

static int ksm_move(void *source, void *target, size_t len) {
    void *p = mremap(source, len, len, MREMAP_MAYMOVE | MREMAP_FIXED, target);
    return p == MAP_FAILED ? -1 : 0;
}

/* Which file a descriptor stands for; 0 and 0 for none. */
static void ksm_identify(int fd, uint64_t *dev, uint64_t *ino) {
    struct stat st;
    *dev = *ino = 0;
    if (fd >= 0 && fstat(fd, &st) == 0) {
        *dev = (uint64_t)st.st_dev;
        *ino = (uint64_t)st.st_ino;
    }
}

static void ksm_pause(void) {
    struct timespec t = {0, 1000000L};
    nanosleep(&t, 0);
}

/* Count the lines of /proc/self/maps, and those that exist because of a file named `needle`: its
   mappings, and what follows one of them without a gap, which was cut off by it. A small buffer on the
   stack and no allocation; a line longer than the buffer is counted once. */
static int ksm_count_maps(int fd, const char *needle, uint32_t *n_maps, uint32_t *n_named) {
    char buf[16384];
    size_t kept = 0;
    uint32_t maps = 0, named = 0;
    unsigned long long last_end = 0;
    int last_named = 0;
    for (;;) {
        ssize_t got = read(fd, buf + kept, sizeof buf - kept);
        if (got < 0) {
            if (errno == EINTR) continue;
            return -1;
        }
        size_t len = kept + (size_t)got, start = 0;
        char *end;
        while ((end = memchr(buf + start, '\n', len - start))) {
            size_t line = (size_t)(end - (buf + start));
            maps++;
            char *dash;
            unsigned long long from = strtoull(buf + start, &dash, 16);
            int is_named = memmem(buf + start, line, needle, strlen(needle)) != NULL;
            named += is_named || (last_named && from == last_end);
            last_named = is_named;
            last_end = *dash == '-' ? strtoull(dash + 1, NULL, 16) : 0;
            start += line + 1;
        }
        if (got == 0) break;
        kept = len - start;
        if (kept == sizeof buf) kept = 0;
        else memmove(buf, buf + start, kept);
    }
    *n_maps = maps;
    *n_named = named;
    return 0;
}

#endif
