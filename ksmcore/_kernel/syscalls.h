/* System calls that need more than one line of C. Included by syscalls.pyx only. */

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
#include <sys/sysmacros.h>
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

#endif
