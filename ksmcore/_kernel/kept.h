/* The list of all descriptors that ksmcore has open. They stand for the memory of the process that opened them, so a
   forked child closes them before anything else runs in it. Included by syscalls.pyx only.

   The lock is held from before a descriptor is opened until it stands in the list, and a fork waits for it: so no
   child is born with one that is not listed. Signals are blocked meanwhile, since a handler on this thread could
   fork. Under the lock nothing is taken from malloc, whose lock the thread may hold that a handler has interrupted.

   The program may have closed a descriptor, and got its number for a file of its own. So each stands beside the file
   that it was opened for, and is closed only if it still is that. */

#ifndef KSMCORE_KEPT_H
#define KSMCORE_KEPT_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "_kernel/signals.h"

typedef struct {
    uint64_t dev, ino; /* ino 0: an entry that is free */
    int fd;
} kept_fd;

typedef struct kept_block {
    struct kept_block *next;
    kept_fd all[168]; /* a page with the link */
} kept_block;

static kept_block kept_first;
static pthread_mutex_t kept_mutex = PTHREAD_MUTEX_INITIALIZER;
static sigset_t kept_mask;

static void kept_lock(void) {
    sigset_t before;
    ksm_block_signals(&before);
    pthread_mutex_lock(&kept_mutex);
    kept_mask = before;
}

/* Leaves errno as it is. */
static void kept_unlock(void) {
    sigset_t before = kept_mask;
    int saved = errno;
    pthread_mutex_unlock(&kept_mutex);
    ksm_restore_signals(&before);
    errno = saved;
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

/* The entry of a number, or a free one; NULL without memory for more. */
static kept_fd *kept_entry(int fd) {
    kept_fd *free_one = 0;
    kept_block *block = &kept_first;
    for (;;) {
        for (size_t i = 0; i < sizeof block->all / sizeof block->all[0]; i++) {
            kept_fd *one = &block->all[i];
            if (one->ino && one->fd == fd) return one;
            if (!one->ino && !free_one) free_one = one;
        }
        if (!block->next) break;
        block = block->next;
    }
    if (!free_one) {
        void *more = mmap(0, sizeof(kept_block), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (more == MAP_FAILED) return 0;
        block->next = more;
        free_one = &block->next->all[0];
    }
    return free_one;
}

/* Before something is opened: have the numbers of the standard streams be taken. A program that has closed one puts a
   file there at some time (dup2), over whatever was opened meanwhile; to close that by its number would close the
   program's. So /dev/null lies there until then, and is never closed here. */
static void kept_take_streams(void) {
    for (int fd = 0; fd <= STDERR_FILENO; fd++) {
        int taken = fcntl(fd, F_GETFD) < 0 ? open("/dev/null", O_RDWR | O_CLOEXEC) : -1;
        if (taken > STDERR_FILENO) close(taken);
    }
}

/* Another number for what has got one of those all the same: closed just now, or there is no /dev/null. */
static int kept_lifted(int fd) {
    uint64_t dev, ino, dev_below, ino_below;
    int lifted = fd < 0 || fd > STDERR_FILENO ? -1 : fcntl(fd, F_DUPFD_CLOEXEC, STDERR_FILENO + 1);
    if (lifted < 0) return fd;
    ksm_identify(lifted, &dev, &ino);
    ksm_identify(fd, &dev_below, &ino_below);
    if (dev == dev_below && ino == ino_below) close(fd);
    return lifted;
}

/* Lock, for what is to be opened. */
static void kept_opening(void) {
    kept_lock();
    kept_take_streams();
}

/* Enter what was just opened under the lock, and release that; -1 and errno where it was not opened, or cannot be
   entered, and so is closed. */
static int kept_entered(int fd) {
    if (fd >= 0) {
        kept_fd *one = kept_entry(fd);
        if (one) {
            ksm_identify(fd, &one->dev, &one->ino);
            one->fd = fd;
        }
        if (!one || !one->ino) {
            close(fd);
            errno = ENOMEM;
            fd = -1;
        }
    }
    kept_unlock();
    return fd;
}

/* The same, for what nobody has the number of yet: returns that. */
static int kept_opened(int fd) { return kept_entered(kept_lifted(fd)); }

/* Close a descriptor that stands in the list, if it still is what it was, and take it out. */
static void kept_close(int fd) {
    uint64_t dev, ino;
    kept_fd *one;
    kept_lock();
    one = kept_entry(fd);
    if (one && one->ino) {
        ksm_identify(fd, &dev, &ino);
        /* Unchecked: it is gone whatever close returns, and there is nothing to flush. */
        if (dev == one->dev && ino == one->ino) close(fd);
        one->ino = 0;
    }
    kept_unlock();
}

/* In a forked child: only functions that a signal handler may call. */
static void kept_child(void) {
    sigset_t before = kept_mask;
    uint64_t dev, ino;
    for (kept_block *block = &kept_first; block; block = block->next) {
        for (size_t i = 0; i < sizeof block->all / sizeof block->all[0]; i++) {
            kept_fd *one = &block->all[i];
            if (!one->ino) continue;
            ksm_identify(one->fd, &dev, &ino);
            if (dev == one->dev && ino == one->ino) close(one->fd);
            one->ino = 0;
        }
    }
    pthread_mutex_init(&kept_mutex, 0);
    ksm_restore_signals(&before);
}

#endif
