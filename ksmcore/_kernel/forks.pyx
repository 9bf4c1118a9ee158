"""Forks of this process: the lock that they wait for, their count, and whether the children are gone.

pthread_atfork covers every fork() of the C library, Python's and plain C's alike, and neither vfork nor
posix_spawn, which give the child no memory of its own. A process made by a raw clone(2) is not seen.

A child maps the stores of its parent. To learn when it no longer does, each fork has a lease: a small
memory file that the child inherits a writable shared mapping of, and the parent keeps only a descriptor
of. The kernel refuses to seal such a file against writing for as long as any process has it mapped so.
So a seal that succeeds tells that the child, and all its own children, have ended or run another
program, whatever descriptors they had closed. (Sealing: fcntl(2), F_SEAL_WRITE.)
"""

from libc.stdint cimport UINT32_MAX, uint32_t, uintptr_t

from ksmcore._kernel.syscalls cimport (
    sys_close_in_child, sys_drop, sys_error, sys_error_clear, sys_file, sys_is_kept, sys_keep, sys_list_lock,
    sys_list_unlock, sys_map_lease, sys_memfd, sys_page_bytes, sys_seal, sys_truncate, sys_unmap,
)

cdef extern from *:
    """
    #include <pthread.h>
    #include "_kernel/signals.h"

    static pthread_mutex_t forks_mutex = PTHREAD_MUTEX_INITIALIZER;
    static sigset_t forks_signals_before;    /* of the thread that holds the lock */

    /* No signal from before the lock is taken until after it is given back: a handler that forks, or
       writes into a window, would wait for the thread that it has interrupted. */
    static void forks_mutex_lock(void) {
        sigset_t before;
        ksm_block_signals(&before);
        pthread_mutex_lock(&forks_mutex);
        forks_signals_before = before;
    }
    static void forks_mutex_unlock(void) {
        sigset_t before = forks_signals_before;
        pthread_mutex_unlock(&forks_mutex);
        ksm_restore_signals(&before);
    }
    /* In the child only the forking thread exists, so the lock is made anew rather than released: the
       thread that prepared the fork holds it, and nobody can wait for it. */
    static void forks_mutex_renew(void) { pthread_mutex_init(&forks_mutex, 0); }
    static void forks_let_signals_in(void) { ksm_restore_signals(&forks_signals_before); }
    """
    void forks_mutex_lock() nogil
    void forks_mutex_unlock() nogil
    void forks_mutex_renew() nogil
    void forks_let_signals_in() nogil
    int pthread_atfork(
        void (*prepare)() noexcept nogil, void (*parent)() noexcept nogil, void (*child)() noexcept nogil
    )
    int __ATOMIC_SEQ_CST
    uint32_t __atomic_add_fetch(uint32_t* value, uint32_t n, int order) nogil
    uint32_t __atomic_load_n(uint32_t* value, int order) nogil
    void __atomic_store_n(uint32_t* value, uint32_t n, int order) nogil
    bint __atomic_compare_exchange_n(
        uint32_t* value, uint32_t* expected, uint32_t wanted, bint weak, int good, int bad
    ) nogil

cdef enum:
    MAX_LEASES = 16        # then the newest serves further forks as well: descriptors are few

# The children of the forks `first` to `last`, counted from 1.
ctypedef struct fork_lease:
    sys_file file
    uint32_t first
    uint32_t last

# All of it is written under the fork lock.
cdef uint32_t _n_forks = 0
cdef uint32_t _generation = 0
cdef uint32_t _n_coming = 0               # forks of Python's between their announcement and their end; by atomics
cdef int _n_watchers = 0
cdef fork_lease _leases[MAX_LEASES]
cdef uint32_t _n_leases = 0
cdef uint32_t _first_untold = UINT32_MAX   # the forks that could be given no lease, and what lies between them
cdef uint32_t _last_untold = 0
cdef uintptr_t _handed_over = 0            # during a fork: the mapping that the child keeps


cdef void forks_lock() noexcept nogil:
    forks_mutex_lock()


cdef void forks_unlock() noexcept nogil:
    forks_mutex_unlock()


cdef uint32_t forks_count() noexcept nogil:
    return __atomic_load_n(&_n_forks, __ATOMIC_SEQ_CST)


cdef uint32_t forks_generation() noexcept nogil:
    return __atomic_load_n(&_generation, __ATOMIC_SEQ_CST)


cdef void forks_announce() noexcept nogil:
    __atomic_add_fetch(&_n_coming, 1, __ATOMIC_SEQ_CST)


cdef bint forks_over() noexcept nogil:
    """The end of a fork that was announced, in the parent. Was it the last one?"""
    cdef uint32_t n = __atomic_load_n(&_n_coming, __ATOMIC_SEQ_CST)
    # Not below 0: the hook of another may have imported this module in the midst of a fork.
    while n > 0 and not __atomic_compare_exchange_n(
        &_n_coming, &n, n - 1, False, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST
    ):
        pass
    return n <= 1


