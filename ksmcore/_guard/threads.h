/* What /proc tells of the other threads of this process: when our handler may be taken out, and whether one of
   them blocks SIGSEGV. Asked outside of handlers. Nothing here allocates or takes a lock. */

#ifndef KSMCORE_THREADS_H
#define KSMCORE_THREADS_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define THREADS_DIRECTORY "/proc/self/task"

/* The names of their directories, one after the other. */
typedef struct {
    int dir;           /* THREADS_DIRECTORY, open for reading */
    long at, end;      /* of what is read from `entries`; end < 0: that failed */
    char self[16];
    uint64_t entries[256];
} threads_walk;

/* As getdents64(2) has it. */
typedef struct {
    uint64_t ino;
    int64_t off;
    unsigned short len_bytes;
    unsigned char type;
    char name[];
} threads_entry;

static void threads_begin(threads_walk *walk, int dir) {
    walk->dir = dir;
    walk->at = walk->end = 0;
    snprintf(walk->self, sizeof walk->self, "%ld", (long)syscall(SYS_gettid));
}

/* The next other thread; NULL at the end, or where the kernel fails to answer (walk->end < 0). */
static const char *threads_next(threads_walk *walk) {
    for (;;) {
        if (walk->at >= walk->end) {
            walk->at = 0;
            walk->end = syscall(SYS_getdents64, walk->dir, walk->entries, sizeof walk->entries);
            if (walk->end <= 0) return (const char *)0;
        }
        threads_entry *entry = (threads_entry *)((char *)walk->entries + walk->at);
        walk->at += entry->len_bytes;
        if (entry->name[0] != '.' && strcmp(entry->name, walk->self)) return entry->name;
    }
}

