"""Redirecting functions of the C library for all loaded objects, and putting them back.

Hooks stay callable for ever: a module that defines some is never unloaded, and who has the address of one (from dlsym,
in a table of its own) may keep it. So a hook that is not in use any more just calls what is below.

What goes past it all: addresses taken by dlsym before, functions of objects that are linked statically, system
calls made without the C library; and objects that an older loader has put where symbols cannot be changed, until they
are looked at.

Lock order: a table is changed under the redirect lock, and the loader's lock of its list, which the loader never
holds while it calls anybody but who walks through that list. So neither is what another thread may hold in
the constructor of an object. The lock is held around a fork: no child finds a table half changed.

A thread that loads or unloads an object may hold the loader's lock when another one forks, and then the child never
gets it. Such a child leaves all tables as its parent had them. To wait for that lock before a fork would be to wait for
whoever goes through the list, with locks that forks take earlier.
"""

from libc.stdint cimport uint32_t

# Its hooks of a fork come before those here, so that signals are let in last.
import ksmcore._kernel.forks

cdef extern from *:
    """
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    #include <pthread.h>
    #include "_kernel/signals.h"
    #include "_hooks/redirect.h"

    #if defined(__GLIBC__) && (defined(__x86_64__) || defined(__aarch64__))
    #define REDIRECT_CAN 1
    #include "_hooks/objects.h"
    #include <sys/auxv.h>
    #if defined(__x86_64__)
    #define REDIRECT_OLDEST "GLIBC_2.2.5"
    #else
    #define REDIRECT_OLDEST "GLIBC_2.17"
    #endif

    static objects_map redirect_map, redirect_homes; /* under the lock */
    static char redirect_ours[1024];

    /* In which directory our modules lie: the package's. */
    static void redirect_find_ours(void) {
        Dl_info info;
        char *cut;
        if (redirect_ours[0] || !dladdr((void *)redirect_find_ours, &info) || !info.dli_fname) return;
        if (strlen(info.dli_fname) >= sizeof redirect_ours) return;
        strcpy(redirect_ours, info.dli_fname);
        for (int i = 0; i < 2; i++)
            if ((cut = strrchr(redirect_ours, '/'))) *cut = 0;
        strcat(redirect_ours, "/");
    }

    /* Functions that other libraries have put before the C library's, or found there before us: calls of those are
       past us. The program itself is none of them: what it has is a way to the function. */
    static uint32_t redirect_n_others;

    /* 1 or 0: does the program itself, and no library, hold this address? -1: nobody is known to. */
    static int redirect_is_in_program(const void *address) {
        Dl_info info, program;
        if (!dladdr(address, &info) || !dladdr((void *)getauxval(AT_PHDR), &program)) return -1;
        return info.dli_fbase == program.dli_fbase;
    }

    static int redirect_is_others(const redirect_row *row) {
        void *first = dlsym(RTLD_DEFAULT, row->name);
        if (!first || first == *row->below || first == row->beside) return 0;
        return redirect_is_in_program(first) != 1;
    }

    static void *redirect_symbol(void *library, const char *name) {
        void *found = library ? dlsym(library, name) : (void *)0;
        /* A name that only programs of earlier times use. */
        return found || !library ? found : dlvsym(library, name, REDIRECT_OLDEST);
    }

    /* What objects call by this name. Not the entry of an executable through which it calls the function of another
       object, which may be the function's address for everybody. */
    static void *redirect_in_use(void *of_libc, const char *name) {
        void *found = dlsym(RTLD_DEFAULT, name);
        const ElfW(Sym) *symbol = (void *)0;
        Dl_info info;
        if (!found || !dladdr1(found, &info, (void **)&symbol, RTLD_DL_SYMENT)) return of_libc;
        return symbol && symbol->st_shndx != SHN_UNDEF ? found : of_libc;
    }

    static void redirect_find_all(redirect_table *table) {
        void *libc = dlopen("libc.so.6", RTLD_LAZY | RTLD_NOLOAD);
        void *threads = dlopen("libpthread.so.0", RTLD_LAZY | RTLD_NOLOAD);
        redirect_find_ours();
        for (uint32_t i = 0; i < table->n_rows; i++) {
            redirect_row *row = &table->rows[i];
            void *of_libc = redirect_symbol(libc, row->name);
            *row->below = table->of_the_process ? redirect_in_use(of_libc, row->name) : of_libc;
            row->beside = redirect_symbol(threads, row->name);
            /* What that library has from the C library, which another's function below may call, is not beside it. */
            if (row->beside == of_libc || row->beside == *row->below) row->beside = (void *)0;
            if (*row->below && !table->of_the_process) redirect_n_others += (uint32_t)redirect_is_others(row);
        }
        /* The names are ours to have looked up, not to keep open. */
        if (libc) dlclose(libc);
        if (threads) dlclose(threads);
    }

    /* A child in which nothing is redirected any more, nor put back: what was the loader's business in another thread
       when it was forked is never done there, and may have the lock of the loader's list. */
    static int redirect_stuck;
    static void redirect_see_whether_stuck(void) { redirect_stuck |= _r_debug.r_state != RT_CONSISTENT; }

    static void redirect_walk(redirect_table *table, int back, int insist) {
        objects_walk walk;
        if (redirect_stuck) return;
        objects_map_clear(&redirect_map);
        objects_map_clear(&redirect_homes);
        for (uint32_t i = 0; i < table->n_rows; i++) {
            const redirect_row *row = &table->rows[i];
            uintptr_t hook = (uintptr_t)row->hook, below = (uintptr_t)*row->below, beside = (uintptr_t)row->beside;
            if (!below) continue;
            objects_map_add(&redirect_homes, below, below);
            objects_map_add(&redirect_homes, beside, beside);
            /* Of several names of one function the first has it. */
            if (back) objects_map_add(&redirect_map, hook, below);
            else if (!objects_new(&redirect_map, below)) objects_map_add(&redirect_map, below, hook);
            if (!back && beside && !objects_new(&redirect_map, beside)) objects_map_add(&redirect_map, beside, hook);
        }
        memset(&walk, 0, sizeof walk);
        walk.map = &redirect_map;
        walk.homes = &redirect_homes;
        walk.ours = redirect_ours;
        walk.insist = insist;
        dl_iterate_phdr(objects_visit, &walk);
        table->n_entries = walk.n_entries;
        table->n_symbols = walk.n_symbols;
        table->n_objects = walk.n_objects;
        table->n_unready = walk.n_unready;
        table->n_refused = walk.n_refused;
        table->n_loads = walk.n_loads;
    }
    #else
    #define REDIRECT_CAN 0
    static uint32_t redirect_n_others;
    static void redirect_find_all(redirect_table *table) { (void)table; }
    static void redirect_walk(redirect_table *table, int back, int insist) { (void)table, (void)back, (void)insist; }
    static uint64_t objects_n_loads(void) { return 0; }
    static int redirect_is_in_program(const void *address) { return (void)address, 0; }
    static int redirect_stuck;
    static void redirect_see_whether_stuck(void) {}
    #endif

    /* No handler runs on a thread that changes tables: it could fork. */
    static pthread_mutex_t redirect_mutex = PTHREAD_MUTEX_INITIALIZER;
    static void redirect_lock(sigset_t *before) {
        ksm_block_signals(before);
        pthread_mutex_lock(&redirect_mutex);
    }
    static void redirect_unlock(const sigset_t *before) {
        pthread_mutex_unlock(&redirect_mutex);
        ksm_restore_signals(before);
    }
    static sigset_t redirect_signals_before; /* of the thread that forks */
    static void redirect_before_fork(void) {
        sigset_t before;
        redirect_lock(&before);
        redirect_signals_before = before;
    }
    static void redirect_after_fork(void) {
        sigset_t before = redirect_signals_before;
        redirect_unlock(&before);
    }
    static void redirect_in_child(void) {
        pthread_mutex_init(&redirect_mutex, 0);
        redirect_see_whether_stuck();
        ksm_restore_signals(&redirect_signals_before);
    }
    static int redirect_at_fork(void) {
        return pthread_atfork(redirect_before_fork, redirect_after_fork, redirect_in_child);
    }

    static void redirect_users_add(redirect_table *table, int delta) {
        sigset_t before;
        redirect_lock(&before);
        table->n_users += (uint32_t)delta;
        if (delta > 0 && table->n_users == 1) redirect_walk(table, 0, 0);
        if (delta < 0 && table->n_users == 0) redirect_walk(table, 1, 0);
        redirect_unlock(&before);
    }

    static void redirect_look_again(redirect_table *table) {
        sigset_t before;
        if (redirect_stuck) return;
        /* To ask takes the loader's lock, and so this one, too: no child is without it because of us. */
        redirect_lock(&before);
        /* What was being loaded the last time is loaded by now, or is made so that it looks like that. */
        if (table->n_users && (table->n_unready || objects_n_loads() != table->n_loads))
            redirect_walk(table, 0, table->n_unready != 0);
        redirect_unlock(&before);
    }
    """
    ctypedef struct sigset_t:
        pass
    bint REDIRECT_CAN
    bint redirect_stuck
    uint32_t redirect_n_others
    int redirect_is_in_program(const void* address)
    void redirect_find_all(redirect_table* table)
    void redirect_users_add(redirect_table* table, int delta) nogil
    void redirect_look_again(redirect_table* table) nogil
    int redirect_at_fork()


cdef object redirect_missing():
    if redirect_stuck:
        return "this process was forked while another thread loaded a library"
    if REDIRECT_CAN:
        return None
    return "functions can be redirected with the GNU C library only, on x86-64 and aarch64"


cdef void redirect_find(redirect_table* table):
    redirect_find_all(table)


cdef uint32_t redirect_others():
    return redirect_n_others


cdef bint redirect_is_programs(const void* function):
    return redirect_is_in_program(function) == 1


cdef void redirect_put(redirect_table* table) noexcept nogil:
    redirect_users_add(table, 1)


cdef void redirect_back(redirect_table* table) noexcept nogil:
    redirect_users_add(table, -1)


cdef void redirect_look(redirect_table* table) noexcept nogil:
    redirect_look_again(table)


if redirect_at_fork() != 0:
    raise MemoryError("pthread_atfork failed: ksmcore cannot be made safe against fork")
