/* Calls that end otherwise than by returning, for the tests of this folder. */

#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

/* `read` as an entry that is bound at once, and as a pointer in a table. */
ssize_t (*const native_table[])(int, void *, size_t) = {read};

ssize_t native_read(int fd, void *to, size_t n) { return read(fd, to, n); }
ssize_t native_read_by_table(int fd, void *to, size_t n) { return native_table[0](fd, to, n); }
uintptr_t native_entry(void) { return (uintptr_t)native_table[0]; }

/* ---- a thread that reads, and is cancelled ---- */

struct job {
    int fd;
    void *to;
    size_t n;
};
static struct job job;
static pthread_t job_thread;

static void *job_run(void *unused) {
    (void)unused;
    pthread_setcanceltype(PTHREAD_CANCEL_DEFERRED, NULL);
    return (void *)read(job.fd, job.to, job.n);
}

int native_start(int fd, void *to, size_t n) {
    job = (struct job){fd, to, n};
    return pthread_create(&job_thread, NULL, job_run, NULL);
}

int native_cancel(void) { return pthread_cancel(job_thread); }

/* 1: it was cancelled. */
int native_join(void) {
    void *result;
    pthread_join(job_thread, &result);
    return result == PTHREAD_CANCELED;
}

/* ---- a handler on top of a read ---- */

enum { READ_TOO, JUMP, FORK };
static int handler_does, handler_fd, child_status;
static void *handler_to;
static ssize_t handler_read;
static sigjmp_buf handler_back;
static volatile pid_t child;

static void handler(int sig) {
    int saved = errno;
    (void)sig;
    if (handler_does == READ_TOO) handler_read = read(handler_fd, handler_to, 8);
    if (handler_does == JUMP) siglongjmp(handler_back, 1);
    if (handler_does == FORK) {
        child = fork();
        /* The child goes on with the read that was interrupted. */
    }
    errno = saved;
}

/* Of how many parts the read that is interrupted is made; of so many bytes each. */
int native_parts = 1;

static ssize_t read_in_parts(int fd, void *to, size_t n) {
    struct iovec parts[16];
    if (native_parts == 1) return read(fd, to, n);
    for (int i = 0; i < native_parts; i++) parts[i] = (struct iovec){(char *)to + (size_t)i * n, n};
    return readv(fd, parts, native_parts);
}

/* Read, in a thread that handles SIGUSR1 in the meantime as said, on a stack of its own with `on_stack`; -2 when the
   handler jumped out. In a child that the handler has made, exits with what was read. */
ssize_t native_interrupted(int does, int fd, void *to, size_t n, int second_fd, void *second_to, void *on_stack,
                           size_t stack_bytes) {
    struct sigaction action, before;
    stack_t stack = {.ss_sp = on_stack, .ss_size = stack_bytes}, stack_before;
    ssize_t got;
    memset(&action, 0, sizeof action);
    action.sa_handler = handler;
    action.sa_flags = SA_RESTART | (on_stack ? SA_ONSTACK : 0);
    handler_does = does;
    handler_fd = second_fd;
    handler_to = second_to;
    handler_read = -1;
    child = -1;
    if (on_stack) sigaltstack(&stack, &stack_before);
    sigaction(SIGUSR1, &action, &before);
    if (sigsetjmp(handler_back, 1) == 0) got = read_in_parts(fd, to, n);
    else got = -2;
    if (child == 0) _exit((int)got);
    sigaction(SIGUSR1, &before, NULL);
    if (on_stack) sigaltstack(&stack_before, NULL);
    if (child > 0) waitpid(child, &child_status, 0);
    return got;
}

long native_handler_read(void) { return handler_read; }
int native_child(void) { return child; }
int native_child_status(void) { return child_status; }

/* ---- many threads at a time ---- */

static volatile int crowd_stopped;
static void *crowd_target;

static void *crowd_run(void *fd) {
    char byte;
    return (void *)(read((int)(intptr_t)fd, crowd_target ? crowd_target : &byte, 1) == 1 ? (intptr_t)0 : 1);
}

/* Start `n` threads that wait in read(); returns how many there are. */
int native_crowd(pthread_t *threads, int n, int fd, void *to) {
    pthread_attr_t attributes;
    int i;
    crowd_target = to;
    crowd_stopped = 0;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, 65536);
    for (i = 0; i < n; i++)
        if (pthread_create(&threads[i], &attributes, crowd_run, (void *)(intptr_t)fd) != 0) break;
    return i;
}

int native_crowd_join(pthread_t *threads, int n) {
    int n_wrong = 0;
    for (int i = 0; i < n; i++) {
        void *result;
        pthread_join(threads[i], &result);
        n_wrong += result != NULL;
    }
    return n_wrong;
}

/* ---- masks ---- */

/* Whether SIGSEGV is blocked after all signals have been: bit 0 by pthread_sigmask, bit 1 by sigprocmask, bit 2 in a
   handler whose sigaction() asks for all. The mask is as before afterwards. */
static volatile sig_atomic_t mask_seen;
static void mask_handler(int sig) {
    sigset_t now;
    (void)sig;
    pthread_sigmask(SIG_BLOCK, NULL, &now);
    mask_seen = sigismember(&now, SIGSEGV);
}

int native_masks(void) {
    sigset_t all, before, now;
    struct sigaction action, old;
    int found = 0;
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, &before);
    pthread_sigmask(SIG_BLOCK, NULL, &now);
    found |= sigismember(&now, SIGSEGV) | (sigismember(&now, SIGUSR2) ? 0 : 8);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    sigprocmask(SIG_SETMASK, &all, NULL);
    sigprocmask(SIG_SETMASK, NULL, &now);
    found |= sigismember(&now, SIGSEGV) << 1;
    sigprocmask(SIG_SETMASK, &before, NULL);
    memset(&action, 0, sizeof action);
    action.sa_handler = mask_handler;
    action.sa_mask = all;
    sigaction(SIGUSR2, &action, &old);
    mask_seen = 8;
    raise(SIGUSR2);
    found |= mask_seen << 2;
    sigaction(SIGUSR2, &old, NULL);
    return found;
}
