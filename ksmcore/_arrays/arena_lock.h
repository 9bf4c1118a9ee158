/* The arena's lock. Included by arena.pyx only.

   It is taken by any thread that allocates, so by hooks of a fork too, of other libraries, on the thread that has
   taken it for the fork: what that thread asks for meanwhile is for others than the arena to give (arena_is_forking),
   since more than looking at the table could need a lock that the fork has to do without. */

#ifndef KSMCORE_ARENA_LOCK_H
#define KSMCORE_ARENA_LOCK_H

#include "_kernel/signals.h"
#include <pthread.h>
#include <stdint.h>

static pthread_mutex_t arena_mutex = PTHREAD_MUTEX_INITIALIZER;
static uintptr_t arena_forker; /* thread pointer of the thread that forks */
static sigset_t arena_signals; /* its mask before; a handler that forked in the midst of it would wait for itself */

static int arena_is_forking(void) {
    return __atomic_load_n(&arena_forker, __ATOMIC_RELAXED) == (uintptr_t)pthread_self();
}
static void arena_lock(void) { pthread_mutex_lock(&arena_mutex); }
static void arena_unlock(void) { pthread_mutex_unlock(&arena_mutex); }
static void arena_before_fork(void) {
    sigset_t before;
    ksm_block_signals(&before);
    arena_lock();
    arena_signals = before;
    __atomic_store_n(&arena_forker, (uintptr_t)pthread_self(), __ATOMIC_RELAXED);
}
static void arena_after_fork(void) {
    sigset_t before = arena_signals;
    __atomic_store_n(&arena_forker, 0, __ATOMIC_RELAXED);
    arena_unlock();
    ksm_restore_signals(&before);
}
/* The thread that prepared the fork holds it; the others do not exist in the child. */
static void arena_renew(void) {
    pthread_mutex_init(&arena_mutex, 0);
    __atomic_store_n(&arena_forker, 0, __ATOMIC_RELAXED);
    ksm_restore_signals(&arena_signals);
}

#endif