cdef bint forks_is_coming() noexcept nogil:
    return __atomic_load_n(&_n_coming, __ATOMIC_SEQ_CST) != 0


cdef void forks_watch(int delta) noexcept nogil:
    """Begin (1) or end (-1) to be interested in children."""
    global _n_watchers
    forks_lock()
    _n_watchers += delta
    if _n_watchers == 0:
        _forget_leases()
    forks_unlock()


cdef void _forget_leases() noexcept nogil:
    """Nobody has shared anything with the children of the forks so far."""
    global _n_leases, _first_untold, _last_untold
    while _n_leases > 0:
        _n_leases -= 1
        sys_drop(&_leases[_n_leases].file)
    _first_untold = UINT32_MAX
    _last_untold = 0


# ---- around a fork --------------------------------------------------------------------------------

cdef fork_lease* _lease_for(uint32_t n_fork) noexcept nogil:
    """The lease of this fork, which may be the one of others before it; NULL when it can have none."""
    global _n_leases
    cdef sys_error ignored
    cdef fork_lease* lease
    sys_error_clear(&ignored)
    if _n_leases < <uint32_t>MAX_LEASES:
        lease = &_leases[_n_leases]
        sys_keep(&lease.file, sys_memfd(b"ksmcore-lease", &ignored))
        if lease.file.fd >= 0:
            lease.first = lease.last = n_fork
            if sys_truncate(lease.file.fd, sys_page_bytes(), &ignored) == 0:
                _n_leases += 1
                return lease
            sys_drop(&lease.file)
    if _n_leases == 0 or not sys_is_kept(&_leases[_n_leases - 1].file):
        return NULL
    return &_leases[_n_leases - 1]


cdef void _hand_over(uint32_t n_fork) noexcept nogil:
    """Make the mapping that the child of this fork inherits, so that its end can be told."""
    global _handed_over, _first_untold, _last_untold
    cdef sys_error ignored
    cdef fork_lease* lease = _lease_for(n_fork)
    sys_error_clear(&ignored)
    if lease != NULL:
        _handed_over = <uintptr_t>sys_map_lease(sys_page_bytes(), lease.file.fd, &ignored)
    if _handed_over != 0:
        lease.last = n_fork
    else:
        # A lease made for this fork alone is found to have ended, and means nothing.
        _first_untold = min(_first_untold, n_fork)
        _last_untold = n_fork


cdef void _prepare() noexcept nogil:
    forks_lock()
    __atomic_add_fetch(&_n_forks, 1, __ATOMIC_SEQ_CST)
    if _n_watchers > 0:
        _hand_over(_n_forks)
    sys_list_lock()


cdef void _in_parent() noexcept nogil:
    global _handed_over
    cdef sys_error ignored
    sys_error_clear(&ignored)
    sys_list_unlock()
    # Unchecked: were it to fail, the lease would never end, and the frozen pages stay frozen.
    if _handed_over != 0:
        sys_unmap(_handed_over, sys_page_bytes(), &ignored)
    _handed_over = 0
    forks_unlock()


cdef void _in_child() noexcept nogil:
    """The mapping stays, for as long as this process and those that it forks have this memory. Descriptors do not:
    each stands for the parent's memory."""
    global _n_forks, _n_watchers, _n_leases, _first_untold, _last_untold, _handed_over
    sys_close_in_child()
    _n_leases = 0
    _n_forks = 0
    _n_watchers = 0
    _first_untold = UINT32_MAX
    _last_untold = 0
    _handed_over = 0
    __atomic_store_n(&_n_coming, 0, __ATOMIC_SEQ_CST)
    __atomic_add_fetch(&_generation, 1, __ATOMIC_SEQ_CST)
    forks_mutex_renew()
    forks_let_signals_in()


# ---- afterwards -----------------------------------------------------------------------------------

cdef void forks_look() noexcept nogil:
    """Drop the leases of the children that are gone. Of one whose descriptor the program has closed it is never
    known."""
    global _n_leases
    cdef sys_error ignored
    cdef uint32_t i, n_kept = 0
    for i in range(_n_leases):
        sys_error_clear(&ignored)
        if sys_is_kept(&_leases[i].file) and sys_seal(_leases[i].file.fd, &ignored) == 0:
            sys_drop(&_leases[i].file)
            continue
        _leases[n_kept] = _leases[i]
        n_kept += 1
    _n_leases = n_kept


cdef bint forks_living(uint32_t after, uint32_t last) noexcept nogil:
    """May a process of the forks after that one, up to the last one, still share this process's old memory?"""
    cdef uint32_t i
    for i in range(_n_leases):
        if _leases[i].last > after and _leases[i].first <= last:
            return True
    return _last_untold > after and _first_untold <= last


def generation():
    """Grows by one in every forked child, so that what belongs to the parent can be told."""
    return forks_generation()


if pthread_atfork(_prepare, _in_parent, _in_child) != 0:
    raise MemoryError("pthread_atfork failed: ksmcore cannot be made safe against fork")
