"""A pool: threads that live for a walk, and take pieces of the work that its owner hands out.

The owner takes pieces as well, and waits only for those that somebody else has begun. Where no thread can be begun it
does everything by itself; and where it had to wait for long, since the others get no processor, from then on as well.

The threads are plain ones of the C library, which Python knows nothing of. They are begun by a thread that reads (see
reader), with the same signals blocked, and each reads with a place of its own to return to. A job is two numbers in one
word, pieces in all and pieces taken, so that a thread which comes late, when the job is over or begun anew, either
takes a piece of what there is now or none. In a forked child there are no threads, and nobody looks at the pool.
"""

from libc.stdint cimport uint32_t, uint64_t, uintptr_t
from libc.string cimport memset

from ksmcore._kernel.reader cimport ksm_reader, reader_borrow, reader_give_back, reader_here
from ksmcore._kernel.syscalls cimport sys_now_ns, sys_spent_ns

cdef extern from *:
    """
    #include <linux/futex.h>
    #include <pthread.h>
    #include <sys/syscall.h>
    #include <unistd.h>

    /* Enough for what pieces need and, in most programs, for what their libraries keep for each thread. */
    #define POOL_STACK_BYTES (512 << 10)

    static void pool_sleep(uint32_t *word, uint32_t value) {
        syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, (void *)0);
    }

    static void pool_wake(uint32_t *word, int n) { syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, n); }

    static void pool_relax(void) {
    #if defined(__x86_64__)
        __builtin_ia32_pause();
    #elif defined(__aarch64__)
        __asm__ volatile("yield");
    #endif
    }

    static int pool_begin(uintptr_t *thread, void *(*run)(void *), void *pool) {
        pthread_attr_t attributes;
        pthread_t begun;
        int rc = pthread_attr_init(&attributes);
        if (rc != 0) return rc;
        pthread_attr_setstacksize(&attributes, POOL_STACK_BYTES);
        rc = pthread_create(&begun, &attributes, run, pool);
        pthread_attr_destroy(&attributes);
        if (rc == EINVAL) rc = pthread_create(&begun, (pthread_attr_t *)0, run, pool);
        if (rc == 0) *thread = (uintptr_t)begun;
        return rc;
    }

    static void pool_join(uintptr_t thread) { pthread_join((pthread_t)thread, (void **)0); }
    """
    int __ATOMIC_SEQ_CST
    uint32_t __atomic_load_n(uint32_t* value, int order) nogil
    void __atomic_store_n(uint32_t* value, uint32_t wanted, int order) nogil
    uint32_t __atomic_add_fetch(uint32_t* value, uint32_t n, int order) nogil
    uint32_t __atomic_sub_fetch(uint32_t* value, uint32_t n, int order) nogil
    uint64_t take_ticket "__atomic_fetch_add"(uint64_t* ticket, uint64_t n, int order) nogil
    void put_ticket "__atomic_store_n"(uint64_t* ticket, uint64_t wanted, int order) nogil
    uint64_t add_time "__atomic_add_fetch"(uint64_t* time_ns, uint64_t more_ns, int order) nogil
    pool_job* job_of "__atomic_load_n"(pool_job** job, int order) nogil
    void put_job "__atomic_store_n"(pool_job** job, pool_job* wanted, int order) nogil
    void pool_sleep(uint32_t* word, uint32_t value) nogil
    void pool_wake(uint32_t* word, int n) nogil
    void pool_relax() nogil
    int pool_begin(uintptr_t* thread, void* (*run)(void*) noexcept nogil, void* pool) nogil
    void pool_join(uintptr_t thread) nogil

cdef enum:
    SPINS = 200                # looks at a word before a thread sleeps until it changes: some microseconds
    LATE_NS = 1000000          # for one piece, of some ten microseconds


cdef bint _take_piece(pool_t* pool, pool_job* job, ksm_reader* reader) noexcept nogil:
    """Take one piece of a job, and do it. False: there is none."""
    cdef uint64_t ticket = take_ticket(&job.ticket, 1, __ATOMIC_SEQ_CST)
    if <uint32_t>ticket >= <uint32_t>(ticket >> 32):
        return False
    job.work(job.context, <uint32_t>ticket, reader)
    __atomic_add_fetch(&job.n_done, 1, __ATOMIC_SEQ_CST)
    if __atomic_load_n(&pool.is_waiting, __ATOMIC_SEQ_CST):
        __atomic_add_fetch(&pool.progress, 1, __ATOMIC_SEQ_CST)
        pool_wake(&pool.progress, 1)
    return True


