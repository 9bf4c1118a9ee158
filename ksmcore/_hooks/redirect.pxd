"""Redirecting functions of the C library for all loaded objects; see redirect.pyx."""

from libc.stdint cimport uint32_t, uint64_t


cdef extern from "_hooks/redirect.h":
    # A function of the C library, by its name, and what is to be called instead. `below` is found once.
    ctypedef struct redirect_row:
        const char* name
        void* hook
        void** below
        void* beside           # another function of that name, in a library that older C libraries have beside them

    # Rows that are redirected together. Each table belongs to one module, which has it for good.
    ctypedef struct redirect_table:
        redirect_row* rows
        uint32_t n_rows
        uint32_t n_users       # the rest is under the redirect lock
        uint32_t n_entries     # changed the last time
        uint32_t n_symbols
        uint32_t n_objects
        uint32_t n_refused
        uint32_t n_unready
        uint64_t n_loads

# None: functions can be redirected here; else why not.
cdef object redirect_missing()
# Once, before anything else is done with a table, and without any lock: what is below each hook.
cdef void redirect_find(redirect_table* table)
# Of the functions of all tables: those that another library's come before.
cdef uint32_t redirect_others()
# Is this function, found below a hook, the program's own? Then its own calls of it may go past all tables.
cdef bint redirect_is_programs(const void* function)
# Counted: the first redirects, the last puts back. Neither needs the GIL, nor fails: what could not be is counted.
cdef void redirect_put(redirect_table* table) noexcept nogil
cdef void redirect_back(redirect_table* table) noexcept nogil
# Objects that have been loaded since: some hundred nanoseconds where there are none.
cdef void redirect_look(redirect_table* table) noexcept nogil
