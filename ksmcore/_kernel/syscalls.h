/* System calls that need more than one line of C. Included by syscalls.pyx only. */

#ifndef KSMCORE_SYS_H
#define KSMCORE_SYS_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <time.h>
#include <unistd.h>

/* Newer than some C libraries; the values are part of the kernel's interface. */
#ifndef MADV_COLD
#define MADV_COLD 20
#endif
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

#ifndef MADV_DONTDUMP
#define MADV_DONTDUMP 16
#endif

/* memfd_create as a raw call: C libraries before glibc 2.27 lack the wrapper. Kernels from 6.3 on want to be told that
   nobody will execute the file, older ones refuse the flag, and a filter may refuse any. */
static int ksm_memfd(const char *name) {
    int fd = (int)syscall(SYS_memfd_create, name, MFD_CLOEXEC | MFD_ALLOW_SEALING | MFD_NOEXEC_SEAL);
    if (fd < 0) fd = (int)syscall(SYS_memfd_create, name, MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd < 0) fd = (int)syscall(SYS_memfd_create, name, MFD_CLOEXEC);
    return fd;
}

/* RLIMIT_FSIZE: a call that would make a file larger fails with EFBIG, and sends the thread SIGXFSZ, which ends the
   process unless somebody cares for it. Between begin and end it is blocked, and what the call has raised is taken
   away; not one that waited there before. */
typedef struct {
    sigset_t before;
    int was_pending;
} ksm_limited;

static void ksm_limited_begin(ksm_limited *limited) {
    sigset_t only, pending;
    sigemptyset(&only);
    sigaddset(&only, SIGXFSZ);
    pthread_sigmask(SIG_BLOCK, &only, &limited->before);
    limited->was_pending = sigismember(&limited->before, SIGXFSZ) == 1 && sigpending(&pending) == 0
                        && sigismember(&pending, SIGXFSZ) == 1;
}

/* Leaves errno as it is. */
static void ksm_limited_end(const ksm_limited *limited, int failed) {
    int saved = errno;
    if (failed && saved == EFBIG && !limited->was_pending) {
        struct timespec at_once = {0, 0};
        sigset_t only;
        sigemptyset(&only);
        sigaddset(&only, SIGXFSZ);
        sigtimedwait(&only, 0, &at_once);
    }
    pthread_sigmask(SIG_SETMASK, &limited->before, 0);
    errno = saved;
}

static size_t ksm_file_limit(void) {
    struct rlimit limit;
    return getrlimit(RLIMIT_FSIZE, &limit) == 0 && limit.rlim_cur < SIZE_MAX ? (size_t)limit.rlim_cur : SIZE_MAX;
}

static int ksm_truncate(int fd, off_t len) {
    ksm_limited limited;
    int rc;
    ksm_limited_begin(&limited);
    rc = ftruncate(fd, len);
    ksm_limited_end(&limited, rc != 0);
    return rc;
}

static ssize_t ksm_write_at(int fd, const void *source, size_t len, off_t offset) {
    ksm_limited limited;
    ssize_t n;
    ksm_limited_begin(&limited);
    n = pwrite(fd, source, len, offset);
    ksm_limited_end(&limited, n < 0);
    return n;
}

static void *ksm_map(void *addr, size_t len, int prot, int flags, int fd, off_t offset) {
    void *p = mmap(addr, len, prot, flags, fd, offset);
    return p == MAP_FAILED ? (void *)0 : p;
}

/* A read-only view of a file, for this process alone: neither a child nor a core file gets it. In a process that has
   all new memory locked it is taken out of that before it can be read, or the kernel would fill all of it. Advice that
   is refused costs no correctness. */
static void *ksm_map_view(size_t len, int fd, off_t offset) {
    void *p = mmap(0, len, PROT_NONE, MAP_PRIVATE, fd, offset);
    if (p == MAP_FAILED) return (void *)0;
    munlock(p, len);
    madvise(p, len, MADV_DONTFORK);
    madvise(p, len, MADV_DONTDUMP);
    if (mprotect(p, len, PROT_READ) != 0) {
        int saved = errno;
        munmap(p, len);
        errno = saved;
        return (void *)0;
    }
    return p;
}

/* Is memory locked from birth (mlockall(2) with MCL_FUTURE)? Of such memory alone the kernel will not take anything
   back, and a mapping that cannot be accessed holds none. */
static int ksm_locks_future(size_t page_bytes) {
    void *p = mmap(0, page_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    int locked;
    if (p == MAP_FAILED) return errno == EAGAIN;
    locked = madvise(p, page_bytes, MADV_DONTNEED) != 0 && errno == EINVAL;
    munmap(p, page_bytes);
    return locked;
}

static void *ksm_grow(void *old, size_t old_len, size_t new_len) {
    void *p = mremap(old, old_len, new_len, MREMAP_MAYMOVE);
    return p == MAP_FAILED ? (void *)0 : p;
}

static int ksm_move(void *source, void *target, size_t len) {
    void *p = mremap(source, len, len, MREMAP_MAYMOVE | MREMAP_FIXED, target);
    return p == MAP_FAILED ? -1 : 0;
}

/* Shorter where a signal comes. */
static void ksm_sleep_ns(uint64_t ns) {
    struct timespec t = {(time_t)(ns / 1000000000u), (long)(ns % 1000000000u)};
    nanosleep(&t, 0);
}

static int ksm_own_thread(void) { return (int)syscall(SYS_gettid); }

/* No signal is sent. Where a sandbox forbids to ask, there is none. */
static int ksm_has_thread(int number) { return syscall(SYS_tgkill, getpid(), number, 0) == 0; }

#endif