/* The first bytes of a file of a thread, as text; returns 0 when the thread is gone, -1 when it cannot be told. */
static int threads_read(int dir, const char *tid, const char *file, char *text, size_t len_bytes) {
    char path[64];
    int fd;
    ssize_t n;
    snprintf(path, sizeof path, "%s/%s", tid, file);
    fd = openat(dir, path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return errno == ENOENT ? 0 : -1;
    n = read(fd, text, len_bytes - 1);
    if (n < 0 && errno == ESRCH) n = 0;
    close(fd);
    if (n > 0) text[n] = 0;
    return n < 0 ? -1 : n > 0;
}

/* The part of a thread's `stat` from its state on: the name before may hold spaces and brackets. */
static const char *threads_state(int dir, const char *tid, char *text, size_t len_bytes, int *known) {
    const char *bracket;
    *known = threads_read(dir, tid, "stat", text, len_bytes);
    bracket = *known > 0 ? strrchr(text, ')') : (const char *)0;
    if (*known > 0 && (!bracket || !bracket[1] || !bracket[2])) *known = -1;
    return *known > 0 ? bracket + 2 : (const char *)0;
}

/* ---- when the handler may be taken out ---- */

/* Processor time of thread `tid` in ns, and whether it is off the processor of its own will
   (asleep in the kernel, stopped, or gone; not held by a debugger, which sees the signal before
   the handler does), from /proc. -1 when it cannot be told. */
static int threads_time(int dir, const char *tid, uint64_t *ran_ns, int *asleep) {
    char text[512];
    int known;
    const char *state = threads_state(dir, tid, text, sizeof text, &known);
    *asleep = known == 0 || (state && strchr("SDIZXT", *state) != 0);
    if (known <= 0) return known;
    known = threads_read(dir, tid, "schedstat", text, sizeof text);
    if (known == 0) *asleep = 1;
    else if (known > 0) *ran_ns = strtoull(text, 0, 10);
    return known < 0 ? -1 : 0;
}

/* A thread that faulted in the last window may still be on its way to the handler: runnable, in
   the kernel, not yet given its signal. Return 1 once that can be true of no thread: each has been
   seen asleep, or has used THREADS_RAN_NS of processor time since (the way to the handler takes
   microseconds and never sleeps after the fault was judged). The kernel brings the processor time
   up to date at a tick or a switch only, so the first change seen may be of time used before; it
   is from that change on that the thread must have run. 0: not within `limit_ms`, or /proc does
   not tell. */
#define THREADS_RAN_NS 100000u
#define THREADS_MOST 256
static int threads_quiesce(int dir, int limit_ms) {
    struct { char tid[16]; uint64_t ran_ns; int changed; } busy[THREADS_MOST];
    int n_busy = 0, asleep;
    uint64_t ran_ns = 0;
    const char *tid;
    threads_walk walk;
    threads_begin(&walk, dir);
    while ((tid = threads_next(&walk))) {
        if (threads_time(dir, tid, &ran_ns, &asleep) != 0) return 0;
        if (asleep) continue;
        if (n_busy == THREADS_MOST || strlen(tid) > 15) return 0;
        strcpy(busy[n_busy].tid, tid);
        busy[n_busy].changed = 0;
        busy[n_busy++].ran_ns = ran_ns;
    }
    if (walk.end < 0) return 0;
    while (n_busy > 0 && limit_ms-- > 0) {
        struct timespec pause = {0, 1000000L};
        nanosleep(&pause, 0);
        for (int i = n_busy - 1; i >= 0; i--) {
            if (threads_time(dir, busy[i].tid, &ran_ns, &asleep) != 0) continue;
            if (asleep || (busy[i].changed && ran_ns - busy[i].ran_ns >= THREADS_RAN_NS)) {
                busy[i] = busy[--n_busy];
            } else if (!busy[i].changed && ran_ns != busy[i].ran_ns) {
                busy[i].changed = 1;
                busy[i].ran_ns = ran_ns;
            }
        }
    }
    return n_busy == 0;
}

/* ---- who blocks SIGSEGV ---- */

typedef enum {
    THREADS_CLEAR,
    THREADS_BLOCKED,   /* one of them blocks it */
    THREADS_UNKNOWN    /* /proc does not tell */
} threads_found;

/* How many threads there are; 0 when that cannot be told. Costs a tenth of looking at one of them. */
static uint32_t threads_count(void) {
    struct stat st;
    return stat(THREADS_DIRECTORY, &st) == 0 && st.st_nlink > 2 ? (uint32_t)st.st_nlink - 2 : 0;
}

/* Names of threads that block all signals, and write into no memory but their own: ZeroMQ's, of which every
   Jupyter kernel has some. `_kernel/procfs.py` knows them too. */
static const char *const threads_known[] = {"ZMQbg/"};

/* This thread has just been seen to block SIGSEGV: is that no matter? It does not any more; or it is one of those
   above; or it also blocks the two signals that the C library keeps for itself, as no program can through
   the library. Then it is a moment in which the library makes a thread or a process, or a thread of the kernel's
   (io_uring): neither writes into memory of the program's. */
static int threads_is_harmless(int dir, const char *tid) {
    char text[4096];
    const char *line;
    uint64_t mask;
    int known = threads_read(dir, tid, "status", text, sizeof text);
    if (known <= 0) return known == 0;
    for (size_t i = 0; i < sizeof threads_known / sizeof *threads_known; i++)
        if (!strncmp(text, "Name:\t", 6) && !strncmp(text + 6, threads_known[i], strlen(threads_known[i]))) return 1;
    line = strstr(text, "\nSigBlk:");
    if (!line) return 0;
    mask = strtoull(line + 8, 0, 16);
    return !(mask >> (SIGSEGV - 1) & 1) || (mask >> 31 & 3) == 3;
}

/* Look at the signal mask of each other thread: some microseconds a thread. */
static threads_found threads_look(int dir) {
    char text[1024];
    const char *tid, *field;
    int known, i;
    threads_walk walk;
    threads_begin(&walk, dir);
    while ((tid = threads_next(&walk))) {
        field = threads_state(dir, tid, text, sizeof text, &known);
        if (known < 0) return THREADS_UNKNOWN;
        if (known == 0) continue;
        /* The state is the third field, the mask the 32nd. */
        for (i = 3; i < 32 && field; i++) {
            field = strchr(field, ' ');
            if (field) field++;
        }
        if (!field) return THREADS_UNKNOWN;
        if (strtoull(field, 0, 10) >> (SIGSEGV - 1) & 1 && !threads_is_harmless(dir, tid)) return THREADS_BLOCKED;
    }
    return walk.end < 0 ? THREADS_UNKNOWN : THREADS_CLEAR;
}

#endif
