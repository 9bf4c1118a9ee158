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
#include <sys/mman.h>
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

/* Where the system call is refused, by whatever errno a filter has chosen, the device may be there. */
static int ksm_uffd_new(int user_mode_only) {
    int flags = O_CLOEXEC | O_NONBLOCK | (user_mode_only ? KSM_UFFD_USER_MODE_ONLY : 0);
    int fd = (int)syscall(SYS_userfaultfd, flags);
    if (fd < 0) {
        int saved = errno, device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
        if (device >= 0) {
            fd = ioctl(device, KSM_UFFD_NEW, (long)flags);
            close(device);
        }
        errno = saved;
    }
    return fd;
}

/* The handshake; it must name what the descriptor can do, or nobody has answered it. */
static int ksm_uffd_shake(int fd, uint64_t features) {
    struct ksm_uffd_api api = {0xAA, features, 0};
    if (ioctl(fd, KSM_UFFD_API, &api) != 0) return -1;
    if (api.ioctls) return 0;
    errno = ENOSYS;
    return -1;
}

static int ksm_uffd_register(int fd, uintptr_t addr, size_t len, int mode) {
    struct ksm_uffd_register r = {{addr, len}, (uint64_t)mode, 0};
    if (ioctl(fd, KSM_UFFD_REGISTER, &r) != 0) return -1;
    if (r.ioctls) return 0;
    errno = ENOSYS;
    return -1;
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

/* Can pages be protected with it? A filter may refuse what comes after the handshake. -1 and errno: they cannot. */
static int ksm_uffd_try(int fd) {
    size_t len = (size_t)sysconf(_SC_PAGESIZE);
    void *page = mmap(0, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    uintptr_t addr = (uintptr_t)page;
    int failed, saved;
    if (page == MAP_FAILED) return -1;
    failed = ksm_uffd_register(fd, addr, len, 2) != 0 || ksm_uffd_protect(fd, addr, len, 1) != 0
          || ksm_uffd_wake(fd, addr, len) != 0 || ksm_uffd_unregister(fd, addr, len) != 0;
    saved = errno;
    munmap(page, len);
    errno = saved;
    return failed ? -1 : 0;
}

/* Can pages be moved with it? -1 and errno where there is no memory to try it. */
static int ksm_uffd_try_moving(int fd) {
    size_t len = (size_t)sysconf(_SC_PAGESIZE), moved;
    char *pages = mmap(0, 2 * len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    int moves, saved;
    if (pages == MAP_FAILED) return -1;
    pages[0] = 1;
    moves = ksm_uffd_register(fd, (uintptr_t)pages, 2 * len, 2) == 0
         && ksm_uffd_move(fd, (uintptr_t)pages + len, (uintptr_t)pages, len, &moved) == 0;
    saved = errno;
    munmap(pages, 2 * len);
    errno = saved;
    return moves ? 1 : saved == ENOMEM || saved == EAGAIN ? -1 : 0;
}

/* A descriptor whose handshake failed is of no more use, so every attempt takes a new one. */
static int ksm_uffd_open_once(int user_mode_only, int *moves) {
    for (;;) {
        int fd = ksm_uffd_new(user_mode_only), saved;
        if (fd < 0) return -1;
        if (ksm_uffd_shake(fd, KSM_UFFD_NEEDED | (*moves ? KSM_UFFD_MOVES : 0)) == 0) {
            if (ksm_uffd_try(fd) == 0 && (!*moves || (*moves = ksm_uffd_try_moving(fd)) >= 0)) return fd;
            *moves = 0;
        }
        saved = errno;
        close(fd);
        errno = saved;
        if (!*moves) return -1;
        *moves = 0;
    }
}

/* Is what this errno says there is none of to be had just now? */
static int ksm_uffd_can_be_had(int code) {
    void *page;
    int fd;
    if (code == EMFILE || code == ENFILE) {
        fd = open("/", O_RDONLY | O_CLOEXEC);
        if (fd >= 0) close(fd);
        return fd >= 0;
    }
    if (code != ENOMEM) return code == EAGAIN || code == EINTR;
    page = mmap(0, (size_t)sysconf(_SC_PAGESIZE), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (page != MAP_FAILED) munmap(page, (size_t)sysconf(_SC_PAGESIZE));
    return page != MAP_FAILED;
}

/* A descriptor with the features that a guard needs; *moves: and with those for moving pages, if the kernel has them
   and `*moves` asked for them. Who answers again and again that there is no memory, or no descriptor, where there is,
   is a filter that refuses, and errno says so. */
static int ksm_uffd_open(int user_mode_only, int *moves) {
    int wanted = *moves, saved;
    for (int tries = 0; tries < 5; tries++) {
        int fd;
        *moves = wanted;
        fd = ksm_uffd_open_once(user_mode_only, moves);
        if (fd >= 0) return fd;
        saved = errno;
        if (!ksm_uffd_can_be_had(saved)) {
            errno = saved;
            return -1;
        }
    }
    errno = EPERM;
    return -1;
}

/* A descriptor that never makes anybody wait: a write to a protected page only lifts its protection. */
static int ksm_uffd_open_async(void) {
    int fd = ksm_uffd_new(1), saved;
    if (fd < 0 || ksm_uffd_shake(fd, KSM_UFFD_ASYNC) == 0) return fd;
    saved = errno;
    close(fd);
    errno = saved;
    return -1;
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
