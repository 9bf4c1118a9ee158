/* A signal handler of ours among those of others, for signals that a thread causes itself (SIGSEGV, SIGBUS).

   Handlers form a chain: whoever installs one remembers what was there, passes on what is not his own,
   and puts it back in the end. Others may come and go at any time while ours is there, as faulthandler does,
   and may keep ours as what they pass on to, for ever. So ours is not one handler but several, the links. Each
   has its own `below`: what was there when it was installed. A link that somebody was installed over is lent:
   it is not used again until it is found in place, put back by whoever had it. So no chain leads back to itself,
   and where a link is found in place, its `below` is what would be there without us: also if that is not what was
   there last, because its owner has withdrawn it.

   Who asks through us (chain_change) is not installed over ours, but becomes what is below a link that takes the place
   of the one before: ours is in place at every moment, and is lent to nobody.

   There are only so many links. Should all be lent, the one that was lent first is used again, and then
   a chain may lead back to itself. A fault that goes round and round in it, or that a handler below
   leaves as it is again and again, ends the process, as it would have without any handler.

   Installing and removing happens under a lock of the caller's; everything else may happen in a signal
   handler: no allocation, no lock, no library call that is not async-signal-safe. */

#ifndef KSMCORE_CHAIN_H
#define KSMCORE_CHAIN_H

#include "_kernel/signals.h"
#include <errno.h>
#include <linux/futex.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

#define CHAIN_LINKS 8

typedef struct {
    struct sigaction below; /* where faults go that are not ours */
    uint32_t spent;         /* it was to be called once (SA_RESETHAND), and has been */
    uint32_t lent_at;       /* somebody was installed over it, and may pass on to it; counted from 1, 0: nobody */
} chain_link;

typedef struct {
    int sig;
    void (*const *handlers)(int, siginfo_t *, void *); /* one for each link */
    chain_link links[CHAIN_LINKS];
    int top;                /* the link that was installed last; meaningful while `installed` */
    uint32_t installed;
    uint32_t n_lent;        /* ever */
} chain;

/* Define the handlers, CHAIN_LINKS of them, and the chain `name` of signal `signum`. `handle` gets the number of the
   link before a handler's arguments. */
#define CHAIN_HANDLER(name, handle, k) \
    static void name##_handler_##k(int sig, siginfo_t *info, void *context) { handle(k, sig, info, context); }
