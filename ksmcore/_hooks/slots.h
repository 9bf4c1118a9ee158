/* Records of calls in flight: which memory a function of the C library is writing into, by thread. And the window,
   as those calls see it. Included by calls.pyx only.

   A call writes its ranges into the record of its thread, and then looks whether a window is open over
   one of them; whoever opens a window publishes it first, and looks at the records then. So of a call and a window
   that meet one sees the other: the call waits until the window is closed, or the window is not opened. Both
   sides need what they wrote to be seen before they read. Windows are few and calls many, so the window's side pays
   for both: membarrier(2) has every thread of the process pass a barrier. Where there is none, calls have their own.

   All of it runs in signal handlers, too, and in threads that are cancelled: no allocation, no lock, no
   thread-local variable (the first access to one may allocate), errno as it was. A thread is known by its thread
   pointer, which tells where its record is, in a table that is there from the beginning. A record belongs to its
   thread until that ends; where the C library does not tell of the end, to the thread that gets its stack after it. */

#ifndef KSMCORE_SLOTS_H
#define KSMCORE_SLOTS_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define SLOTS 16384     /* threads at a time; a power of two. Only what is used takes memory */
#define SLOTS_BITS 14
#define SLOTS_RANGES 10 /* of a thread at a time; what is more widens the last */

/* Longest wait before the window is looked at again, though nobody was woken. */
#define SLOTS_WAIT_NS 2000000L

typedef struct {
    uintptr_t lo, hi, frame; /* frame: where on the stack the call was made */
} slots_range;

typedef struct {
    uintptr_t owner; /* thread pointer; 0: nobody's */
    uint32_t depth;  /* of `ranges`: those of a call, and then of a call in a handler that has interrupted it */
    slots_range ranges[SLOTS_RANGES];
} __attribute__((aligned(256))) slots_slot;

static slots_slot slots_all[SLOTS];
static uint64_t slots_used[SLOTS / 64];  /* those that ever had an owner */
static uint32_t slots_n_untold;          /* calls in flight that found no place */
static uint32_t slots_probes = 64;       /* places that a thread may have its record in; tests make them fewer */
static uint32_t slots_need_fence = 1;    /* there is no membarrier */

static struct {
    uintptr_t lo, hi;    /* meaningful while seq is odd */
    uint32_t seq;        /* odd while a window is open; the futex word */
    uint32_t owner_tid;
    uint32_t n_waiting;
    uint32_t n_waits;    /* calls that had to wait, ever */
} slots_window;

/* What a call keeps of its record while it lasts. */
typedef struct {
    slots_slot *slot; /* NULL: it found no place */
    uint32_t depth;   /* to go back to */
} slots_held;

static inline uintptr_t slots_thread(void) {
    uintptr_t pointer;
#if defined(__x86_64__)
    __asm__("mov %%fs:0, %0" : "=r"(pointer));
#elif defined(__aarch64__)
    __asm__("mrs %0, tpidr_el0" : "=r"(pointer));
#else
#error "the thread pointer of this processor is not known"
#endif
    return pointer;
}

static inline uint32_t slots_home(uintptr_t thread) {
    return (uint32_t)((thread >> 6) * 0x9e3779b97f4a7c15u >> (64 - SLOTS_BITS));
}

static long slots_futex(int op, uint32_t value, const struct timespec *limit) {
    return syscall(SYS_futex, &slots_window.seq, op | FUTEX_PRIVATE_FLAG, value, limit, (void *)0, 0);
}

/* ---- a call's side ---- */

/* By which the C library tells of the end of a thread. The first keys have their place in the thread itself; for
   others setting a value may allocate, so they are not used. */
#define SLOTS_KEYS 32
static pthread_key_t slots_key;
static int slots_has_key;

static void slots_thread_ends(void *slot) {
    if (((slots_slot *)slot)->owner != slots_thread()) return;
    __atomic_store_n(&((slots_slot *)slot)->depth, 0, __ATOMIC_RELEASE);
    __atomic_store_n(&((slots_slot *)slot)->owner, 0, __ATOMIC_RELEASE);
}

