/* A signal handler as profilers and supervisors have them, that writes into given memory on whatever thread the
   signal comes, and checks what it wrote there before. Compiled by the tests themselves. */

#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

/* One word of each page belongs to each thread: the last ones of the page. */
#define MOST_THREADS 64

static struct {
    uint64_t *pages, *models; /* models: what each thread wrote last, MOST_THREADS words a page */
    long n_pages, page_words, n_each;
    uint32_t n_threads, epoch;
    int64_t n_wrong;
    struct { int32_t tid; int64_t n_runs; } threads[MOST_THREADS];
    volatile int stopped;
} all;

/* In the memory that each thread has from birth: the first access must not allocate. */
#define AT_HAND __attribute__((tls_model("initial-exec")))
static AT_HAND __thread struct { uint32_t epoch, place; uint64_t random; } mine;

static void wrong(void) { __atomic_add_fetch(&all.n_wrong, 1, __ATOMIC_RELAXED); }

static void handle(int sig) {
    int saved = errno;
    (void)sig;
    if (mine.epoch != all.epoch) {
        mine.epoch = all.epoch;
        mine.place = __atomic_fetch_add(&all.n_threads, 1, __ATOMIC_RELAXED);
        mine.random = (mine.place + 1) * 2654435761u + 88172645463325252u;
        if (mine.place < MOST_THREADS) all.threads[mine.place].tid = (int32_t)syscall(SYS_gettid);
    }
    for (long i = 0; i < all.n_each && mine.place < MOST_THREADS; i++) {
        mine.random ^= mine.random << 13;
        mine.random ^= mine.random >> 7;
        mine.random ^= mine.random << 17;
        long page = (long)((mine.random >> 8) % (uint64_t)all.n_pages);
        volatile uint64_t *word = all.pages + (page + 1) * all.page_words - 1 - mine.place;
        uint64_t *model = all.models + page * MOST_THREADS + mine.place;
        uint64_t value = (mine.random & 7) ? (mine.random >> 40) % 2 : mine.random;
        if (*word != *model) wrong();
        *word = *model = value;
        if (*word != value) wrong();
    }
    if (mine.place < MOST_THREADS) __atomic_add_fetch(&all.threads[mine.place].n_runs, 1, __ATOMIC_RELEASE);
    errno = saved;
}

/* The memory is zeros, as far as it is the handler's. -1: no memory. */
int handlers_begin(int sig, uint64_t *pages, long n_pages, long page_words, long n_each) {
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_handler = handle;
    action.sa_flags = SA_RESTART;
    all.pages = pages;
    all.n_pages = n_pages;
    all.page_words = page_words;
    all.n_each = n_each;
    all.models = calloc((size_t)n_pages, MOST_THREADS * sizeof *all.models);
    all.n_threads = 0;
    all.n_wrong = 0;
    memset(all.threads, 0, sizeof all.threads);
    all.epoch++;
    all.stopped = 0;
    return all.models ? sigaction(sig, &action, NULL) : -1;
}

/* The thread of this: send the signal to each other thread, one after the other, until stopped. */
long handlers_send(int sig, long pause_us) {
    long n_sent = 0, self = syscall(SYS_gettid);
    while (!all.stopped) {
        DIR *tasks = opendir("/proc/self/task");
        struct dirent *task;
        while (tasks && (task = readdir(tasks))) {
            long tid = atol(task->d_name);
            if (tid <= 0 || tid == self || all.stopped) continue;
            n_sent += syscall(SYS_tgkill, getpid(), tid, sig) == 0;
            usleep((useconds_t)pause_us);
        }
        if (tasks) closedir(tasks);
        else usleep((useconds_t)pause_us);
    }
    return n_sent;
}

void handlers_stop(void) { all.stopped = 1; }

/* How often the handler ran on this thread, 0: on any. */
long handlers_runs(int tid) {
    int64_t n = 0;
    for (int i = 0; i < MOST_THREADS; i++)
        if (!tid || all.threads[i].tid == tid) n += __atomic_load_n(&all.threads[i].n_runs, __ATOMIC_ACQUIRE);
    return (long)n;
}

/* Take the handler out, and count the words that were wrong, then or now. A signal that is still on its way is
   ignored. */
long handlers_end(int sig) {
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_handler = SIG_IGN;
    sigaction(sig, &action, NULL);
    for (long page = 0; page < all.n_pages; page++)
        for (long k = 0; k < MOST_THREADS; k++)
            all.n_wrong += all.pages[(page + 1) * all.page_words - 1 - k] != all.models[page * MOST_THREADS + k];
    free(all.models);
    all.models = NULL;
    return (long)all.n_wrong;
}
