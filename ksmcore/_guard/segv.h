/* The SIGSEGV handler of the mprotect guard, and the window that it watches.

   One window exists per process at a time: the range of pages that a merge has write-protected right
   now. A thread that writes there faults; the handler makes it wait until the window is closed and
   lets it try again. Every other fault goes to the handler that was there before (chain.h).

   A handler of SIGBUS stands beside it, for one thing only: to send a thread of ours back from a page that
   went away while it was read.

   All of it may run in a signal handler: no allocation, no lock, no library call that is not
   async-signal-safe, errno restored. Included by mprotect.pyx only. */

#ifndef KSMCORE_SEGV_H
#define KSMCORE_SEGV_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <pthread.h>
#include <stdint.h>
#include <sys/mman.h>
#include "_guard/chain.h"

/* How long a waiting writer sleeps before it looks again even without being woken. A window is open
   for tens of microseconds; the bound only matters if a wake-up could ever be missed. */
#define SEGV_WAIT_NS 2000000L

static struct {
    uintptr_t lo, hi;           /* the window; meaningful while seq is odd */
    uintptr_t hull_lo, hull_hi; /* hull of all windows since the handler was installed */
    uint32_t seq;               /* odd while a window is open; the futex word */
    uint32_t owner_tid;         /* the thread that opened it */
    uint32_t n_waiting;         /* writers asleep on seq */
    uint32_t n_waits;           /* writers that had to wait, ever */
    uintptr_t stuck_lo, stuck_hi; /* pages whose permission the kernel refused to give back; lo == hi: none */
    uint32_t n_windows;         /* windows opened since the handler was installed */
} segv;

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
            /* A thread that waited for its own window would wait for ever. */
            if (__atomic_load_n(&segv.owner_tid, __ATOMIC_RELAXED) == (uint32_t)syscall(SYS_gettid)) return 0;
            __atomic_add_fetch(&segv.n_waits, 1, __ATOMIC_RELAXED);
            __atomic_add_fetch(&segv.n_waiting, 1, __ATOMIC_SEQ_CST);
            chain_futex(&segv.seq, FUTEX_WAIT, seq, &limit, (uint32_t *)0, 0);
            __atomic_sub_fetch(&segv.n_waiting, 1, __ATOMIC_SEQ_CST);
            return 1;
        }
        /* Not in a window now, but perhaps in one that was closed between the fault and this line,
           however long ago: this thread may have been off the processor in between. If the page can
           be written, that is what happened. If it cannot, and no window opened or closed while we
           asked, the program made the page so itself, and the fault is a true one. */
        if (chain_writable(addr)) return 1;
        /* Or in one that could not be given back its permission: the writer asks for it once more. */
        if (addr >= segv.stuck_lo && addr < segv.stuck_hi &&
            mprotect((void *)segv.stuck_lo, segv.stuck_hi - segv.stuck_lo, PROT_READ | PROT_WRITE) == 0)
            return 1;
        if (__atomic_load_n(&segv.seq, __ATOMIC_ACQUIRE) == seq) return 0;
    }
}

/* Sends a thread back from a page that went away while it read it (reader.pyx); else returns. */
static void (*segv_reader_return)(void *context);

static void segv_handle(int link, int sig, siginfo_t *info, void *context);
static void segv_handle_bus(int link, int sig, siginfo_t *info, void *context);
CHAIN_DEFINE(segv_chain, SIGSEGV, segv_handle);
CHAIN_DEFINE(segv_bus_chain, SIGBUS, segv_handle_bus);

/* Positive codes are the kernel's: the thread itself has caused it. */
static void segv_handle(int link, int sig, siginfo_t *info, void *context) {
    int saved = errno;
    if (info->si_code > 0) segv_reader_return(context);
    int ours = segv_ours(info, context);
    errno = saved;
    if (!ours) chain_pass_on(&segv_chain, link, sig, info, context);
}

static void segv_handle_bus(int link, int sig, siginfo_t *info, void *context) {
    int saved = errno;
    if (info->si_code > 0) segv_reader_return(context);
    errno = saved;
    chain_pass_on(&segv_bus_chain, link, sig, info, context);
}

/* Caller holds the fork lock: one window at a time, and no fork inside. */
static void segv_open(uintptr_t lo, uintptr_t hi) {
    __atomic_store_n(&segv.lo, lo, __ATOMIC_RELAXED);
    __atomic_store_n(&segv.hi, hi, __ATOMIC_RELAXED);
    if (lo < segv.hull_lo) __atomic_store_n(&segv.hull_lo, lo, __ATOMIC_RELAXED);
    if (hi > segv.hull_hi) __atomic_store_n(&segv.hull_hi, hi, __ATOMIC_RELAXED);
    __atomic_store_n(&segv.owner_tid, (uint32_t)syscall(SYS_gettid), __ATOMIC_RELAXED);
    segv.n_windows++;
    __atomic_add_fetch(&segv.seq, 1, __ATOMIC_SEQ_CST);
}

static void segv_close(void) {
    __atomic_add_fetch(&segv.seq, 1, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(&segv.n_waiting, __ATOMIC_SEQ_CST))
        chain_futex(&segv.seq, FUTEX_WAKE, 0x7fffffff, (void *)0, (uint32_t *)0, 0);
}

/* Nobody scans, so no window is open and no thread can be on its way here: begin a new hull. */
static void segv_forget_windows(void) {
    segv.hull_lo = UINTPTR_MAX;
    segv.hull_hi = 0;
    segv.n_windows = 0;
}

/* Runs in a forked child. No window can be open (fork waits for the fork lock), and nobody scans here, so
   the dispositions go back to what the program had. */
static void segv_child(void) {
    chain_child(&segv_chain);
    chain_child(&segv_bus_chain);
    segv.n_waiting = 0;
    segv.n_windows = 0;
}

#endif
