/* The SIGSEGV handler of the mprotect guard, and the window that it watches.

   One window exists per process at a time: the range of pages that a merge has write-protected right
   now. A thread that writes there faults; the handler makes it wait until the window is closed and
   lets it try again. Every other fault goes to the handler that was there before.

   All but the last part may run in a signal handler: no allocation, no lock, no library call that is not
   async-signal-safe, errno restored. Included by mprotect.pyx only. */

#ifndef KSMCORE_SEGV_H
#define KSMCORE_SEGV_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

/* How long a waiting writer sleeps before it looks again even without being woken. A window is open
   for tens of microseconds; the bound only matters if a wake-up could ever be missed. */
#define SEGV_WAIT_NS 2000000L

static struct {
    uintptr_t lo, hi;           /* the window; meaningful while seq is odd */
    uintptr_t hull_lo, hull_hi; /* hull of all windows since the handler was installed */
    uint32_t seq;               /* odd while a window is open; the futex word */
    uint32_t n_waiting;         /* writers asleep on seq */
    uint32_t n_waits;           /* writers that had to wait, ever */
    uint32_t installed;
    uintptr_t stuck_lo, stuck_hi; /* pages whose permission the kernel refused to give back; lo == hi: none */
    uint32_t n_windows;         /* windows opened since the handler was installed */
    struct sigaction previous;  /* where other faults go */
    /* A handler that was installed over ours while a scan ran keeps ours as its own predecessor. When
       ours is installed over that one later, the two would hand a true fault to each other for ever.
       `displaced_by` remembers such a handler, `base` what was there before either. */
    struct sigaction displaced_by, base;
    uint32_t was_displaced, cyclic;
    uint32_t passing_tid;       /* in cyclic state: the thread that is inside segv_pass_on */
} segv;

static long segv_futex(uint32_t *word, int op, uint32_t value, void *four, uint32_t *word2, uint32_t value3) {
    return syscall(SYS_futex, word, op | FUTEX_PRIVATE_FLAG, value, four, word2, value3);
}

/* Can `addr` be written now? Adds zero to the word there, atomically and in the kernel, which answers
   EFAULT instead of raising a signal. Nothing is changed for anybody. */
static int segv_writable(uintptr_t addr) {
    uint32_t dummy = 0;
    int op = FUTEX_OP(FUTEX_OP_ADD, 0, FUTEX_OP_CMP_EQ, 0);
    return segv_futex(&dummy, FUTEX_WAKE_OP, 0, (void *)0, (uint32_t *)(addr & ~(uintptr_t)3), (uint32_t)op) >= 0;
}

/* Was it a jump into data rather than a write? Then trying again would never end. */
static int segv_is_jump(uintptr_t addr, void *context) {
#if defined(__x86_64__)
    const greg_t *regs = ((ucontext_t *)context)->uc_mcontext.gregs;
    return addr == (uintptr_t)regs[REG_RIP] || (regs[REG_ERR] & 16); /* bit 4: instruction fetch */
#elif defined(__aarch64__)
    return addr == (uintptr_t)((ucontext_t *)context)->uc_mcontext.pc;
#else
    (void)addr; (void)context;
    return 0;
#endif
}

/* 1: the fault was ours, the access can be tried again. 0: somebody else's. */
static int segv_ours(const siginfo_t *info, void *context) {
    uintptr_t addr = (uintptr_t)info->si_addr;
    if (info->si_code != SEGV_ACCERR && info->si_code != SEGV_MAPERR) return 0;
    if (segv_is_jump(addr, context)) return 0;
    for (;;) {
        uint32_t seq = __atomic_load_n(&segv.seq, __ATOMIC_ACQUIRE);
        uintptr_t lo = __atomic_load_n(&segv.lo, __ATOMIC_RELAXED);
        uintptr_t hi = __atomic_load_n(&segv.hi, __ATOMIC_RELAXED);
        uintptr_t hull_lo = __atomic_load_n(&segv.hull_lo, __ATOMIC_RELAXED);
        uintptr_t hull_hi = __atomic_load_n(&segv.hull_hi, __ATOMIC_RELAXED);
        __atomic_thread_fence(__ATOMIC_ACQUIRE);
        if (__atomic_load_n(&segv.seq, __ATOMIC_RELAXED) != seq) continue;
        if (addr < hull_lo || addr >= hull_hi) return 0;
        if ((seq & 1) && addr >= lo && addr < hi) {
            struct timespec limit = {0, SEGV_WAIT_NS};
            __atomic_add_fetch(&segv.n_waits, 1, __ATOMIC_RELAXED);
            __atomic_add_fetch(&segv.n_waiting, 1, __ATOMIC_SEQ_CST);
            segv_futex(&segv.seq, FUTEX_WAIT, seq, &limit, (uint32_t *)0, 0);
            __atomic_sub_fetch(&segv.n_waiting, 1, __ATOMIC_SEQ_CST);
            return 1;
        }
        /* Not in a window now, but perhaps in one that was closed between the fault and this line,
           however long ago: this thread may have been off the processor in between. If the page can
           be written, that is what happened. If it cannot, and no window opened or closed while we
           asked, the program made the page so itself, and the fault is a true one. */
        if (segv_writable(addr)) return 1;
        /* Or in one that could not be given back its permission: the writer asks for it once more. */
        if (addr >= segv.stuck_lo && addr < segv.stuck_hi &&
            mprotect((void *)segv.stuck_lo, segv.stuck_hi - segv.stuck_lo, PROT_READ | PROT_WRITE) == 0)
            return 1;
        if (__atomic_load_n(&segv.seq, __ATOMIC_ACQUIRE) == seq) return 0;
    }
}

