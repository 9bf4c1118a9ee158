"""Reading memory that the program may unmap or protect at any moment, by its own means.

A page that went away is taken for one that differs from all others, and for one that changed: both are
things that can happen to any page at any time, so nobody above needs to know.

Where no handler is installed any more (somebody put another one in its place in the middle of a pass) such
a page ends the process, as it would end any reader.

Every thread that reads has a place in a table, by which the handler finds where it is to return to. The table
grows by blocks and never shrinks, so a handler may walk through it at any time. Whoever finds no free place, and
no memory for more, waits until another reader leaves.
"""

from libc.stdint cimport uint32_t

cdef extern from *:
    """
    #include "_kernel/signals.h"
    #include <stdlib.h>
    #include <sys/syscall.h>
    #include <time.h>
    #include <ucontext.h>
    #include <unistd.h>
    #include "_kernel/reader.h"

    #define READER_PLACES 64

    typedef struct reader_block {
        ksm_reader places[READER_PLACES];
        struct reader_block *next;    /* set once, when there is one */
    } reader_block;

    static reader_block reader_first;
    static __thread ksm_reader *reader_mine;
    static __thread uint32_t reader_depth;
    static __thread sigset_t reader_signals_before;

    static reader_block *reader_next(reader_block *block) {
        return __atomic_load_n(&block->next, __ATOMIC_ACQUIRE);
    }

    static ksm_reader *reader_place(uint32_t tid) {
        for (reader_block *block = &reader_first; block; block = reader_next(block))
            for (int i = 0; i < READER_PLACES; i++) {
                uint32_t nobody = 0;
                if (__atomic_compare_exchange_n(&block->places[i].tid, &nobody, tid, 0, __ATOMIC_SEQ_CST,
                                                __ATOMIC_RELAXED))
                    return &block->places[i];
            }
        return (ksm_reader *)0;
    }

    static int reader_grow(void) {
        reader_block *last = &reader_first, *more = (reader_block *)calloc(1, sizeof *more);
        if (!more) return 0;
        for (;;) {
            reader_block *next = (reader_block *)0;
            if (__atomic_compare_exchange_n(&last->next, &next, more, 0, __ATOMIC_RELEASE, __ATOMIC_ACQUIRE)) return 1;
            last = next;
        }
    }

    static ksm_reader *reader_wait_for_place(void) {
        uint32_t tid = (uint32_t)syscall(SYS_gettid);
        ksm_reader *found;
        while (!(found = reader_place(tid))) {
            struct timespec pause = {0, 1000000L};
            if (!reader_grow()) nanosleep(&pause, (struct timespec *)0);
        }
        return found;
    }

    static void reader_give_up(ksm_reader *reader) { __atomic_store_n(&reader->tid, 0, __ATOMIC_SEQ_CST); }

    /* The signals first: between them and the place nothing is read. SIGSEGV and SIGBUS must arrive, also
       where the thread blocks them otherwise. */
    static void reader_claim(void) {
        sigset_t mask;
        if (reader_depth++ != 0) return;
        ksm_block_signals(&reader_signals_before);
        sigemptyset(&mask);
        sigaddset(&mask, SIGSEGV);
        sigaddset(&mask, SIGBUS);
        pthread_sigmask(SIG_UNBLOCK, &mask, (sigset_t *)0);
        reader_mine = reader_wait_for_place();
    }

    static void reader_free(void) {
        /* In a forked child: the claim was the parent's. */
        if (reader_depth == 0 || --reader_depth != 0) return;
        reader_give_up(reader_mine);
        reader_mine = (ksm_reader *)0;
        ksm_restore_signals(&reader_signals_before);
    }

    static ksm_reader *reader_of_this_thread(void) { return reader_mine; }

    /* In a signal handler: does not return if the thread was reading. No thread-local variable is touched,
       since the first access to one may allocate. */
    static void reader_fault(void *context) {
        uint32_t tid = (uint32_t)syscall(SYS_gettid);
        for (reader_block *block = &reader_first; block; block = reader_next(block))
            for (int i = 0; i < READER_PLACES; i++) {
                ksm_reader *reader = &block->places[i];
                sigjmp_buf *back = reader->back;
                if (__atomic_load_n(&reader->tid, __ATOMIC_RELAXED) != tid || !back) continue;
                reader->back = NULL;
                pthread_sigmask(SIG_SETMASK, &((ucontext_t *)context)->uc_sigmask, (sigset_t *)0);
                siglongjmp(*back, 1);
            }
    }

    /* In a forked child only the forking thread exists, and it is not reading: at most it has claimed its place,
       and Python code (a checksum's, a finaliser's) has forked. */
    static void reader_child(void) {
        for (reader_block *block = &reader_first; block; block = reader_next(block))
            memset(block->places, 0, sizeof block->places);
        reader_mine = (ksm_reader *)0;
        if (reader_depth) ksm_restore_signals(&reader_signals_before);
        reader_depth = 0;
    }
    """
    ksm_reader* reader_wait_for_place() nogil
    void reader_give_up(ksm_reader* reader) nogil
    void reader_claim() nogil
    void reader_free() nogil
    ksm_reader* reader_of_this_thread() nogil
    void reader_fault(void* context) nogil
    void reader_child() noexcept nogil
    int pthread_atfork(
        void (*prepare)() noexcept nogil, void (*parent)() noexcept nogil, void (*child)() noexcept nogil
    )


cdef void reader_enter() noexcept nogil:
    reader_claim()


cdef void reader_leave() noexcept nogil:
    reader_free()


cdef ksm_reader* reader_here() noexcept nogil:
    return reader_of_this_thread()


cdef ksm_reader* reader_borrow() noexcept nogil:
    return reader_wait_for_place()


cdef void reader_give_back(ksm_reader* reader) noexcept nogil:
    reader_give_up(reader)


cdef void reader_return(void* context) noexcept nogil:
    """For a handler of SIGSEGV or SIGBUS, with what it was given: goes on where the thread left a place to return
    to; else returns."""
    reader_fault(context)


if pthread_atfork(NULL, NULL, reader_child) != 0:
    raise MemoryError("pthread_atfork failed: ksmcore cannot be made safe against fork")
