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
    uint32_t n_rows, n_users, n_entries, n_symbols, n_objects, n_refused, n_unready;
    uint64_t n_loads;
} redirect_table;

#endif
