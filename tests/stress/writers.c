/* Writers for the lost-write tests: they write without the GIL, in changing values that keep coming
   back to the same few, and check every word. Compiled by the tests themselves. */

#include <stdint.h>
#include <unistd.h>

static volatile int stop;

void writers_stop(int value) { stop = value; }

/* One thread owns words [8 * thread, 8 * thread + 8) of every page. It picks a page, checks that its
   words hold what it wrote there last, writes new ones, and checks those. Most values come from a small
   set, so that pages are equal again and again; one in eight is random. Returns the words that were
   wrong; *n_writes counts the words written. `last`: 8 words a page, what was written last. */
long writers_run(uint64_t *pages, long n_pages, long page_words, long thread, uint64_t *last,
                 uint64_t seed, long pause_us, uint64_t *n_writes) {
    uint64_t random = seed * 2654435761u + 88172645463325252u;
    uint64_t written = 0;
    long wrong = 0;
    while (!stop) {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        long page = (long)((random >> 8) % (uint64_t)n_pages);
        volatile uint64_t *words = pages + page * page_words + thread * 8;
        for (int k = 0; k < 8; k++) wrong += words[k] != last[page * 8 + k];
        uint64_t value = (random & 7) ? (random >> 40) % 4 : random;
        for (int k = 0; k < 8; k++) {
            words[k] = value + (uint64_t)k;
            last[page * 8 + k] = value + (uint64_t)k;
        }
        for (int k = 0; k < 8; k++) wrong += words[k] != value + (uint64_t)k;
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
    for (uint64_t round = 0; !stop; round++) {
        for (long page = 0; page < n_pages; page++)
            ((volatile uint64_t *)pages)[page * page_words] = round & 1 ? a : b;
        for (volatile long d = 0; d < delay; d++) {}
    }
}
