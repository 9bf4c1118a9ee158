/* The hooks of rows.h: each tells what it may write into, calls what is below, and forgets what it told, also where it
   is left by the cancellation of its thread. Included by calls.pyx only. */

#ifndef KSMCORE_HOOKS_H
#define KSMCORE_HOOKS_H

#include "_hooks/slots.h"
#include "_hooks/redirect.h"

#if defined(__GLIBC__)
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <sys/select.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/sysinfo.h>
#include <sys/uio.h>
#include <sys/utsname.h>
#include <sys/wait.h>

#define ADDRESS_BYTES sizeof(struct sockaddr_storage)
#define MOST_PARTS 1024 /* the kernel takes no more */
#define FCNTL_BYTES 64  /* a struct flock, if it is one */

/* Is SIGSEGV to be kept out of masks? */
static uint32_t hooks_keep_segv;

/* What the kernel may write for an ioctl(): many requests say, those of terminals and network devices do not. */
static size_t control_bytes(unsigned long what) {
    if (_IOC_DIR(what) == _IOC_NONE) return 256;
    return _IOC_DIR(what) & _IOC_READ ? _IOC_SIZE(what) : 0;
}

static const sigset_t *hooks_unmasked(const sigset_t *mask, sigset_t *own) {
    if (!mask || !__atomic_load_n(&hooks_keep_segv, __ATOMIC_RELAXED) || sigismember(mask, SIGSEGV) != 1) return mask;
    *own = *mask;
    sigdelset(own, SIGSEGV);
    return own;
}

static const struct sigaction *hooks_unmasked_action(const struct sigaction *action, struct sigaction *own) {
    if (!action || !__atomic_load_n(&hooks_keep_segv, __ATOMIC_RELAXED) || sigismember(&action->sa_mask, SIGSEGV) != 1)
        return action;
    *own = *action;
    sigdelset(&own->sa_mask, SIGSEGV);
    return own;
}

/* Who has handlers of SIGSEGV and SIGBUS of his own, and changes those of the program under them; NULL: nobody. */
typedef int hooks_action(int, const struct sigaction *, struct sigaction *);
typedef int hooks_asked(int);
static hooks_action *hooks_action_route;
static hooks_asked *hooks_is_over; /* is a handler of his in place at the moment? Set before the route */
static void hooks_route_actions(void *route, void *is_over) {
    hooks_is_over = (hooks_asked *)is_over;
    __atomic_store_n(&hooks_action_route, (hooks_action *)route, __ATOMIC_RELEASE);
}

static hooks_action *hooks_below_sigaction;
static sighandler_t (*hooks_below_signal)(int, sighandler_t);

static hooks_action *hooks_action_of(int sig) {
    hooks_action *route = __atomic_load_n(&hooks_action_route, __ATOMIC_ACQUIRE);
    return route && (sig == SIGSEGV || sig == SIGBUS) ? route : hooks_below_sigaction;
}

static int hooks_change_action(int sig, const struct sigaction *wanted, struct sigaction *was) {
    return hooks_action_of(sig)(sig, wanted, was);
}

/* As the C library has it: system calls go on after it, and it stays. (Unless siginterrupt() was called for it, which
   the C library alone knows of.) */
static sighandler_t hooks_change_handler(int sig, sighandler_t handler) {
    struct sigaction wanted = {.sa_flags = SA_RESTART}, own, was;
    hooks_action *change = hooks_action_of(sig);
    if (change == hooks_below_sigaction || handler == SIG_ERR || !hooks_is_over(sig))
        return hooks_below_signal(sig, handler);
    wanted.sa_handler = handler;
    sigaddset(&wanted.sa_mask, sig);
    return change(sig, hooks_unmasked_action(&wanted, &own), &was) == 0 ? was.sa_handler : SIG_ERR;
}

static void hooks_tell_each(slots_held *held, uintptr_t frame, const struct iovec *parts, size_t n) {
    for (size_t i = 0; parts && i < n && i < MOST_PARTS; i++)
        slots_tell(held, frame, parts[i].iov_base, parts[i].iov_len);
}

static void hooks_tell_message(slots_held *held, uintptr_t frame, const struct msghdr *to) {
    if (!to) return;
    hooks_tell_each(held, frame, to->msg_iov, to->msg_iovlen);
    slots_tell(held, frame, to, sizeof *to);
    slots_tell(held, frame, to->msg_name, to->msg_namelen);
    slots_tell(held, frame, to->msg_control, to->msg_controllen);
}

#define MAY_WRITE(at, len_bytes) slots_tell(&held, frame, (at), (len_bytes));
#define MAY_WRITE_EACH(parts, n) hooks_tell_each(&held, frame, (parts), (n) > 0 ? (size_t)(n) : 0);
#define MAY_WRITE_MESSAGE(to) hooks_tell_message(&held, frame, (to));
#define MAY_WRITE_SETS(n, a, b, c)                                        \
    for (size_t bytes = (n) > 0 ? ((size_t)(n) + 63) / 64 * 8 : 0; bytes; bytes = 0) { \
        MAY_WRITE(a, bytes) MAY_WRITE(b, bytes) MAY_WRITE(c, bytes)       \
    }
#define UNMASKED_IF(how, mask) ((how) == SIG_UNBLOCK ? (mask) : hooks_unmasked((mask), &(sigset_t){{0}}))
#define UNMASKED_ACTION(action) hooks_unmasked_action((action), &(struct sigaction){.sa_flags = 0})

/* A hook is entered by any thread at any moment, also by one that has no Python. */
#define HOOK(name, type, parameters, arguments, told, before, call)      \
    static type (*hooks_below_##name) parameters;                        \
    static type hooks_##name parameters {                                \
        const uintptr_t frame = (uintptr_t)__builtin_frame_address(0);   \
        __attribute__((cleanup(slots_end))) slots_held held;             \
        before                                                           \
        slots_begin(&held, frame);                                       \
        told                                                             \
        slots_meet(&held);                                               \
        return call arguments;                                           \
    }
#define ROW(name, type, parameters, arguments, ...) \
    HOOK(name, type, parameters, arguments, __VA_ARGS__, , hooks_below_##name)
#define MASK_ROW(name, type, parameters, arguments, ...) \
    HOOK(name, type, parameters, arguments, __VA_ARGS__, sigset_t own; mask = hooks_unmasked(mask, &own); \
         , hooks_below_##name)
#define INSTEAD_ROW(name, type, parameters, arguments, instead, ...) \
    HOOK(name, type, parameters, arguments, __VA_ARGS__, , instead)
#include "_hooks/rows.h"
#undef ROW
#undef MASK_ROW
#undef INSTEAD_ROW

#define ROW(name, type, parameters, arguments, ...) \
    {#name, (void *)hooks_##name, (void **)(void *)&hooks_below_##name, (void *)0},
#define MASK_ROW ROW
#define INSTEAD_ROW ROW
static redirect_row hooks_rows[] = {
#include "_hooks/rows.h"
};
#undef ROW
#undef MASK_ROW
#undef INSTEAD_ROW
static redirect_table hooks_table = {.rows = hooks_rows, .n_rows = sizeof hooks_rows / sizeof *hooks_rows};

#else
static uint32_t hooks_keep_segv;
static redirect_table hooks_table;
static void hooks_route_actions(void *route, void *is_over) { (void)route, (void)is_over; }
#endif

#endif
