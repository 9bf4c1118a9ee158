/* userfaultfd(2) and its ioctls. Included by uffd.pyx only.

   The structures and numbers are those of the kernel's interface (ioctl_userfaultfd(2)); some are newer
   than the headers that a distribution may have, so they are written down here. */

#ifndef KSMCORE_UFFD_H
#define KSMCORE_UFFD_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <linux/ioctl.h>
#include <stdint.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef SYS_userfaultfd
#if defined(__x86_64__)
#define SYS_userfaultfd 323
#else
#define SYS_userfaultfd 282
#endif
#endif

struct ksm_uffd_range { uint64_t start, len; };
struct ksm_uffd_api { uint64_t api, features, ioctls; };
struct ksm_uffd_register { struct ksm_uffd_range range; uint64_t mode, ioctls; };
struct ksm_uffd_protect { struct ksm_uffd_range range; uint64_t mode; };
struct ksm_uffd_move { uint64_t dst, src, len, mode; int64_t moved; };
struct ksm_uffd_copy { uint64_t dst, src, len, mode; int64_t copied; };
struct ksm_uffd_message { uint8_t bytes[32]; };

#define KSM_UFFD_NEW _IO(0xAA, 0x00)  /* on /dev/userfaultfd */
#define KSM_UFFD_API _IOWR(0xAA, 0x3F, struct ksm_uffd_api)
#define KSM_UFFD_REGISTER _IOWR(0xAA, 0x00, struct ksm_uffd_register)
#define KSM_UFFD_UNREGISTER _IOR(0xAA, 0x01, struct ksm_uffd_range)
#define KSM_UFFD_WAKE _IOR(0xAA, 0x02, struct ksm_uffd_range)
#define KSM_UFFD_COPY _IOWR(0xAA, 0x03, struct ksm_uffd_copy)
#define KSM_UFFD_MOVE _IOWR(0xAA, 0x05, struct ksm_uffd_move)
#define KSM_UFFD_PROTECT _IOWR(0xAA, 0x06, struct ksm_uffd_protect)

#define KSM_UFFD_USER_MODE_ONLY 1
/* Write-protection: of anonymous memory (Linux 5.7), of memory files (5.19), of pages that are not there
   yet (6.4). Moving of pages: 6.8. */
#define KSM_UFFD_NEEDED ((1u << 0) | (1u << 12) | (1u << 13))
#define KSM_UFFD_MOVES (1u << 16)
/* Of pages that are not there yet, and asynchronously: 6.7. */
#define KSM_UFFD_ASYNC ((1u << 13) | (1u << 15))

static int ksm_uffd_new(int user_mode_only) {
    int flags = O_CLOEXEC | O_NONBLOCK;
    int fd = (int)syscall(SYS_userfaultfd, flags | (user_mode_only ? KSM_UFFD_USER_MODE_ONLY : 0));
    if (fd < 0 && errno == EPERM && !user_mode_only) {
        int device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
        if (device >= 0) {
            int saved;
            fd = ioctl(device, KSM_UFFD_NEW, (long)flags);
            saved = errno;
            close(device);
            errno = saved;
        } else {
            errno = EPERM;
        }
    }
    return fd;
}

/* A descriptor with the features that a guard needs; *moves: and with those for moving pages, if the
   kernel has them and `*moves` asked for them. A descriptor whose handshake failed is of no more use, so
   every attempt takes a new one. */
static int ksm_uffd_open(int user_mode_only, int *moves) {
    for (;;) {
        int fd = ksm_uffd_new(user_mode_only), saved;
        struct ksm_uffd_api api = {0xAA, KSM_UFFD_NEEDED | (*moves ? KSM_UFFD_MOVES : 0), 0};
        if (fd < 0 || ioctl(fd, KSM_UFFD_API, &api) == 0) return fd;
        saved = errno;
        close(fd);
        if (!*moves) {
            errno = saved;
            return -1;
        }
        *moves = 0;
    }
}

/* A descriptor that never makes anybody wait: a write to a protected page only lifts its protection. */
static int ksm_uffd_open_async(void) {
    int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | KSM_UFFD_USER_MODE_ONLY), saved;
    struct ksm_uffd_api api = {0xAA, KSM_UFFD_ASYNC, 0};
    if (fd < 0 || ioctl(fd, KSM_UFFD_API, &api) == 0) return fd;
    saved = errno;
    close(fd);
    errno = saved;
    return -1;
}

static int ksm_uffd_register(int fd, uintptr_t addr, size_t len, int mode) {
    struct ksm_uffd_register r = {{addr, len}, (uint64_t)mode, 0};
    return ioctl(fd, KSM_UFFD_REGISTER, &r);
}

static int ksm_uffd_unregister(int fd, uintptr_t addr, size_t len) {
    struct ksm_uffd_range r = {addr, len};
    return ioctl(fd, KSM_UFFD_UNREGISTER, &r);
}

static int ksm_uffd_wake(int fd, uintptr_t addr, size_t len) {
    struct ksm_uffd_range r = {addr, len};
    return ioctl(fd, KSM_UFFD_WAKE, &r);
}

static int ksm_uffd_protect(int fd, uintptr_t addr, size_t len, int on) {
    struct ksm_uffd_protect p = {{addr, len}, on ? 1 : 0};
    return ioctl(fd, KSM_UFFD_PROTECT, &p);
}

static int ksm_uffd_move(int fd, uintptr_t target, uintptr_t source, size_t len, size_t *moved) {
    struct ksm_uffd_move m = {target, source, len, 0, 0};
    int rc = ioctl(fd, KSM_UFFD_MOVE, &m);
    *moved = m.moved > 0 ? (size_t)m.moved : 0;
    return rc;
}

static int ksm_uffd_copy(int fd, uintptr_t target, uintptr_t source, size_t len) {
    struct ksm_uffd_copy c = {target, source, len, 0, 0};
    return ioctl(fd, KSM_UFFD_COPY, &c);
}

/* Faults that nobody has counted yet. They go on waiting. */
static unsigned ksm_uffd_count(int fd) {
    struct ksm_uffd_message messages[16];
    ssize_t got = read(fd, messages, sizeof messages);
    return got > 0 ? (unsigned)((size_t)got / sizeof messages[0]) : 0;
}

#endif
