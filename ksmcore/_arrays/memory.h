/* malloc and its kin: blocks of the threshold and more come from the arena, the others from whoever was there before
   (the C library, or another malloc in its place), told apart by their addresses. Included by memory.pyx only.

   Hooks may be called by any thread at any moment, by threads without Python and in the midst of a fork: nothing here
   wants the GIL, or allocates through itself (our own modules are not redirected). What is below is the right place
   for whatever the arena does not take: so a hook never fails where there would be memory without it. */

#ifndef KSMCORE_MEMORY_H
#define KSMCORE_MEMORY_H

#include <errno.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "_hooks/redirect.h"

#define MEMORY_NEVER SIZE_MAX

typedef struct {
    void *(*take)(size_t, int zeroed);
    int (*owns)(const void *, size_t *len_bytes);
    int (*give)(void *);
    int (*grow)(void *, size_t);
    int (*shrink)(void *, size_t);
    int (*move)(void *, void *);
} memory_source;

static memory_source memory_arena;
static size_t memory_page_bytes;

/* What every call looks at, however small: in one line of the processor's cache. */
static struct {
    size_t threshold; /* of what is large; set last */
    void *(*malloc)(size_t);
    void (*free)(void *);
    void *(*realloc)(void *, size_t);
    void *(*calloc)(size_t, size_t);
    int (*posix_memalign)(void **, size_t, size_t);
    void *(*aligned_alloc)(size_t, size_t);
    void *(*memalign)(size_t, size_t);
    void *(*valloc)(size_t);
    void *(*pvalloc)(size_t);
    void *(*reallocarray)(void *, size_t, size_t);
    size_t (*malloc_usable_size)(void *);
} below __attribute__((aligned(64))) = {.threshold = MEMORY_NEVER};

/* Of small blocks only these run: a comparison, and a jump to what is below. The rest is kept out of them, so that they
   need no room on the stack. */
#define SELDOM __attribute__((noinline, cold))

static inline int memory_is_large(size_t n) {
    return __builtin_expect(n >= __atomic_load_n(&below.threshold, __ATOMIC_RELAXED), 0);
}

/* The arena's blocks begin with a page, of 4 KiB or more anywhere: nothing else is looked up. NULL, too, may be. */
static inline int memory_may_be_ours(const void *at) { return __builtin_expect(!((uintptr_t)at & 4095), 0); }

/* NULL: to be had below. errno is as it was. */
static void *memory_take(size_t n, int zeroed) {
    int before = errno;
    void *taken = memory_arena.take(n, zeroed);
    errno = before;
    return taken;
}

static void *memory_take_aligned(size_t alignment, size_t n) {
    if (!memory_is_large(n) || alignment > memory_page_bytes) return (void *)0;
    return memory_take(n, 0);
}

static int memory_give(void *at) {
    int before = errno, was_ours;
    if (!at || !memory_may_be_ours(at)) return 0;
    was_ours = memory_arena.give(at);
    errno = before;
    return was_ours;
}

static int memory_owns(const void *at, size_t *len_bytes) {
    return at && memory_may_be_ours(at) && memory_arena.owns(at, len_bytes);
}

SELDOM static void *memory_malloc_large(size_t n) {
    void *taken = memory_take(n, 0);
    return taken ? taken : below.malloc(n);
}

static void *memory_malloc(size_t n) { return memory_is_large(n) ? memory_malloc_large(n) : below.malloc(n); }

SELDOM static void *memory_calloc_large(size_t n, size_t size) {
    void *taken = memory_take(n * size, 1);
    return taken ? taken : below.calloc(n, size);
}

static void *memory_calloc(size_t n, size_t size) {
    size_t all;
    if (__builtin_mul_overflow(n, size, &all) || !memory_is_large(all)) return below.calloc(n, size);
    return memory_calloc_large(n, size);
}

SELDOM static void memory_free_page(void *at) {
    if (!memory_give(at)) below.free(at);
}

static void memory_free(void *at) {
    if (memory_may_be_ours(at)) memory_free_page(at);
    else below.free(at);
}

