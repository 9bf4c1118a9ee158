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
    sys_drop, sys_error, sys_error_clear, sys_file, sys_is_kept, sys_keep, sys_map_lease, sys_memfd, sys_page_bytes,
    sys_seal, sys_truncate, sys_unmap,
)

cdef extern from *:
    """
    #include <pthread.h>

    static pthread_mutex_t forks_mutex = PTHREAD_MUTEX_INITIALIZER;
    static void forks_mutex_lock(void) { pthread_mutex_lock(&forks_mutex); }
    static void forks_mutex_unlock(void) { pthread_mutex_unlock(&forks_mutex); }
    /* In the child only the forking thread exists, so the lock is made anew rather than released: the
       thread that prepared the fork holds it, and nobody can wait for it. */
    static void forks_mutex_renew(void) { pthread_mutex_init(&forks_mutex, 0); }
    """
    void forks_mutex_lock() nogil
    void forks_mutex_unlock() nogil
    void forks_mutex_renew() nogil
    int pthread_atfork(
        void (*prepare)() noexcept nogil, void (*parent)() noexcept nogil, void (*child)() noexcept nogil
    )
    int __ATOMIC_SEQ_CST
    uint32_t __atomic_add_fetch(uint32_t* value, uint32_t n, int order) nogil
    uint32_t __atomic_load_n(uint32_t* value, int order) nogil

cdef enum:
    MAX_LEASES = 16        # then the newest serves further forks as well: descriptors are few

# The children of the forks `first` to `last`, counted from 1.
ctypedef struct fork_lease:
    sys_file file
    uint32_t first
    uint32_t last

# All of it is read and written under the fork lock; `_generation` by anybody.
cdef uint32_t _n_forks = 0
cdef uint32_t _generation = 0
cdef int _n_watchers = 0
cdef fork_lease _leases[MAX_LEASES]
cdef uint32_t _n_leases = 0
cdef uint32_t _untold = UINT32_MAX     # first fork that could be given no lease
cdef uintptr_t _handed_over = 0        # during a fork: the mapping that the child keeps


cdef void forks_lock() noexcept nogil:
    forks_mutex_lock()


cdef void forks_unlock() noexcept nogil:
    forks_mutex_unlock()


cdef uint32_t forks_count() noexcept nogil:
    return _n_forks


cdef uint32_t forks_generation() noexcept nogil:
    return __atomic_load_n(&_generation, __ATOMIC_SEQ_CST)


cdef void forks_watch(int delta) noexcept nogil:
    """Begin (1) or end (-1) to be interested in children."""
    global _n_watchers
    forks_lock()
    _n_watchers += delta
    forks_unlock()


# ---- around a fork --------------------------------------------------------------------------------

cdef uintptr_t _lease_for(uint32_t n_fork) noexcept nogil:
    """Put this fork under a lease, and return the mapping for the child; 0 when that cannot be had."""
    global _n_leases
    cdef sys_error ignored
    cdef fork_lease* lease
    cdef bint reused = _n_leases == MAX_LEASES
    cdef uintptr_t mapped
    sys_error_clear(&ignored)
    if reused:
        lease = &_leases[MAX_LEASES - 1]
    else:
        lease = &_leases[_n_leases]
        sys_keep(&lease.file, sys_memfd(b"ksmcore-lease", &ignored))
        lease.first = n_fork
    if not sys_is_kept(&lease.file):
        return 0
    mapped = 0
    if sys_truncate(lease.file.fd, sys_page_bytes(), &ignored) == 0:
        mapped = <uintptr_t>sys_map_lease(sys_page_bytes(), lease.file.fd, &ignored)
    if mapped == 0:
        if not reused:
            sys_drop(&lease.file)
        return 0
    lease.last = n_fork
    if not reused:
        _n_leases += 1
    return mapped


cdef void _prepare() noexcept nogil:
    global _n_forks, _handed_over, _untold
    forks_lock()
    _n_forks += 1
    if _n_watchers > 0:
        _handed_over = _lease_for(_n_forks)
        if _handed_over == 0:
            _untold = min(_untold, _n_forks)


cdef void _in_parent() noexcept nogil:
    global _handed_over
    cdef sys_error ignored
    sys_error_clear(&ignored)
    # Unchecked: were it to fail, the lease would never end, and the frozen pages stay frozen.
    if _handed_over != 0:
        sys_unmap(_handed_over, sys_page_bytes(), &ignored)
    _handed_over = 0
    forks_unlock()


cdef void _in_child() noexcept nogil:
    """The mapping stays, for as long as this process and those that it forks have this memory."""
    global _n_forks, _n_watchers, _n_leases, _untold, _handed_over
    forks_mutex_renew()
    while _n_leases > 0:
        _n_leases -= 1
        sys_drop(&_leases[_n_leases].file)
    _n_forks = 0
    _n_watchers = 0
    _untold = UINT32_MAX
    _handed_over = 0
    __atomic_add_fetch(&_generation, 1, __ATOMIC_SEQ_CST)


# ---- afterwards -----------------------------------------------------------------------------------

cdef uint32_t forks_gone() noexcept nogil:
    """The largest n such that no process of the forks 1 to n shares this process's old memory."""
    global _n_leases
    cdef sys_error ignored
    cdef uint32_t i, n_kept = 0, gone = _n_forks
    for i in range(_n_leases):
        sys_error_clear(&ignored)
        if sys_is_kept(&_leases[i].file) and sys_seal(_leases[i].file.fd, &ignored) == 0:
            sys_drop(&_leases[i].file)
            continue
        # Also where the program closed the descriptor: then it is never known.
        gone = min(gone, _leases[i].first - 1)
        _leases[n_kept] = _leases[i]
        n_kept += 1
    _n_leases = n_kept
    return min(gone, _untold - 1)


def generation():
    """Grows by one in every forked child, so that what belongs to the parent can be told."""
    return forks_generation()


if pthread_atfork(_prepare, _in_parent, _in_child) != 0:
    raise MemoryError("pthread_atfork failed: ksmcore cannot be made safe against fork")
