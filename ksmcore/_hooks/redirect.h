/* What redirect.pyx redirects; and its lock. */

#ifndef KSMCORE_REDIRECT_H
#define KSMCORE_REDIRECT_H

#include <stdint.h>

typedef struct {
    const char *name;
    void *hook, **below, *beside;
} redirect_row;

typedef struct {
    redirect_row *rows;
    int of_the_process; /* not the C library's functions, but those that the process uses in their place */
    uint32_t n_rows, n_users, n_entries, n_symbols, n_objects, n_refused, n_unready;
    uint64_t n_loads;
} redirect_table;

#endif