static size_t memory_usable_size(void *at) {
    size_t len_bytes;
    return memory_owns(at, &len_bytes) ? len_bytes : below.malloc_usable_size(at);
}

/* What grows once mostly grows again: half as much more, which costs addresses only until it is touched. */
static size_t memory_with_room(size_t n) { return n < SIZE_MAX / 4 ? n + n / 2 : n; }

static void *memory_move(void *at, size_t there, size_t n) {
    int before = errno;
    void *to = memory_arena.take(memory_with_room(n), 0);
    if (!to) to = below.malloc(n);
    if (!to) return (void *)0;
    if (!memory_arena.move(at, to)) {
        memcpy(to, at, there < n ? there : n);
        memory_arena.give(at);
    }
    errno = before;
    return to;
}

SELDOM static void *memory_realloc_large(void *at, size_t n) {
    size_t there;
    void *to;
    if (!at) return memory_malloc(n);
    if (!memory_owns(at, &there)) {
        /* What has been growing below moves here when it is large enough. */
        if (!memory_is_large(n) || (there = below.malloc_usable_size(at)) >= n) return below.realloc(at, n);
        if (memory_is_large(there) || !(to = memory_take(memory_with_room(n), 0))) return below.realloc(at, n);
        memcpy(to, at, there);
        below.free(at);
        return to;
    }
    if (n == 0) {
        memory_free(at);
        return (void *)0;
    }
    if (n <= there) {
        int before = errno, stays = memory_arena.shrink(at, n);
        errno = before;
        if (stays) return at;
        if (!(to = memory_malloc(n))) return at;
        memcpy(to, at, n);
        memory_give(at);
        return to;
    }
    return memory_arena.grow(at, n) ? at : memory_move(at, there, n);
}

static void *memory_realloc(void *at, size_t n) {
    return memory_is_large(n) || memory_may_be_ours(at) ? memory_realloc_large(at, n) : below.realloc(at, n);
}

static void *memory_reallocarray(void *at, size_t n, size_t size) {
    size_t all;
    if (__builtin_mul_overflow(n, size, &all)) {
        errno = ENOMEM;
        return (void *)0;
    }
    return memory_realloc(at, all);
}

static int memory_posix_memalign(void **to, size_t alignment, size_t n) {
    /* Alignments that are none are refused below. */
    int is_one = alignment % sizeof(void *) == 0 && alignment && !(alignment & (alignment - 1));
    void *taken = is_one ? memory_take_aligned(alignment, n) : (void *)0;
    if (!taken) return below.posix_memalign(to, alignment, n);
    *to = taken;
    return 0;
}

static void *memory_aligned_alloc(size_t alignment, size_t n) {
    void *taken = alignment && !(alignment & (alignment - 1)) ? memory_take_aligned(alignment, n) : (void *)0;
    return taken ? taken : below.aligned_alloc(alignment, n);
}

static void *memory_memalign(size_t alignment, size_t n) {
    void *taken = memory_take_aligned(alignment, n);
    return taken ? taken : below.memalign(alignment, n);
}

static void *memory_valloc(size_t n) {
    void *taken = memory_take_aligned(1, n);
    return taken ? taken : below.valloc(n);
}

static void *memory_pvalloc(size_t n) {
    void *taken = memory_take_aligned(1, n);
    return taken ? taken : below.pvalloc(n);
}

#define ROW(name, hook) {#name, (void *)hook, (void **)(void *)&below.name, (void *)0}
static redirect_row memory_rows[] = {
    ROW(malloc, memory_malloc),
    ROW(calloc, memory_calloc),
    ROW(realloc, memory_realloc),
    ROW(free, memory_free),
    ROW(posix_memalign, memory_posix_memalign),
    ROW(aligned_alloc, memory_aligned_alloc),
    ROW(memalign, memory_memalign),
    ROW(valloc, memory_valloc),
    ROW(pvalloc, memory_pvalloc),
    ROW(reallocarray, memory_reallocarray),
    ROW(malloc_usable_size, memory_usable_size),
};
#undef ROW
static redirect_table memory_table = {
    .rows = memory_rows, .n_rows = sizeof memory_rows / sizeof *memory_rows, .of_the_process = 1};

#endif