cdef void* _run(void* own) noexcept nogil:
    cdef pool_t* pool = <pool_t*>own
    cdef pool_job* job
    cdef uint32_t version
    cdef ksm_reader* reader = reader_borrow()
    cdef int i
    while True:
        # Before the look at the job: what is handed out after it changes the version.
        version = __atomic_load_n(&pool.version, __ATOMIC_SEQ_CST)
        if __atomic_load_n(&pool.is_over, __ATOMIC_SEQ_CST):
            break
        job = job_of(&pool.job, __ATOMIC_SEQ_CST)
        while job != NULL and _take_piece(pool, job, reader):
            pass
        for i in range(SPINS):
            if __atomic_load_n(&pool.version, __ATOMIC_SEQ_CST) != version:
                break
            pool_relax()
        else:
            __atomic_add_fetch(&pool.n_sleeping, 1, __ATOMIC_SEQ_CST)
            pool_sleep(&pool.version, version)
            __atomic_sub_fetch(&pool.n_sleeping, 1, __ATOMIC_SEQ_CST)
    reader_give_back(reader)
    add_time(&pool.spent_ns, sys_spent_ns(), __ATOMIC_SEQ_CST)
    return NULL


cdef void _change(pool_t* pool) noexcept nogil:
    __atomic_add_fetch(&pool.version, 1, __ATOMIC_SEQ_CST)
    if __atomic_load_n(&pool.n_sleeping, __ATOMIC_SEQ_CST) != 0:
        pool_wake(&pool.version, <int>POOL_MOST)


cdef void pool_init(pool_t* pool, uint32_t n_threads) noexcept nogil:
    """One of n_threads threads, the owner's among them. None is begun yet."""
    memset(pool, 0, sizeof(pool_t))
    pool.n_wanted = min(max(n_threads, <uint32_t>1) - 1, <uint32_t>POOL_MOST)


cdef void pool_end(pool_t* pool) noexcept nogil:
    """End its threads. No job is left unfinished."""
    cdef uint32_t i
    if pool.n_threads != 0:
        __atomic_store_n(&pool.is_over, 1, __ATOMIC_SEQ_CST)
        _change(pool)
    for i in range(pool.n_threads):
        pool_join(pool.threads[i])
    pool.n_threads = pool.n_wanted = 0


cdef bint pool_has_threads(pool_t* pool) noexcept nogil:
    """Is there anybody besides the owner who may help? Begins the threads that are wanted; what cannot be had is done
    without."""
    if pool.was_late:
        return False
    while pool.n_threads < pool.n_wanted:
        if pool_begin(&pool.threads[pool.n_threads], _run, pool) != 0:
            pool.n_wanted = pool.n_threads
            break
        pool.n_threads += 1
    return pool.n_threads != 0


cdef void pool_hand_out(pool_t* pool, pool_job* job, uint32_t n_pieces) noexcept nogil:
    """Let all threads take pieces of a job, whose work needs nothing that is not there by now. The one before is
    finished."""
    __atomic_store_n(&job.n_done, 0, __ATOMIC_SEQ_CST)
    put_ticket(&job.ticket, <uint64_t>n_pieces << 32, __ATOMIC_SEQ_CST)
    put_job(&pool.job, job, __ATOMIC_SEQ_CST)
    _change(pool)


cdef void pool_finish(pool_t* pool, pool_job* job, uint32_t n_pieces) noexcept nogil:
    """Help until all pieces of a job are taken, and return when they are done."""
    cdef uint32_t progress
    cdef uint64_t begun_ns
    cdef int i
    while _take_piece(pool, job, reader_here()):
        pass
    for i in range(SPINS):
        if __atomic_load_n(&job.n_done, __ATOMIC_SEQ_CST) == n_pieces:
            return
        pool_relax()
    begun_ns = sys_now_ns()
    __atomic_store_n(&pool.is_waiting, 1, __ATOMIC_SEQ_CST)
    while True:
        progress = __atomic_load_n(&pool.progress, __ATOMIC_SEQ_CST)
        if __atomic_load_n(&job.n_done, __ATOMIC_SEQ_CST) == n_pieces:
            break
        pool_sleep(&pool.progress, progress)
    __atomic_store_n(&pool.is_waiting, 0, __ATOMIC_SEQ_CST)
    pool.was_late = sys_now_ns() - begun_ns >= <uint64_t>LATE_NS
