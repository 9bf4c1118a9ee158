"""The mprotect guard: the write permission taken away, and a SIGSEGV handler that makes writers wait.

While a window is open, the handler (segv.h) makes a thread that writes into it wait until it is closed, then
lets it try again. What this guarantees: the store of a user thread is never lost and never fails, provided
that the thread has SIGSEGV unblocked (the kernel ends a process that faults with it blocked). What it
does not: a system call that writes into the window fails with EFAULT, because the kernel asks for the
permission without raising a signal; and a write that forces its way past the permission
(/proc/self/mem) is not kept out at all.

Lock order: engine lock, then install lock, then fork lock.
"""

from libc.stdint cimport uint32_t, uintptr_t
from libc.signal cimport SIGSEGV
from posix.signal cimport sigaction_t

from ksmcore._guard.window cimport WINDOW_STUCK
from ksmcore._kernel.forks cimport forks_lock, forks_unlock
from ksmcore._kernel.reader cimport reader_return
from ksmcore._kernel.syscalls cimport (
    sys_error, sys_error_clear, sys_is_mapped, sys_page_bytes, sys_pause, sys_protect, sys_sigaction,
)

cdef extern from "_guard/segv.h":
    ctypedef struct segv_state:
        uint32_t n_waits
        uint32_t n_windows
        uint32_t installed
        uintptr_t stuck_lo
        uintptr_t stuck_hi
        sigaction_t previous
    segv_state segv
    void (*segv_reader_return)() noexcept nogil
    void segv_open(uintptr_t lo, uintptr_t hi) nogil
    void segv_close() nogil
    bint segv_is_installed(const sigaction_t* now) nogil
    void segv_fill(sigaction_t* act) nogil
    void segv_remember(const sigaction_t* now) nogil
    void segv_displaced(const sigaction_t* now) nogil
    void segv_forget_windows() nogil
    bint segv_quiesce(int limit_ms) nogil
    void segv_child()

cdef extern from *:
    """
    static pthread_mutex_t mprotect_install = PTHREAD_MUTEX_INITIALIZER;
    static uint32_t mprotect_n_users;

    static void mprotect_install_lock(void) { pthread_mutex_lock(&mprotect_install); }
    static void mprotect_install_unlock(void) { pthread_mutex_unlock(&mprotect_install); }

    static void mprotect_child(void) {
        pthread_mutex_init(&mprotect_install, 0);
        mprotect_n_users = 0;
        segv_child();
    }
    static int mprotect_at_fork(void) { return pthread_atfork(0, 0, mprotect_child); }
    """
    void mprotect_install_lock() nogil
    void mprotect_install_unlock() nogil
    int mprotect_at_fork()
    uint32_t mprotect_n_users


# Giving the write permission back must not fail: the program's own memory would stay read-only. The
# kernel may be out of memory for a moment, so it is tried again, about a second long.
cdef enum:
    CLOSE_TRIES = 1000
    QUIESCE_LIMIT_MS = 1000


cdef int _install_locked(sys_error* err) noexcept nogil:
    """Put our handler where it is not. The caller holds the install lock."""
    cdef sigaction_t now
    cdef sigaction_t ours
    if sys_sigaction(SIGSEGV, NULL, &now, err) != 0:
        return -1
    if segv_is_installed(&now):
        return 0
    # Either nobody scans, or somebody put another handler over ours while a scan runs.
    if segv.installed:
        segv_displaced(&now)
    segv_remember(&now)
    segv_fill(&ours)
    if sys_sigaction(SIGSEGV, &ours, NULL, err) != 0:
        segv.installed = 0
        return -1
    return 0


cdef int mprotect_enter(sys_error* err) noexcept nogil:
    """Install the handler, or check that it is still there; -1 with *err when it cannot be."""
    cdef int rc
    mprotect_install_lock()
    if mprotect_n_users == 0 and not segv.installed:
        segv_forget_windows()
    rc = _install_locked(err)
    if rc == 0:
        _n_users_add(1)
        _unstick()
    mprotect_install_unlock()
    return rc


cdef void _unstick() noexcept nogil:
    """Ask again for the permission that a close could not get."""
    cdef sys_error ignored
    if segv.stuck_lo == segv.stuck_hi:
        return
    sys_error_clear(&ignored)
    forks_lock()
    if sys_protect(segv.stuck_lo, segv.stuck_hi - segv.stuck_lo, True, &ignored) == 0:
        segv.stuck_lo = segv.stuck_hi = 0
    forks_unlock()