/* Do what the kernel would have done had the previous handler been the installed one. */
static void segv_pass_on(int sig, siginfo_t *info, void *context) {
    struct sigaction was = segv.previous;
    uint32_t tid = (uint32_t)syscall(SYS_gettid);
    if (segv.cyclic) {
        if (__atomic_load_n(&segv.passing_tid, __ATOMIC_RELAXED) == tid) was = segv.base;
        else __atomic_store_n(&segv.passing_tid, tid, __ATOMIC_RELAXED);
    }
    int calls_it = (was.sa_flags & SA_SIGINFO) ? was.sa_sigaction != (void *)0
                                               : was.sa_handler != SIG_DFL && was.sa_handler != SIG_IGN;
    if (!calls_it || (was.sa_flags & SA_RESETHAND)) {
        /* Back to the default: once we return, the faulting instruction runs again and ends the
           process where it stands, core dump and all. A signal that somebody sent is sent again. */
        struct sigaction gone;
        memset(&gone, 0, sizeof gone);
        gone.sa_handler = SIG_DFL;
        if (!calls_it && info->si_code <= 0 && was.sa_handler == SIG_IGN) return;
        sigaction(SIGSEGV, &gone, (struct sigaction *)0);
        if (!calls_it) {
            if (info->si_code <= 0) syscall(SYS_tgkill, getpid(), (pid_t)tid, sig);
            return;
        }
    }
    sigset_t mask = was.sa_mask, before;
    if (!(was.sa_flags & SA_NODEFER)) sigaddset(&mask, sig);
    sigprocmask(SIG_BLOCK, &mask, &before);
    if (was.sa_flags & SA_NODEFER) {
        sigset_t only;
        sigemptyset(&only);
        sigaddset(&only, sig);
        if (!sigismember(&was.sa_mask, sig)) sigprocmask(SIG_UNBLOCK, &only, (sigset_t *)0);
    }
    if (was.sa_flags & SA_SIGINFO) was.sa_sigaction(sig, info, context);
    else was.sa_handler(sig);
    sigprocmask(SIG_SETMASK, &before, (sigset_t *)0);
    if (segv.cyclic) __atomic_store_n(&segv.passing_tid, 0, __ATOMIC_RELAXED);
}

/* Sends a scanning thread back from a page that went away while it was read (reader.pyx). */
static void (*segv_reader_return)(void);

static void segv_handler(int sig, siginfo_t *info, void *context) {
    int saved = errno;
    if (info->si_code == SEGV_MAPERR || info->si_code == SEGV_ACCERR) segv_reader_return();
    int ours = segv_ours(info, context);
    errno = saved;
    if (!ours) segv_pass_on(sig, info, context);
}

/* Caller holds the fork lock: one window at a time, and no fork inside. */
static void segv_open(uintptr_t lo, uintptr_t hi) {
    __atomic_store_n(&segv.lo, lo, __ATOMIC_RELAXED);
    __atomic_store_n(&segv.hi, hi, __ATOMIC_RELAXED);
    if (lo < segv.hull_lo) __atomic_store_n(&segv.hull_lo, lo, __ATOMIC_RELAXED);
    if (hi > segv.hull_hi) __atomic_store_n(&segv.hull_hi, hi, __ATOMIC_RELAXED);
    segv.n_windows++;
    __atomic_add_fetch(&segv.seq, 1, __ATOMIC_SEQ_CST);
}

static void segv_close(void) {
    __atomic_add_fetch(&segv.seq, 1, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(&segv.n_waiting, __ATOMIC_SEQ_CST))
        segv_futex(&segv.seq, FUTEX_WAKE, 0x7fffffff, (void *)0, (uint32_t *)0, 0);
}

static int segv_is_installed(const struct sigaction *now) {
    return (now->sa_flags & SA_SIGINFO) && now->sa_sigaction == segv_handler;
}

/* Remember `now`, the handler that is to be replaced by ours. */
static void segv_remember(const struct sigaction *now) {
    segv.cyclic = segv.was_displaced && now->sa_sigaction == segv.displaced_by.sa_sigaction;
    segv.previous = *now;
    segv.passing_tid = 0;
    segv.installed = 1;
}

/* Nobody scans, so no window is open and no thread can be on its way here: begin a new hull. */
static void segv_forget_windows(void) {
    segv.hull_lo = UINTPTR_MAX;
    segv.hull_hi = 0;
    segv.n_windows = 0;
}

