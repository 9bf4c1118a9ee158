"""The mappings of the process, one after the other by address; allocates nothing.

All of them are read as text (0.5 us each). For a range, the kernel is asked where it can answer
(PROCMAP_QUERY, Linux 6.11); where it does not, all are read and most passed over.

Their traits, what the program has advised and the like, only smaps tells: 2.5 us each, and 10-15 ms more for each GiB
of small resident pages on the way, since the kernel walks their page tables.

One descriptor of each file serves the process, one reader at a time. Whoever visits takes no lock.
"""

from libc.errno cimport EFAULT, ENOENT, errno
from libc.stdint cimport uint32_t, uintptr_t

from ksmcore._kernel.syscalls cimport (
    CALL_PREAD, sys_check, sys_drop, sys_error, sys_error_clear, sys_file, sys_injected, sys_is_kept, sys_keep,
    sys_open_read,
)

cdef extern from "_kernel/maps.h" nogil:
    int ksm_vma_each(int fd, vma_visit visit, void* context)
    int ksm_vma_at(int fd, uintptr_t addr, vma_t* vma)
    int ksm_traits_each(int fd, uintptr_t end, vma_visit visit, void* context)
    ctypedef struct ksm_policy:
        int mode
    int ksm_policy_at(uintptr_t addr, ksm_policy* policy)
    int ksm_policy_set(uintptr_t addr, size_t len_bytes, const ksm_policy* policy)
    int ksm_key_set(uintptr_t addr, size_t len_bytes, int key)

cdef extern from "<sys/mman.h>" nogil:
    int mlock(const void* addr, size_t len_bytes)

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
cdef sys_file _traits_file               # smaps
cdef uint32_t _n_users = 0
cdef int _answers = -1                   # -1: not asked yet


cdef void _if_within(const vma_t* vma, void* context) noexcept nogil:
    cdef range_visit* wanted = <range_visit*>context
    if vma.start < wanted.end and vma.end > wanted.start:
        wanted.visit(vma, wanted.context)


cdef int _open_locked(sys_file* file, const char* path, sys_error* err) noexcept nogil:
    """Have a file open, also where the program has closed it; -1 with *err when it cannot be."""
    if not sys_is_kept(file):
        sys_keep(file, sys_open_read(path, err))
    return 0 if file.fd >= 0 else -1


cdef void _close_locked() noexcept nogil:
    if _n_users == 0:
        sys_drop(&_file)
        sys_drop(&_traits_file)


cdef void maps_enter() noexcept nogil:
    global _n_users
    cdef sys_error ignored
    sys_error_clear(&ignored)
    maps_lock()
    _n_users += 1
    _open_locked(&_file, b"/proc/self/maps", &ignored)
    _open_locked(&_traits_file, b"/proc/self/smaps", &ignored)
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
    rc = _open_locked(&_file, b"/proc/self/maps", err)
    if rc == 0:
        rc = _each_locked(visit, context, err)
    _close_locked()
    maps_unlock()
    return rc


cdef int _each_in_locked(range_visit* wanted, sys_error* err) noexcept nogil:
    global _answers
    cdef vma_t vma
    cdef uintptr_t cursor = wanted.start
    while cursor < wanted.end:
        if ksm_vma_at(_file.fd, cursor, &vma) != 0:
            # What lies before the cursor has been visited. That there is nothing behind it need not be true.
            wanted.start = cursor
            if errno != ENOENT:
                _answers = 0     # any more: a filter of system calls has come
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
    rc = _open_locked(&_file, b"/proc/self/maps", err)
    if rc == 0:
        rc = _each_in_locked(&wanted, err)
    _close_locked()
    maps_unlock()
    return rc


cdef bint maps_answers() noexcept nogil:
    """Can the kernel be asked for single mappings? Else maps_each_in takes as long as maps_each."""
    global _answers
    cdef sys_error ignored
    cdef vma_t vma
    if _answers < 0:
        sys_error_clear(&ignored)
        maps_lock()
        if _open_locked(&_file, b"/proc/self/maps", &ignored) == 0:
            _answers = ksm_vma_at(_file.fd, <uintptr_t>&_answers, &vma) == 0
        _close_locked()
        maps_unlock()
    return _answers > 0


cdef int maps_traits_each(uintptr_t end, vma_visit visit, void* context, sys_error* err) noexcept nogil:
    """Visit every mapping below `end`, with its traits. -1 with *err when the kernel does not tell."""
    cdef int rc
    maps_lock()
    rc = _open_locked(&_traits_file, b"/proc/self/smaps", err)
    if rc == 0:
        rc = sys_injected(CALL_PREAD, 0, 0, err)
    if rc == 0:
        rc = sys_check(ksm_traits_each(_traits_file.fd, end, visit, context) != 0, CALL_PREAD, 0, 0, err)
    _close_locked()
    maps_unlock()
    return rc


# ---- what is given to a new mapping -------------------------------------------------------------------

cdef int maps_has_policy(uintptr_t addr) noexcept nogil:
    """A policy of the whole process does not count: what is mapped anew falls under it again."""
    cdef ksm_policy policy
    if ksm_policy_at(addr, &policy) == 0:
        return policy.mode != 0
    return 0 if errno == EFAULT else -1          # nothing is mapped there (any more)


# Unchecked: where it is refused the bytes are right all the same, and it was allowed for the mapping before.

cdef void maps_give_policy(uintptr_t source, uintptr_t target, size_t len_bytes) noexcept nogil:
    """Give pages that are not there yet the NUMA policy that others have for themselves, if any."""
    cdef ksm_policy policy
    if ksm_policy_at(source, &policy) == 0 and policy.mode != 0:
        ksm_policy_set(target, len_bytes, &policy)


cdef void maps_give_key(uintptr_t addr, size_t len_bytes, int key) noexcept nogil:
    ksm_key_set(addr, len_bytes, key)


cdef void maps_lock_pages(uintptr_t addr, size_t len_bytes) noexcept nogil:
    mlock(<const void*>addr, len_bytes)


cdef void _in_child() noexcept nogil:
    global _n_users
    maps_renew()
    _file.fd = _traits_file.fd = -1
    _n_users = 0


_file.fd = _traits_file.fd = -1
if pthread_atfork(NULL, NULL, _in_child) != 0:
    raise MemoryError("pthread_atfork failed: ksmcore cannot be made safe against fork")
