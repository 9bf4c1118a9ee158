"""Reading memory that the program may unmap or protect at any moment, by its own means.

A page that went away is taken for one that differs from all others, and for one that changed: both are
things that can happen to any page at any time, so nobody above needs to know.

Where no handler is installed any more (somebody put another one in its place in the middle of a pass), or
more threads read at once than there are places, such a page ends the process, as it would end any reader.
"""

from libc.stdint cimport uint32_t

cdef extern from *:
    """
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    #include <signal.h>
    #include <sys/syscall.h>
    #include <unistd.h>
    #include "_kernel/reader.h"

    #define READER_PLACES 64
    static ksm_reader reader_places[READER_PLACES];
    static __thread ksm_reader *reader_mine;
    static __thread uint32_t reader_depth;

    static void reader_claim(void) {
        uint32_t tid = (uint32_t)syscall(SYS_gettid);
        if (reader_depth++ != 0) return;
        for (int i = 0; i < READER_PLACES; i++) {
            uint32_t nobody = 0;
            if (__atomic_compare_exchange_n(&reader_places[i].tid, &nobody, tid, 0, __ATOMIC_SEQ_CST,
                                            __ATOMIC_RELAXED)) {
                reader_mine = &reader_places[i];
                return;
            }
        }
    }

    static void reader_free(void) {
        if (--reader_depth != 0 || !reader_mine) return;
        __atomic_store_n(&reader_mine->tid, 0, __ATOMIC_SEQ_CST);
        reader_mine = NULL;
    }

    static ksm_reader *reader_of_this_thread(void) { return reader_mine; }

    /* In a signal handler: does not return if the thread was reading. No thread-local variable is touched,
       since the first access to one may allocate. */
    static void reader_fault(void) {
        uint32_t tid = (uint32_t)syscall(SYS_gettid);
        for (int i = 0; i < READER_PLACES; i++) {
            ksm_reader *reader = &reader_places[i];
            sigjmp_buf *back = reader->back;
            if (__atomic_load_n(&reader->tid, __ATOMIC_RELAXED) != tid || !back) continue;
            sigset_t mask;
            reader->back = NULL;
            sigemptyset(&mask);
            sigaddset(&mask, SIGSEGV);
            sigprocmask(SIG_UNBLOCK, &mask, (sigset_t *)0);
            siglongjmp(*back, 1);
        }
    }

    /* In a forked child only the forking thread exists, and it is not reading. */
    static void reader_child(void) {
        memset(reader_places, 0, sizeof reader_places);
        reader_mine = NULL;
        reader_depth = 0;
    }
    """
    void reader_claim() nogil
    void reader_free() nogil
    ksm_reader* reader_of_this_thread() nogil
    void reader_fault() nogil
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


cdef void reader_return() noexcept nogil:
    """For a SIGSEGV handler: goes on where the thread left a place to return to; else returns."""
    reader_fault()


if pthread_atfork(NULL, NULL, reader_child) != 0:
    raise MemoryError("pthread_atfork failed: ksmcore cannot be made safe against fork")