/* Before anything else. */
static void slots_init(void) {
    if (pthread_key_create(&slots_key, slots_thread_ends) != 0) return;
    slots_has_key = slots_key < SLOTS_KEYS;
    if (!slots_has_key) pthread_key_delete(slots_key);
}

/* The record of this thread where it is not at home, or has none yet; NULL: there is no place for one. */
static __attribute__((noinline)) slots_slot *slots_claim(uintptr_t thread) {
    uint32_t home = slots_home(thread);
    for (uint32_t i = 0; i < slots_probes; i++)
        if (__atomic_load_n(&slots_all[(home + i) % SLOTS].owner, __ATOMIC_RELAXED) == thread)
            return &slots_all[(home + i) % SLOTS];
    for (uint32_t i = 0; i < slots_probes; i++) {
        uint32_t at = (home + i) % SLOTS;
        uintptr_t nobody = 0;
        if (__atomic_load_n(&slots_all[at].owner, __ATOMIC_RELAXED) != 0) continue;
        __atomic_fetch_or(&slots_used[at / 64], (uint64_t)1 << at % 64, __ATOMIC_SEQ_CST);
        if (!__atomic_compare_exchange_n(&slots_all[at].owner, &nobody, thread, 0, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED))
            continue;
        if (slots_has_key) pthread_setspecific(slots_key, &slots_all[at]);
        return &slots_all[at];
    }
    return (slots_slot *)0;
}

/* A call begins while the record of its thread is not empty: it was made in a signal handler, on top of another; or
   that one was left by siglongjmp() out of a handler, and its frame is gone. Returns how many ranges are true. A
   frame that is not above ours is gone, unless ours is on the stack for signals. */
static __attribute__((noinline)) uint32_t slots_still(slots_slot *slot, uintptr_t frame) {
    uint32_t depth = slot->depth;
    int saved = errno;
    stack_t now;
    if (depth > SLOTS_RANGES) depth = SLOTS_RANGES;
    if (slot->ranges[depth - 1].frame <= frame && syscall(SYS_sigaltstack, (void *)0, &now) == 0 &&
        !(now.ss_flags & SS_ONSTACK)) {
        while (depth > 0 && slot->ranges[depth - 1].frame <= frame) depth--;
        __atomic_store_n(&slot->depth, depth, __ATOMIC_RELEASE);
    }
    errno = saved;
    return depth;
}

static inline void slots_begin(slots_held *held, uintptr_t frame) {
    uintptr_t thread = slots_thread();
    slots_slot *slot = &slots_all[slots_home(thread)];
    if (__builtin_expect(__atomic_load_n(&slot->owner, __ATOMIC_RELAXED) != thread, 0)) slot = slots_claim(thread);
    held->slot = slot;
    held->depth = 0;
    if (__builtin_expect(!slot, 0)) __atomic_add_fetch(&slots_n_untold, 1, __ATOMIC_SEQ_CST);
    else if (__builtin_expect(slot->depth != 0, 0)) held->depth = slots_still(slot, frame);
}

/* The call may write `len_bytes` from `at` on. First the place is taken, then it is filled in: a handler that runs in
   between takes the next. */
static inline void slots_tell(slots_held *held, uintptr_t frame, const void *at, size_t len_bytes) {
    slots_slot *slot = held->slot;
    uintptr_t lo = (uintptr_t)at, hi = lo + len_bytes;
    slots_range *range;
    uint32_t depth;
    if (!slot || !at || len_bytes == 0) return;
    if (hi < lo) hi = UINTPTR_MAX;
    depth = slot->depth;
    if (__builtin_expect(depth >= SLOTS_RANGES, 0)) {
        range = &slot->ranges[SLOTS_RANGES - 1];
        if (lo < range->lo) __atomic_store_n(&range->lo, lo, __ATOMIC_RELAXED);
        if (hi > range->hi) __atomic_store_n(&range->hi, hi, __ATOMIC_RELAXED);
        return;
    }
    __atomic_store_n(&slot->depth, depth + 1, __ATOMIC_RELAXED);
    __atomic_signal_fence(__ATOMIC_SEQ_CST);
    range = &slot->ranges[depth];
    __atomic_store_n(&range->lo, lo, __ATOMIC_RELAXED);
    __atomic_store_n(&range->hi, hi, __ATOMIC_RELAXED);
    __atomic_store_n(&range->frame, frame, __ATOMIC_RELAXED);
    __atomic_signal_fence(__ATOMIC_SEQ_CST);
    /* Once more: the handler may have taken the range, which was not filled in, for one that was left. */
    __atomic_store_n(&slot->depth, depth + 1, __ATOMIC_RELEASE);
}

