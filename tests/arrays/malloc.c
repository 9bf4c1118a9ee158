/* Threads that allocate, grow and give back in turns, across threads, and check every block. */

#include <errno.h>
#include <malloc.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define BLOCKS 64

typedef struct {
    unsigned char *at;
    size_t n;
    unsigned char value;
} block;

static block blocks[BLOCKS];
static pthread_mutex_t locks[BLOCKS];
static long n_wrong, n_refused;
static long most_bytes;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void make_locks(void) {
    for (int i = 0; i < BLOCKS; i++) pthread_mutex_init(&locks[i], 0);
}

static uint64_t next(uint64_t *seed) {
    *seed ^= *seed << 13, *seed ^= *seed >> 7, *seed ^= *seed << 17;
    return *seed;
}

/* Its ends and some bytes between. */
static int is_right(const block *one, size_t n) {
    for (size_t i = 0; i < n; i += 1 + n / 61)
        if (one->at[i] != one->value) return 0;
    return !n || one->at[n - 1] == one->value;
}

static void fill(block *one, uint64_t value) {
    one->value = (unsigned char)(value % 255 + 1);
    memset(one->at, one->value, one->n);
}

static unsigned char *taken(uint64_t how, size_t n) {
    void *at = 0;
    size_t alignment = (size_t)16 << how / 8 % 9;
    switch (how % 8) {
    case 0: case 1: return malloc(n);
    case 2: {
        unsigned char *zeros = calloc(1, n);
        for (size_t i = 0; zeros && i < n; i += 1 + n / 61)
            if (zeros[i]) __atomic_add_fetch(&n_wrong, 1, __ATOMIC_RELAXED);
        return zeros;
    }
    case 3: if (posix_memalign(&at, alignment, n)) at = 0; break;
    case 4: at = aligned_alloc(alignment, (n + alignment - 1) / alignment * alignment); break;
    case 5: at = memalign(alignment, n); break;
    case 6: alignment = 4096; at = valloc(n); break;
    default: return realloc(0, n);
    }
    if (at && (uintptr_t)at % alignment) __atomic_add_fetch(&n_wrong, 1, __ATOMIC_RELAXED);
    return at;
}

static void turn(uint64_t *seed) {
    int i = (int)(next(seed) % BLOCKS);
    block *one = &blocks[i];
    size_t n = 1 + next(seed) % (1u << (4 + next(seed) % 17)) % (size_t)most_bytes;
    pthread_mutex_lock(&locks[i]);
    errno = 77;
    if (!one->at) {
        one->at = taken(next(seed), n);
        one->n = one->at ? n : 0;
        if (one->at) fill(one, next(seed));
        else n_refused++;
    } else if (!is_right(one, one->n) || malloc_usable_size(one->at) < one->n) {
        __atomic_add_fetch(&n_wrong, 1, __ATOMIC_RELAXED);
        one->at = 0;
    } else if (next(seed) % 2) {
        free(one->at);
        one->at = 0;
        if (errno != 77) __atomic_add_fetch(&n_wrong, 1, __ATOMIC_RELAXED);
    } else {
        unsigned char *at = next(seed) % 2 ? realloc(one->at, n) : reallocarray(one->at, n, 1);
        if (at) {
            one->at = at;
            if (!is_right(one, n < one->n ? n : one->n)) __atomic_add_fetch(&n_wrong, 1, __ATOMIC_RELAXED);
            one->n = n;
            fill(one, next(seed));
        } else n_refused++;
    }
    pthread_mutex_unlock(&locks[i]);
}

typedef struct {
    long n_turns;
    uint64_t seed;
} work;

static void *run(void *data) {
    work *mine = data;
    for (long i = 0; i < mine->n_turns; i++) turn(&mine->seed);
    return 0;
}

/* What went wrong; what is left stays for the next call. */
long stress(long n_threads, long n_turns, long seed, long most) {
    pthread_t threads[16];
    work all[16];
    pthread_once(&once, make_locks);
    most_bytes = most;
    for (long i = 0; i < n_threads; i++) {
        all[i].n_turns = n_turns;
        all[i].seed = (uint64_t)(seed * 16 + i + 1) * 0x9e3779b97f4a7c15u;
        pthread_create(&threads[i], 0, run, &all[i]);
    }
    for (long i = 0; i < n_threads; i++) pthread_join(threads[i], 0);
    return n_wrong;
}

long give_all_back(void) {
    for (int i = 0; i < BLOCKS; i++) {
        if (blocks[i].at && !is_right(&blocks[i], blocks[i].n)) n_wrong++;
        free(blocks[i].at);
        blocks[i].at = 0;
    }
    return n_wrong;
}

void give_back(void *at) { free(at); }

/* A vector that grows by little, as many programs' do. */
long grow(long n_bytes, long step) {
    unsigned char *at = 0;
    for (long n = step; n <= n_bytes; n += step) {
        unsigned char *grown = realloc(at, (size_t)n);
        if (!grown) return -1;
        at = grown;
        memset(at + n - step, (int)(n / step % 251), (size_t)step);
    }
    for (long n = step; n <= n_bytes; n += step)
        if (at[n - 1] != n / step % 251 || at[n - step] != n / step % 251) return -2;
    free(at);
    return 0;
}