#define CHAIN_DEFINE(name, signum, handle)                                                                            \
    CHAIN_HANDLER(name, handle, 0) CHAIN_HANDLER(name, handle, 1) CHAIN_HANDLER(name, handle, 2)                       \
    CHAIN_HANDLER(name, handle, 3) CHAIN_HANDLER(name, handle, 4) CHAIN_HANDLER(name, handle, 5)                       \
    CHAIN_HANDLER(name, handle, 6) CHAIN_HANDLER(name, handle, 7)                                                      \
    static void (*const name##_handlers[CHAIN_LINKS])(int, siginfo_t *, void *) = {                                    \
        name##_handler_0, name##_handler_1, name##_handler_2, name##_handler_3,                                        \
        name##_handler_4, name##_handler_5, name##_handler_6, name##_handler_7,                                        \
    };                                                                                                                 \
    static chain name = {signum, name##_handlers, {{{{0}}, 0, 0}}, 0, 0, 0}

/* ---- installing and removing ---- */

/* The link whose handler this is, -1: somebody else's. */
static int chain_find(const chain *c, const struct sigaction *now) {
    if (now->sa_flags & SA_SIGINFO)
        for (int k = 0; k < CHAIN_LINKS; k++)
            if (now->sa_sigaction == c->handlers[k]) return k;
    return -1;
}

static int chain_calls(const struct sigaction *action) {
    return action->sa_handler != SIG_DFL && action->sa_handler != SIG_IGN;
}

/* What is to be there in place of this link. */
static struct sigaction chain_below(const chain_link *link) {
    struct sigaction below = link->below;
    if (__atomic_load_n(&link->spent, __ATOMIC_RELAXED)) below.sa_handler = SIG_DFL;
    return below;
}

static void chain_lend(chain *c, int k) {
    c->links[k].lent_at = ++c->n_lent;
}

static int chain_is_same(const struct sigaction *a, const struct sigaction *b) {
    if (a->sa_handler != b->sa_handler || a->sa_flags != b->sa_flags) return 0;
    for (int other = 1; other < 65; other++)
        if (sigismember(&a->sa_mask, other) != sigismember(&b->sa_mask, other)) return 0;
    return 1;
}

/* The link to put over `now`: one that nobody else can have, and that was there last if it is one. (Then it is not
   written to: a thread may be on its way through it since.) Else not the one in place (-1: none is), and of others the
   one whose turn was longest ago. */
static int chain_choose(const chain *c, const struct sigaction *now, int in_place) {
    int found = -1;
    for (int i = 0; i < CHAIN_LINKS; i++) {
        int k = (c->top + i) % CHAIN_LINKS;
        if (!c->links[k].lent_at && chain_is_same(&c->links[k].below, now)) return k;
    }
    for (int i = 1; i <= CHAIN_LINKS; i++) {
        int k = (c->top + i) % CHAIN_LINKS;
        if (k != in_place && (found < 0 || c->links[k].lent_at < c->links[found].lent_at)) found = k;
    }
    return found;
}

/* SIGSEGV stays unblocked while ours runs: a thread that waits in it does not count as one that blocks
   it. Other signals are blocked: their handlers would run on top, perhaps on a small stack. On the
   alternate stack, and with system calls going on after it, as what is below would have it. */
static void chain_fill(const chain *c, int k, struct sigaction *act) {
    const struct sigaction *below = &c->links[k].below;
    memset(act, 0, sizeof *act);
    act->sa_sigaction = c->handlers[k];
    ksm_signals_of_others(&act->sa_mask);
    act->sa_flags = SA_SIGINFO | SA_NODEFER
                  | (chain_calls(below) ? below->sa_flags & (SA_ONSTACK | SA_RESTART) : SA_ONSTACK | SA_RESTART);
}

/* `now` is what is in place; returns whether that is ours. A link that is found there was given back, if lent. */
static int chain_look(chain *c, const struct sigaction *now) {
    int k = chain_find(c, now);
    if (k < 0) return 0;
    c->links[k].lent_at = 0;
    c->top = k;
    c->installed = 1;
    return 1;
}

/* What links[k] is to be from here on, to put in place. */
static struct sigaction chain_make(chain *c, int k, const struct sigaction *below) {
    struct sigaction ours;
    if (!chain_is_same(&c->links[k].below, below)) c->links[k].below = *below;
    c->links[k].spent = 0;
    c->links[k].lent_at = 0;
    chain_fill(c, k, &ours);
    return ours;
}

/* Put ours where it is not. -1 with errno: a call failed, and ours is not there. */
static int chain_install(chain *c) {
    struct sigaction now, ours, was;
    int k;
    if (sigaction(c->sig, (struct sigaction *)0, &now) != 0) return -1;
    if (chain_look(c, &now)) return 0;
    if (c->installed) chain_lend(c, c->top);
    c->installed = 0;
    k = chain_choose(c, &now, -1);
    ours = chain_make(c, k, &now);
    if (sigaction(c->sig, &ours, &was) != 0) return -1;
    /* Somebody may have come, or gone, in between. */
    if (chain_find(c, &was) >= 0) c->links[k].below = chain_below(&c->links[chain_find(c, &was)]);
    else if (!chain_is_same(&was, &now)) c->links[k].below = was;
    c->top = k;
    c->installed = 1;
    return 0;
}

/* sigaction() for the program. Where ours is in place it stays there, and what the program wants (NULL: nothing new)
   is what is below from here on; so faults in a window never meet a handler that does not know of it. */
static int chain_change(chain *c, const struct sigaction *wanted, struct sigaction *was) {
    struct sigaction now, ours, gone;
    int k, to;
    if (sigaction(c->sig, (struct sigaction *)0, &now) != 0) return -1;
    k = chain_find(c, &now);
    if (k < 0) return sigaction(c->sig, wanted, was);
    *was = chain_below(&c->links[k]);
    if (!wanted) return 0;
    if (chain_find(c, wanted) >= 0) {
        /* Lent, and given back. */
        if (sigaction(c->sig, wanted, &gone) != 0) return -1;
        chain_look(c, wanted);
    } else {
        to = chain_choose(c, wanted, k);
        ours = chain_make(c, to, wanted);
        if (sigaction(c->sig, &ours, &gone) != 0) return -1;
        c->top = to;
        c->installed = 1;
    }
    /* Somebody came past us in between. */
    if (chain_find(c, &gone) < 0) *was = gone;
    return 0;
}

/* Asked without the lock, and by anybody. */
static int chain_is_in_place(const chain *c) {
    struct sigaction now;
    return sigaction(c->sig, (struct sigaction *)0, &now) == 0 && chain_find(c, &now) >= 0;
}

/* Take ours out; what somebody has installed over it is left alone. -1: a call failed, and ours stays. */
static int chain_remove(chain *c) {
    struct sigaction now, was, below;
    if (sigaction(c->sig, (struct sigaction *)0, &now) != 0) return -1;
    if (chain_look(c, &now)) {
        below = chain_below(&c->links[c->top]);
        if (sigaction(c->sig, &below, &was) != 0) return -1;
        c->installed = 0;
        if (chain_find(c, &was) == c->top) return 0;
        /* Somebody came in between, and keeps ours. */
        sigaction(c->sig, &was, (struct sigaction *)0);
    }
    chain_lend(c, c->top);
    c->installed = 0;
    return 0;
}

/* Runs in a forked child, where none of ours is wanted. What `installed` says does not matter: the kernel
   copies the dispositions before the memory, and another thread may have changed them in between. */
static void chain_child(chain *c) {
    struct sigaction now, below;
    if (sigaction(c->sig, (struct sigaction *)0, &now) == 0 && chain_find(c, &now) >= 0) {
        below = chain_below(&c->links[chain_find(c, &now)]);
        sigaction(c->sig, &below, (struct sigaction *)0);
    }
    c->installed = 0;
}

/* ---- passing on ---- */

static long chain_futex(uint32_t *word, int op, uint32_t value, void *four, uint32_t *word2, uint32_t value3) {
    return syscall(SYS_futex, word, op | FUTEX_PRIVATE_FLAG, value, four, word2, value3);
}

/* Can `addr` be written now? Adds zero to the word there, atomically and in the kernel, which answers
   EFAULT instead of raising a signal. Nothing is changed for anybody. */
static int chain_writable(uintptr_t addr) {
    uint32_t dummy = 0;
    int op = FUTEX_OP(FUTEX_OP_ADD, 0, FUTEX_OP_CMP_EQ, 0);
    return chain_futex(&dummy, FUTEX_WAKE_OP, 0, (void *)0, (uint32_t *)(addr & ~(uintptr_t)3), (uint32_t)op) >= 0;
}

/* Can it be read? The kernel looks whether to wait there, and in any case does not. */
static int chain_readable(uintptr_t addr) {
    struct timespec at_once = {0, 0};
    return chain_futex((uint32_t *)(addr & ~(uintptr_t)3), FUTEX_WAIT, 0, &at_once, (uint32_t *)0, 0) == 0 ||
           errno != EFAULT;
}

#if defined(__x86_64__)
#define CHAIN_PC(uc) ((uintptr_t)(uc)->uc_mcontext.gregs[REG_RIP])
#define CHAIN_REGISTERS(uc) ((uc)->uc_mcontext.gregs)
#elif defined(__aarch64__)
#define CHAIN_PC(uc) ((uintptr_t)(uc)->uc_mcontext.pc)
#define CHAIN_REGISTERS(uc) ((uc)->uc_mcontext.regs)
#else
#error "the registers of this processor are not known"
#endif

/* Faults that a handler below has left as they were, the last of a few threads: which instruction, where, how
   often in a row, and since when. Read and written without a lock: what is lost begins anew. */
#define CHAIN_WATCHED 16
#define CHAIN_MOST_RETURNS 1000
#define CHAIN_MOST_NS 100000000u
static struct {
    uint32_t tid, n;
    uintptr_t pc, addr;
    uint64_t since_ns;
} chain_watched[CHAIN_WATCHED];

static uint64_t chain_now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* Has this fault come back so often, and for so long, that nobody mends it any more? A handler may well let an
   instruction try again and again, while another thread is about to mend the cause. */
static int chain_is_endless(uint32_t tid, uintptr_t pc, uintptr_t addr) {
    uint32_t at = tid % CHAIN_WATCHED;
    if (chain_watched[at].tid != tid || chain_watched[at].pc != pc || chain_watched[at].addr != addr) return 0;
    return chain_watched[at].n >= CHAIN_MOST_RETURNS && chain_now_ns() - chain_watched[at].since_ns >= CHAIN_MOST_NS;
}

static void chain_note(uint32_t tid, uintptr_t pc, uintptr_t addr, int is_mended) {
    uint32_t at = tid % CHAIN_WATCHED;
    int is_same = chain_watched[at].tid == tid && chain_watched[at].pc == pc && chain_watched[at].addr == addr;
    if (is_mended) {
        if (is_same) chain_watched[at].n = 0;
        return;
    }
    if (!is_same || chain_watched[at].n == 0) {
        chain_watched[at].tid = tid;
        chain_watched[at].pc = pc;
        chain_watched[at].addr = addr;
        chain_watched[at].since_ns = chain_now_ns();
        chain_watched[at].n = 0;
    }
    chain_watched[at].n++;
}

/* Back to the default: once the handler returns, the instruction runs again and ends the process where it
   stands, core dump and all. A signal that somebody has sent is sent again. */
static void chain_end_process(int sig, const siginfo_t *info, uint32_t tid) {
    struct sigaction gone;
    memset(&gone, 0, sizeof gone);
    gone.sa_handler = SIG_DFL;
    sigaction(sig, &gone, (struct sigaction *)0);
    if (info->si_code <= 0) syscall(SYS_tgkill, getpid(), (pid_t)tid, sig);
}

/* For the handler of a link, and a signal that is not ours: do what the kernel would have done had what is below
   been the handler in place. */
static void chain_pass_on(chain *c, int k, int sig, siginfo_t *info, void *context) {
    chain_link *link = &c->links[k];
    struct sigaction was = chain_below(link);
    ucontext_t *uc = (ucontext_t *)context;
    uint32_t tid = (uint32_t)syscall(SYS_gettid);
    uintptr_t pc = CHAIN_PC(uc), addr = (uintptr_t)info->si_addr;
    int is_fault = info->si_code > 0, could_read = 0, could_write = 0, saved = errno;
    unsigned char registers[sizeof CHAIN_REGISTERS(uc)];
    sigset_t mask, before;
    /* A signal that is sent may be ignored; a fault never is. */
    if (was.sa_handler == SIG_IGN && !is_fault) return;
    /* To be called once: by the first of all threads. */
    if (chain_calls(&was) && (was.sa_flags & SA_RESETHAND) && __atomic_exchange_n(&link->spent, 1, __ATOMIC_RELAXED))
        was.sa_handler = SIG_DFL;
    if (!chain_calls(&was) || (is_fault && chain_is_endless(tid, pc, addr))) {
        chain_end_process(sig, info, tid);
        return;
    }
    if (is_fault) {
        could_read = chain_readable(addr);
        could_write = chain_writable(addr);
        memcpy(registers, CHAIN_REGISTERS(uc), sizeof registers);
        errno = saved;
    }
    mask = was.sa_mask;
    for (int other = 1; other < 65; other++)
        if (sigismember(&uc->uc_sigmask, other) == 1) sigaddset(&mask, other);
    if (!(was.sa_flags & SA_NODEFER)) sigaddset(&mask, sig);
    pthread_sigmask(SIG_SETMASK, &mask, &before);
    if (was.sa_flags & SA_SIGINFO) was.sa_sigaction(sig, info, context);
    else was.sa_handler(sig);
    pthread_sigmask(SIG_SETMASK, &before, (sigset_t *)0);
    if (is_fault) {
        saved = errno;
        chain_note(tid, pc, addr,
                   pc != CHAIN_PC(uc) || memcmp(registers, CHAIN_REGISTERS(uc), sizeof registers) != 0
                       || could_read != chain_readable(addr) || could_write != chain_writable(addr));
        errno = saved;
    }
}

#endif