/* `now` stands where ours was put: somebody installed it while a scan ran. It is left alone. */
static void segv_displaced(const struct sigaction *now) {
    if (!segv.cyclic) segv.base = segv.previous;
    segv.displaced_by = *now;
    segv.was_displaced = 1;
}

static void segv_fill(struct sigaction *act) {
    memset(act, 0, sizeof *act);
    act->sa_sigaction = segv_handler;
    sigemptyset(&act->sa_mask);
    /* On the alternate stack where a thread has one: a stack overflow must still reach the previous
       handler. SIGSEGV stays blocked while the handler runs. */
    act->sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESTART;
}

/* Runs in a forked child. No window can be open (fork waits for the fork lock), and nobody scans here, so
   the disposition goes back to what the program had. `installed` does not tell: the kernel copies the
   dispositions before the memory, and another thread may have removed the handler in between. */
static void segv_child(void) {
    struct sigaction now;
    if (sigaction(SIGSEGV, (struct sigaction *)0, &now) == 0 && segv_is_installed(&now))
        sigaction(SIGSEGV, &segv.previous, (struct sigaction *)0);
    segv.installed = 0;
    segv.n_waiting = 0;
    segv.n_windows = 0;
}

/* ---- when the handler may be taken out: asked outside of it ---- */

/* Processor time of thread `tid` in ns, and whether it is off the processor of its own will
   (asleep in the kernel, stopped, or gone; not held by a debugger, which sees the signal before
   the handler does), from /proc. -1 when it cannot be told. */
static int segv_thread(int tasks, const char *tid, uint64_t *ran_ns, int *asleep) {
    char path[64], buf[512];
    int fd;
    ssize_t n;
    snprintf(path, sizeof path, "%s/stat", tid);
    fd = openat(tasks, path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) { *asleep = 1; return errno == ENOENT ? 0 : -1; }
    n = read(fd, buf, sizeof buf - 1);
    close(fd);
    if (n <= 0) { *asleep = 1; return 0; }
    buf[n] = 0;
    /* the name may hold spaces and brackets; the state follows the last bracket */
    char *state = strrchr(buf, ')');
    if (!state || !state[1] || !state[2]) return -1;
    *asleep = strchr("SDIZXT", state[2]) != 0;
    snprintf(path, sizeof path, "%s/schedstat", tid);
    fd = openat(tasks, path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return -1;
    n = read(fd, buf, sizeof buf - 1);
    close(fd);
    if (n <= 0) return -1;
    buf[n] = 0;
    *ran_ns = strtoull(buf, 0, 10);
    return 0;
}

/* A thread that faulted in the last window may still be on its way to the handler: runnable, in
   the kernel, not yet given its signal. Return 1 once that can be true of no thread: each has been
   seen asleep, or has used SEGV_RAN_NS of processor time since (the way to the handler takes
   microseconds and never sleeps after the fault was judged). The kernel brings the processor time
   up to date at a tick or a switch only, so the first change seen may be of time used before; it
   is from that change on that the thread must have run. 0: not within `limit_ms`, or /proc does
   not tell. */
#define SEGV_RAN_NS 100000u
#define SEGV_MAX_THREADS 256
static int segv_quiesce(int limit_ms) {
    struct { char tid[16]; uint64_t ran_ns; int changed; } busy[SEGV_MAX_THREADS];
    int n_busy = 0, asleep, tasks;
    uint64_t ran_ns = 0;
    char self[16];
    struct dirent *entry;
    DIR *dir = opendir("/proc/self/task");
    if (!dir) return 0;
    tasks = dirfd(dir);
    snprintf(self, sizeof self, "%ld", (long)syscall(SYS_gettid));
    while ((entry = readdir(dir))) {
        if (entry->d_name[0] == '.' || !strcmp(entry->d_name, self)) continue;
        if (segv_thread(tasks, entry->d_name, &ran_ns, &asleep) != 0) { n_busy = -1; break; }
        if (asleep) continue;
        if (n_busy == SEGV_MAX_THREADS || strlen(entry->d_name) > 15) { n_busy = -1; break; }
        strcpy(busy[n_busy].tid, entry->d_name);
        busy[n_busy].changed = 0;
        busy[n_busy++].ran_ns = ran_ns;
    }
    while (n_busy > 0 && limit_ms-- > 0) {
        struct timespec pause = {0, 1000000L};
        nanosleep(&pause, 0);
        for (int i = n_busy - 1; i >= 0; i--) {
            if (segv_thread(tasks, busy[i].tid, &ran_ns, &asleep) != 0) continue;
            if (asleep || (busy[i].changed && ran_ns - busy[i].ran_ns >= SEGV_RAN_NS)) {
                busy[i] = busy[--n_busy];
            } else if (!busy[i].changed && ran_ns != busy[i].ran_ns) {
                busy[i].changed = 1;
                busy[i].ran_ns = ran_ns;
            }
        }
    }
    closedir(dir);
    return n_busy == 0;
}

#endif