static int slots_slot_meets(const slots_slot *slot, uint32_t from, uintptr_t lo, uintptr_t hi) {
    uint32_t depth = __atomic_load_n(&slot->depth, __ATOMIC_ACQUIRE);
    if (depth > SLOTS_RANGES) depth = SLOTS_RANGES;
    for (uint32_t i = from; i < depth; i++)
        if (__atomic_load_n(&slot->ranges[i].lo, __ATOMIC_RELAXED) < hi &&
            __atomic_load_n(&slot->ranges[i].hi, __ATOMIC_RELAXED) > lo)
            return 1;
    return 0;
}

/* A window is open. If it is over memory of this call, wait for its end. */
static __attribute__((noinline)) void slots_wait(const slots_held *held) {
    /* Where its thread had no range left, the last one is of this call, too. */
    uint32_t from = held->depth < SLOTS_RANGES ? held->depth : SLOTS_RANGES - 1;
    int saved = errno;
    for (;;) {
        uint32_t seq = __atomic_load_n(&slots_window.seq, __ATOMIC_ACQUIRE);
        uintptr_t lo = __atomic_load_n(&slots_window.lo, __ATOMIC_RELAXED);
        uintptr_t hi = __atomic_load_n(&slots_window.hi, __ATOMIC_RELAXED);
        struct timespec limit = {0, SLOTS_WAIT_NS};
        if (!(seq & 1)) break;
        __atomic_thread_fence(__ATOMIC_ACQUIRE);
        if (__atomic_load_n(&slots_window.seq, __ATOMIC_RELAXED) != seq) continue;
        /* What found no place keeps every later window from being opened, and waits for this one. */
        if (held->slot && !slots_slot_meets(held->slot, from, lo, hi)) break;
        if (__atomic_load_n(&slots_window.owner_tid, __ATOMIC_RELAXED) == (uint32_t)syscall(SYS_gettid)) break;
        __atomic_add_fetch(&slots_window.n_waits, 1, __ATOMIC_RELAXED);
        __atomic_add_fetch(&slots_window.n_waiting, 1, __ATOMIC_SEQ_CST);
        slots_futex(FUTEX_WAIT, seq, &limit);
        __atomic_sub_fetch(&slots_window.n_waiting, 1, __ATOMIC_SEQ_CST);
    }
    errno = saved;
}

/* All is told: the call may be made once this returns. */
static inline void slots_meet(const slots_held *held) {
    if (__builtin_expect(__atomic_load_n(&slots_need_fence, __ATOMIC_RELAXED) != 0, 0))
        __atomic_thread_fence(__ATOMIC_SEQ_CST);
    else
        __atomic_signal_fence(__ATOMIC_SEQ_CST);
    if (__builtin_expect(__atomic_load_n(&slots_window.seq, __ATOMIC_RELAXED) & 1, 0)) slots_wait(held);
}

static inline void slots_end(const slots_held *held) {
    if (held->slot) __atomic_store_n(&held->slot->depth, held->depth, __ATOMIC_RELEASE);
    /* In a forked child they are forgotten. */
    else if (__atomic_load_n(&slots_n_untold, __ATOMIC_SEQ_CST))
        __atomic_sub_fetch(&slots_n_untold, 1, __ATOMIC_SEQ_CST);
}

/* ---- the window's side ---- */

#define SLOTS_MEMBARRIER 8          /* PRIVATE_EXPEDITED */
#define SLOTS_MEMBARRIER_REGISTER 16

static long slots_membarrier(int what) {
#ifdef SYS_membarrier
    return syscall(SYS_membarrier, what, 0, 0);
#else
    (void)what;
    return -1;
#endif
}

