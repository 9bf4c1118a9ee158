"""The mappings of the process, one after the other by address; allocates nothing.

All of them are read as text (0.5 us each). For a range, the kernel is asked where it can answer
(PROCMAP_QUERY, Linux 6.11); where it does not, all are read and most passed over.

One descriptor serves the process, one reader at a time. Whoever visits takes no lock.
"""

from libc.stdint cimport uint32_t, uintptr_t

from ksmcore._kernel.syscalls cimport (
    CALL_PREAD, sys_check, sys_drop, sys_error, sys_error_clear, sys_file, sys_injected, sys_is_kept, sys_keep,
    sys_open_read,
)

cdef extern from "_kernel/maps.h" nogil:
    int ksm_vma_each(int fd, vma_visit visit, void* context)
    int ksm_vma_at(int fd, uintptr_t addr, vma_t* vma)

cdef extern from *:
    """
    #include <pthread.h>

    static pthread_mutex_t maps_mutex = PTHREAD_MUTEX_INITIALIZER;
    static void maps_lock(void) { pthread_mutex_lock(&maps_mutex); }
    static void maps_unlock(void) { pthread_mutex_unlock(&maps_mutex); }
    /* Whoever held it does not exist in the child. */
    static void maps_renew(void) { pthread_mutex_init(&maps_mutex, 0); }
    """
    void maps_lock() nogil
    void maps_unlock() nogil
    void maps_renew() nogil
    int pthread_atfork(
        void (*prepare)() noexcept nogil, void (*parent)() noexcept nogil, void (*child)() noexcept nogil
    )


ctypedef struct range_visit:
    uintptr_t start
    uintptr_t end
    vma_visit visit
    void* context

# Under the lock.
cdef sys_file _file
cdef uint32_t _n_users = 0


cdef void _if_within(const vma_t* vma, void* context) noexcept nogil:
    cdef range_visit* wanted = <range_visit*>context
    if vma.start < wanted.end and vma.end > wanted.start:
        wanted.visit(vma, wanted.context)


cdef int _open_locked(sys_error* err) noexcept nogil:
    """Have the file open, also where the program has closed it; -1 with *err when it cannot be."""
    if not sys_is_kept(&_file):
        sys_keep(&_file, sys_open_read(b"/proc/self/maps", err))
    return 0 if _file.fd >= 0 else -1


cdef void _close_locked() noexcept nogil:
    if _n_users == 0:
        sys_drop(&_file)


cdef void maps_enter() noexcept nogil:
    global _n_users
    cdef sys_error ignored
    sys_error_clear(&ignored)
    maps_lock()
    _n_users += 1
    _open_locked(&ignored)
    maps_unlock()


cdef void maps_leave() noexcept nogil:
    global _n_users
    maps_lock()
    # Zero in a forked child: the enter was the parent's.
    _n_users -= _n_users > 0
    _close_locked()
    maps_unlock()


cdef int _each_locked(vma_visit visit, void* context, sys_error* err) noexcept nogil:
    if sys_injected(CALL_PREAD, 0, 0, err):
        return -1
    return sys_check(ksm_vma_each(_file.fd, visit, context) != 0, CALL_PREAD, 0, 0, err)


cdef int maps_each(vma_visit visit, void* context, sys_error* err) noexcept nogil:
    """Visit every mapping. -1 with *err when the kernel does not tell; some may have been visited."""
    cdef int rc
    maps_lock()
    rc = _open_locked(err)
    if rc == 0:
        rc = _each_locked(visit, context, err)
    _close_locked()
    maps_unlock()
    return rc


cdef int _each_in_locked(range_visit* wanted, sys_error* err) noexcept nogil:
    cdef vma_t vma
    cdef uintptr_t cursor = wanted.start
    while cursor < wanted.end:
        if ksm_vma_at(_file.fd, cursor, &vma) != 0:
            # What lies before the cursor has been visited. That there is nothing behind it need not be true.
            wanted.start = cursor
            return _each_locked(_if_within, wanted, err)
        if vma.start >= wanted.end:
            break
        wanted.visit(&vma, wanted.context)
        cursor = vma.end
    return 0


cdef int maps_each_in(
    uintptr_t start, uintptr_t end, vma_visit visit, void* context, sys_error* err
) noexcept nogil:
    """Visit every mapping that overlaps [start, end)."""
    cdef range_visit wanted
    cdef int rc
    wanted.start = start
    wanted.end = end
    wanted.visit = visit
    wanted.context = context
    maps_lock()
    rc = _open_locked(err)
    if rc == 0:
        rc = _each_in_locked(&wanted, err)
    _close_locked()
    maps_unlock()
    return rc


cdef void _in_child() noexcept nogil:
    global _n_users
    maps_renew()
    _file.fd = -1
    _n_users = 0


_file.fd = -1
if pthread_atfork(NULL, NULL, _in_child) != 0:
    raise MemoryError("pthread_atfork failed: ksmcore cannot be made safe against fork")
