/* Keeping signals away from a thread for a while: from one that has a window open, holds a lock that a
   handler could wait for, or reads memory with a place to return to. A handler that ran there and wrote
   into the window would wait for the very thread that it has interrupted.

   Three are let through, which this thread itself may cause there: SIGSEGV and SIGBUS by reading memory that
   goes away, SIGSYS by a system call that a sandbox carries out in its handler. The kernel ends a process that
   causes one of them with it blocked. No instruction of ours raises SIGFPE, SIGILL or SIGTRAP, so where
   one comes somebody has sent it, and it waits like the others. */

#ifndef KSMCORE_SIGNALS_H
#define KSMCORE_SIGNALS_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <signal.h>

/* All that may come at any time. The C library leaves out what it needs for itself. */
static inline void ksm_signals_of_others(sigset_t *set) {
    sigfillset(set);
    sigdelset(set, SIGSEGV);
    sigdelset(set, SIGBUS);
    sigdelset(set, SIGSYS);
}

static inline void ksm_block_signals(sigset_t *before) {
    sigset_t others;
    ksm_signals_of_others(&others);
    pthread_sigmask(SIG_BLOCK, &others, before);
}

static inline void ksm_restore_signals(const sigset_t *before) { pthread_sigmask(SIG_SETMASK, before, (sigset_t *)0); }

#endif