/* Can the kernel have all threads pass a barrier? Asked before the first call is told of. */
static void slots_prepare(void) {
    __atomic_store_n(&slots_need_fence, slots_membarrier(SLOTS_MEMBARRIER_REGISTER) != 0, __ATOMIC_SEQ_CST);
}

/* All that calls have told of before they looked at the window is seen from here on. 0: that cannot be had. */
static int slots_barrier(void) {
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    if (__atomic_load_n(&slots_need_fence, __ATOMIC_RELAXED)) return 1;
    if (slots_membarrier(SLOTS_MEMBARRIER) == 0) return 1;
    /* In a process that was forked: it has to ask anew. */
    slots_prepare();
    return !__atomic_load_n(&slots_need_fence, __ATOMIC_RELAXED) && slots_membarrier(SLOTS_MEMBARRIER) == 0;
}

/* The lowest part of [*lo, *hi) that a call in flight may write into; 0: there is none. This thread's own calls are
   suspended, if not left, so no window meets them. */
static int slots_first(uintptr_t *lo, uintptr_t *hi) {
    uintptr_t first_lo = *hi, first_hi = *hi, here = slots_thread();
    for (uint32_t word = 0; word < SLOTS / 64; word++) {
        uint64_t used = __atomic_load_n(&slots_used[word], __ATOMIC_RELAXED);
        for (; used; used &= used - 1) {
            const slots_slot *slot = &slots_all[word * 64 + (uint32_t)__builtin_ctzll(used)];
            uint32_t depth = __atomic_load_n(&slot->depth, __ATOMIC_ACQUIRE);
            if (!depth || __atomic_load_n(&slot->owner, __ATOMIC_RELAXED) == here) continue;
            if (depth > SLOTS_RANGES) depth = SLOTS_RANGES;
            for (uint32_t i = 0; i < depth; i++) {
                uintptr_t range_lo = __atomic_load_n(&slot->ranges[i].lo, __ATOMIC_RELAXED);
                uintptr_t range_hi = __atomic_load_n(&slot->ranges[i].hi, __ATOMIC_RELAXED);
                if (range_lo >= *hi || range_hi <= *lo || range_lo >= range_hi || range_lo > first_lo) continue;
                if (range_lo == first_lo && range_hi < first_hi) continue;
                first_lo = range_lo;
                first_hi = range_hi;
            }
        }
    }
    if (__atomic_load_n(&slots_n_untold, __ATOMIC_RELAXED)) return 1;
    if (first_lo == *hi) return 0;
    if (first_lo > *lo) *lo = first_lo;
    if (first_hi < *hi) *hi = first_hi;
    return 1;
}

/* Publish a window over [lo, hi). Returns whether a call in flight meets it. Under the fork lock, as slots_close. */
static int slots_open(uintptr_t lo, uintptr_t hi) {
    __atomic_store_n(&slots_window.lo, lo, __ATOMIC_RELAXED);
    __atomic_store_n(&slots_window.hi, hi, __ATOMIC_RELAXED);
    __atomic_store_n(&slots_window.owner_tid, (uint32_t)syscall(SYS_gettid), __ATOMIC_RELAXED);
    __atomic_add_fetch(&slots_window.seq, 1, __ATOMIC_SEQ_CST);
    return !slots_barrier() || slots_first(&lo, &hi);
}

static void slots_close(void) {
    __atomic_add_fetch(&slots_window.seq, 1, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(&slots_window.n_waiting, __ATOMIC_SEQ_CST)) slots_futex(FUTEX_WAKE, 0x7fffffff, NULL);
}

/* Runs in a forked child: only the thread that has forked is there, perhaps in a handler that has interrupted a call.
   No window is open. */
static void slots_child(void) {
    uintptr_t here = slots_thread();
    for (uint32_t at = 0; at < SLOTS; at++) {
        if (!(slots_used[at / 64] >> at % 64 & 1) || slots_all[at].owner == here) continue;
        slots_all[at].owner = 0;
        slots_all[at].depth = 0;
    }
    slots_n_untold = 0;
    slots_window.n_waiting = 0;
}

#endif
