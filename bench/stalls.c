/* The writer of bench_stalls.py: it writes without the GIL, at a steady pace, into pages that are being
   merged, and takes the time of every single store. Compiled by the benchmark itself. */

#define _GNU_SOURCE
#include <stdint.h>
#include <sys/resource.h>
#include <time.h>

/* A histogram has HALF buckets for each power of two: a value is known to a part in HALF. */
enum { HALF_BITS = 5, HALF = 1 << HALF_BITS, N_BUCKETS = 2 * HALF + (63 - HALF_BITS) * HALF };

/* What happened during a store; the rows of the histogram. */
enum { FAST, WAITED, COPIED, PREEMPTED, OTHER, N_KINDS };

/* No fault of any kind takes less, and no store without one takes as long. */
enum { SLOW_NS = 500 };

long stalls_n_buckets(void) { return N_BUCKETS; }
long stalls_n_kinds(void) { return N_KINDS; }

static long bucket_of(uint64_t ns) {
    if (ns < 2 * HALF) return (long)ns;
    int shift = 63 - __builtin_clzll(ns) - HALF_BITS;
    return (long)shift * HALF + (long)(ns >> shift);
}

/* The largest value of a bucket. */
uint64_t stalls_bucket_end(long bucket) {
    if (bucket < 2 * HALF) return (uint64_t)bucket;
    long shift = bucket / HALF - 1;
    return ((uint64_t)(bucket - shift * HALF + 1) << shift) - 1;
}

static uint64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* Was the thread off the processor of its own will (it waited for the guard, or for a lock of the
   kernel), or not of its own will, or did a fault give it a page? What happened first in this list
   counts. Else it was an interrupt, or the hypervisor. A wait for the guard that was over before the
   thread could fall asleep is found under what came next: a copy, or nothing. */
static int kind_of(const struct rusage *before) {
    struct rusage after;
    getrusage(RUSAGE_THREAD, &after);
    if (after.ru_nvcsw != before->ru_nvcsw) return WAITED;
    if (after.ru_nivcsw != before->ru_nivcsw) return PREEMPTED;
    if (after.ru_minflt != before->ru_minflt) return COPIED;
    return OTHER;
}

/* For `for_ns`, go over stretches of neighbouring pages and store one value into word `word` of each,
   a store every `pace_ns`. The value is 0 or 1, which makes the page equal to one of two others, in one
   stretch of eight a new one, which makes it equal to none. last[page]: what was stored there last.
   Stretches are `n_together` pages long and begin at a multiple of that; n_pages is one too.

   counts: N_KINDS rows of N_BUCKETS. longest: N_KINDS values. Returns the number of stores. */
uint64_t stalls_run(uint64_t *pages, long n_pages, long page_words, long word, long n_together,
                    uint64_t seed, uint64_t for_ns, uint64_t pace_ns, uint64_t *last, uint64_t *counts,
                    uint64_t *longest) {
    uint64_t random = seed * 2654435761u + 88172645463325252u;
    uint64_t n_stores = 0, due = now_ns();
    const uint64_t end = due + for_ns;
    while (due < end) {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        long page = (long)((random >> 8) % (uint64_t)(n_pages / n_together)) * n_together;
        uint64_t value = (random & 7) ? (random >> 40) & 1 : random | 2;
        for (long stop = page + n_together; page < stop; page++) {
            volatile uint64_t *where = pages + page * page_words + word;
            struct rusage before;
            uint64_t start, took;
            int kind;
            while (now_ns() < due) {}
            getrusage(RUSAGE_THREAD, &before);
            start = now_ns();
            *where = value;
            took = now_ns() - start;
            kind = took < SLOW_NS ? FAST : kind_of(&before);
            counts[kind * N_BUCKETS + bucket_of(took)]++;
            if (took > longest[kind]) longest[kind] = took;
            last[page] = value;
            n_stores++;
            /* After a stall the pace goes on from there: what was missed is not made up for, or a guard
               with long stalls would get a denser load than the others. */
            due += pace_ns;
            if (due < start + took) due = start + took;
        }
    }
    return n_stores;
}
