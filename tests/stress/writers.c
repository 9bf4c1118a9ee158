/* Writers for the lost-write tests: they write without the GIL, in changing values that keep coming
   back to the same few, and check every word. Compiled by the tests themselves. */

#include <stdint.h>
#include <unistd.h>

volatile int writers_stopped; /* calls.c looks at it too */

void writers_stop(int value) { writers_stopped = value; }

/* One thread owns words [8 * thread, 8 * thread + 8) of every page. It picks a page, checks that its
   words hold what it wrote there last, writes new ones, and checks those. Most values come from a small
   set, so that pages are equal again and again; one in eight is the count of words written so far, which
   never comes back. The last of the eight is the sum of the others. Returns the words that were wrong;
   *n_writes counts the words written. `last`: 8 words a page, what was written last. */
long writers_run(uint64_t *pages, long n_pages, long page_words, long thread, uint64_t *last,
                 uint64_t seed, long pause_us, uint64_t *n_writes) {
    uint64_t random = seed * 2654435761u + 88172645463325252u;
    uint64_t written = 0;
    long wrong = 0;
    while (!writers_stopped) {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        long page = (long)((random >> 8) % (uint64_t)n_pages);
        volatile uint64_t *words = pages + page * page_words + thread * 8;
        uint64_t *was = last + page * 8;
        for (int k = 0; k < 8; k++) wrong += words[k] != was[k];
        uint64_t value = (random & 7) ? (random >> 40) % 4 : written + 4;
        uint64_t sum = 0;
        for (int k = 0; k < 8; k++) {
            was[k] = k < 7 ? value + (value ? (uint64_t)k : 0) : sum;
            sum += was[k];
            words[k] = was[k];
        }
        for (int k = 0; k < 8; k++) wrong += words[k] != was[k];
        written += 8;
        *n_writes = written;
        if (pause_us && (random & 0xff) == 0) usleep((useconds_t)pause_us);
    }
    for (long page = 0; page < n_pages; page++)
        for (int k = 0; k < 8; k++) wrong += pages[page * page_words + thread * 8 + k] != last[page * 8 + k];
    return wrong;
}

/* Change one word of every page between two values, as fast as it goes: every comparison that the
   scanner makes may come out differently the next time. */
void writers_flip(uint64_t *pages, long n_pages, long page_words, uint64_t a, uint64_t b, long delay) {
    for (uint64_t round = 0; !writers_stopped; round++) {
        for (long page = 0; page < n_pages; page++)
            ((volatile uint64_t *)pages)[page * page_words] = round & 1 ? a : b;
        for (volatile long d = 0; d < delay; d++) {}
    }
}