cdef void _n_users_add(int delta) noexcept nogil:
    global mprotect_n_users
    mprotect_n_users = <uint32_t>(<int>mprotect_n_users + delta)


cdef void mprotect_leave() noexcept nogil:
    """Put the previous handler back, once no thread can still be on its way to ours.

    Where that cannot be told in a second, ours stays: it passes on what is not its own, and the next
    leave tries again. A handler that somebody installed over ours is left alone.
    """
    cdef sigaction_t now
    cdef sys_error err
    sys_error_clear(&err)
    mprotect_install_lock()
    if mprotect_n_users > 0:
        # Zero in a forked child: the enter was the parent's.
        _n_users_add(-1)
    if mprotect_n_users == 0 and segv.installed and segv.stuck_lo == segv.stuck_hi:
        if segv.n_windows == 0 or segv_quiesce(QUIESCE_LIMIT_MS):
            if sys_sigaction(SIGSEGV, NULL, &now, &err) == 0:
                if not segv_is_installed(&now):
                    segv_displaced(&now)
                    segv.installed = 0
                elif sys_sigaction(SIGSEGV, &segv.previous, NULL, &err) == 0:
                    segv.installed = 0
    mprotect_install_unlock()


cdef int mprotect_ready(sys_error* err) noexcept nogil:
    """Before a window, and before the fork lock is taken: is the handler still there?

    Somebody may have put another handler over ours since mprotect_enter (faulthandler.enable does): looked
    at here, and mended, because a writer that waits would otherwise reach that one. What is left is the
    time from here to the end of the window.
    """
    cdef sigaction_t now
    cdef int rc = sys_sigaction(SIGSEGV, NULL, &now, err)
    if rc == 0 and not segv_is_installed(&now):
        mprotect_install_lock()
        rc = _install_locked(err)
        mprotect_install_unlock()
    return rc


cdef int mprotect_shut(uintptr_t addr, size_t len_bytes, sys_error* err) noexcept nogil:
    """Announce the window, then protect it: a fault never precedes its window."""
    cdef sys_error again
    segv_open(addr, addr + len_bytes)
    if sys_protect(addr, len_bytes, False, err) != 0:
        # mprotect may have protected a part before it failed.
        sys_error_clear(&again)
        if mprotect_release(addr, len_bytes, False, &again) != 0:
            err[0] = again
            return WINDOW_STUCK
        return -1
    return 0


cdef int _protect_what_is_left(uintptr_t addr, size_t len_bytes, sys_error* err) noexcept nogil:
    """The program has unmapped a part of the window while it was open: nobody waits for that part."""
    cdef size_t page_bytes = sys_page_bytes()
    cdef uintptr_t page = addr
    cdef sys_error failed
    while page < addr + len_bytes:
        sys_error_clear(&failed)
        if sys_protect(page, page_bytes, True, &failed) != 0 and sys_is_mapped(page, page_bytes):
            err[0] = failed
            return -1
        page += page_bytes
    return 0


cdef int mprotect_release(
    uintptr_t addr, size_t len_bytes, bint all_remapped, sys_error* err
) noexcept nogil:
    """Give writers the range back, and wake them.

    WINDOW_STUCK when the kernel would not give the permission back. Then the handler stays installed, and asks
    again for a thread that writes.
    """
    cdef int rc = 0
    cdef int tries
    cdef sys_error again
    if not all_remapped:
        for tries in range(<int>CLOSE_TRIES):
            sys_error_clear(&again)
            rc = sys_protect(addr, len_bytes, True, &again)
            if rc != 0 and not sys_is_mapped(addr, len_bytes):
                rc = _protect_what_is_left(addr, len_bytes, &again)
            if rc == 0:
                break
            sys_pause()
        if rc != 0:
            err[0] = again
            if segv.stuck_lo == segv.stuck_hi:
                segv.stuck_lo = addr
                segv.stuck_hi = addr + len_bytes
            else:
                segv.stuck_lo = min(segv.stuck_lo, addr)
                segv.stuck_hi = max(segv.stuck_hi, addr + len_bytes)
    segv_close()
    return WINDOW_STUCK if rc != 0 else 0


cdef uint32_t mprotect_n_waits() noexcept nogil:
    return segv.n_waits


cdef bint mprotect_is_installed() noexcept nogil:
    cdef sigaction_t now
    cdef sys_error err
    sys_error_clear(&err)
    return sys_sigaction(SIGSEGV, NULL, &now, &err) == 0 and segv_is_installed(&now)


segv_reader_return = reader_return

if mprotect_at_fork() != 0:
    raise MemoryError("pthread_atfork failed: ksmcore cannot be made safe against fork")
