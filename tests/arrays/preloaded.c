/* A malloc that is put before the C library's, counts, and has the memory from there, by its other names. */

#include <stddef.h>

void *__libc_malloc(size_t);
void *__libc_calloc(size_t, size_t);
void *__libc_realloc(void *, size_t);
void __libc_free(void *);

unsigned long preloaded_n_calls;

static void count(void) { __atomic_add_fetch(&preloaded_n_calls, 1, __ATOMIC_RELAXED); }

void *malloc(size_t n) {
    count();
    return __libc_malloc(n);
}

void *calloc(size_t n, size_t size) {
    count();
    return __libc_calloc(n, size);
}

void *realloc(void *at, size_t n) {
    count();
    return __libc_realloc(at, n);
}

void free(void *at) {
    count();
    __libc_free(at);
}
