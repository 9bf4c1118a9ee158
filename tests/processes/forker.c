/* Forks of plain C, in a thread that Python knows nothing of. The children use raw reads and writes only.
   And a thread of C that allocates, for forks that Python makes. */

#define _DEFAULT_SOURCE
#include <pthread.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#define WATCHDOG_SECONDS 60

struct job {
    unsigned char *bytes;
    const unsigned char *expected;
    size_t len;
    int n_forks;    /* one after the other; 0: a single one that is left running */
    int by_vfork;
    int news, orders; /* pipes of the one that is left running */
    long result;
};

/* 0: what is inherited is right, and it can be written. */
static int child(const struct job *job) {
    if (memcmp(job->bytes, job->expected, job->len) != 0) return 1;
    for (int value = 1; value < 4; value++) {
        memset(job->bytes, value, job->len);
        for (size_t i = 0; i < job->len; i++)
            if (job->bytes[i] != value) return 2;
    }
    return 0;
}

static void lasting_child(const struct job *job) {
    char byte = '.';
    int status = 3;
    alarm(WATCHDOG_SECONDS);
    if (memcmp(job->bytes, job->expected, job->len) == 0 && write(job->news, &byte, 1) == 1 &&
        read(job->orders, &byte, 1) == 1)
        status = child(job);
    _exit(status);
}

static long wait_for(pid_t pid) {
    int status;
    return pid < 0 || waitpid(pid, &status, 0) != pid || status != 0;
}

static void *run(void *argument) {
    struct job *job = argument;
    if (job->n_forks == 0) {
        job->result = fork();
        if (job->result == 0) lasting_child(job);
    }
    for (int i = 0; i < job->n_forks; i++) {
        pid_t pid;
        if (job->by_vfork) {
            /* It runs in this process's memory, so it only looks. */
            pid = vfork();
            if (pid == 0) _exit(memcmp(job->bytes, job->expected, job->len) != 0);
        } else {
            pid = fork();
            if (pid == 0) {
                alarm(WATCHDOG_SECONDS);
                _exit(child(job));
            }
        }
        job->result += wait_for(pid);
    }
    return 0;
}

static long in_a_thread(struct job *job) {
    pthread_t thread;
    if (pthread_create(&thread, 0, run, job) != 0) return -1;
    pthread_join(thread, 0);
    return job->result;
}

/* How many of `n_forks` children went wrong. */
long forker_many(unsigned char *bytes, const unsigned char *expected, size_t len, int n_forks, int by_vfork) {
    struct job job = {bytes, expected, len, n_forks, by_vfork, -1, -1, 0};
    return in_a_thread(&job);
}

/* The number of a child that writes a byte to `news`, waits for one on `orders`, and ends. */
long forker_one(unsigned char *bytes, const unsigned char *expected, size_t len, int news, int orders) {
    struct job job = {bytes, expected, len, 0, 0, news, orders, 0};
    return in_a_thread(&job);
}

/* Take and give back as NumPy does, but without the GIL, until it is over. */
void forker_allocate(void *(*take)(void *, size_t), void (*give)(void *, void *, size_t), void *context, size_t len,
                     const volatile int *over) {
    void *taken[8];
    while (!*over) {
        for (int i = 0; i < 8; i++) taken[i] = take(context, len + ((size_t)i << 13));
        for (int i = 0; i < 8; i += 2) give(context, taken[i], 0);
        for (int i = 1; i < 8; i += 2) give(context, taken[i], 0);
    }
}
