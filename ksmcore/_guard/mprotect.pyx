"""The mprotect guard: the write permission taken away, and a SIGSEGV handler that makes writers wait.

While a window is open, the handler (segv.h) makes a thread that writes into it wait until it is closed, then
lets it try again. What this guarantees: the store of a user thread is never lost and never fails. What it
does not: a system call that writes into the window fails with EFAULT, because the kernel asks for the
permission without raising a signal; and a write that forces its way past the permission
(/proc/self/mem) is not kept out at all.

The kernel ends a process of which a thread faults with SIGSEGV blocked. So no window is opened while a thread
blocks it, as far as /proc tells (threads.h): before each window, unless it was looked at so shortly before that looking
would take a good part of the time. What is left is a thread that blocks it between the look and the end of the window.
Where /proc does not tell, nothing is merged; what is to become plain memory again does so all the same.

A handler that the program installs by sigaction() or signal() meanwhile does not take the place of ours, where these
calls are redirected (calls.pyx): it is what ours passes on to, and what is put back in the end.

Lock order: engine lock, then install lock, then fork lock. The lock of the chains is taken under any of them, and for
a few system calls only.
"""

from libc.stdint cimport uint32_t, uint64_t, uintptr_t

from ksmcore._guard.window cimport WINDOW_STUCK
from ksmcore._hooks.calls cimport calls_action, calls_asked, calls_route_actions
from ksmcore._kernel.forks cimport forks_lock, forks_unlock
from ksmcore._kernel.reader cimport reader_return
from ksmcore._kernel.syscalls cimport (
    CALL_SIGACTION, sys_check, sys_close, sys_error, sys_error_clear, sys_injected, sys_is_mapped, sys_now_ns,
    sys_open_read, sys_page_bytes, sys_pause, sys_protect, sys_spent_ns,
)

cdef extern from "_guard/segv.h":
    ctypedef struct chain:
        uint32_t installed
    chain segv_chain
    chain segv_bus_chain
    bint chain_is_in_place(chain* c) nogil
    ctypedef struct segv_state:
        uint32_t n_waits
        uint32_t n_windows
        uintptr_t stuck_lo
        uintptr_t stuck_hi
    segv_state segv
    void (*segv_reader_return)(void* context) noexcept nogil
    void segv_open(uintptr_t lo, uintptr_t hi) nogil
    void segv_close() nogil
    void segv_forget_windows() nogil
    void segv_child()

cdef extern from "_guard/threads.h" nogil:
    const char* THREADS_DIRECTORY
    ctypedef enum threads_found:
        THREADS_CLEAR
        THREADS_BLOCKED
        THREADS_UNKNOWN
    uint32_t threads_count()
    threads_found threads_look(int dir)
    bint threads_quiesce(int dir, int limit_ms)

cdef extern from *:
    """
    static pthread_mutex_t mprotect_install = PTHREAD_MUTEX_INITIALIZER;
    static uint32_t mprotect_n_users;

    static void mprotect_install_lock(void) { pthread_mutex_lock(&mprotect_install); }
    static void mprotect_install_unlock(void) { pthread_mutex_unlock(&mprotect_install); }

    /* The lock of the chains, held for some system calls: the number of the thread that changes one, 0: none. Handlers
       of the signals that are let through may run in the midst of that and want to change one themselves; by the
       number, which comes and goes with the lock, they know. 0: this is such a handler, and nothing is locked. */
    static uint32_t mprotect_changer;
    static int mprotect_chains_lock(sigset_t *before) {
        const struct timespec pause = {0, 50000L};
        uint32_t here = (uint32_t)syscall(SYS_gettid), found = 0;
        ksm_block_signals(before);
        while (!__atomic_compare_exchange_n(&mprotect_changer, &found, here, 0, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED)) {
            if (found == here) {
                ksm_restore_signals(before);
                return 0;
            }
            nanosleep(&pause, (struct timespec *)0);
            found = 0;
        }
        return 1;
    }
    static void mprotect_chains_unlock(const sigset_t *before) {
        __atomic_store_n(&mprotect_changer, 0, __ATOMIC_RELEASE);
        ksm_restore_signals(before);
    }

    static int mprotect_chains_install(void) {
        sigset_t before;
        int rc, failed;
        mprotect_chains_lock(&before);
        rc = chain_install(&segv_chain);
        failed = errno;
        /* Unchecked: no window depends on it. */
        if (rc == 0) chain_install(&segv_bus_chain);
        mprotect_chains_unlock(&before);
        errno = failed;
        return rc;
    }

    static void mprotect_chains_remove(void) {
        sigset_t before;
        mprotect_chains_lock(&before);
        chain_remove(&segv_chain);
        chain_remove(&segv_bus_chain);
        mprotect_chains_unlock(&before);
    }

    /* sigaction() for the program, on any thread and in handlers. What it points to may be in a window. */
    static int mprotect_action(int sig, const struct sigaction *wanted, struct sigaction *was) {
        struct sigaction own, found;
        sigset_t before;
        int rc, saved = errno;
        if (wanted) own = *wanted;
        /* In the midst of a change: as if it had come past us. */
        if (!mprotect_chains_lock(&before)) return sigaction(sig, wanted, was);
        rc = chain_change(sig == SIGBUS ? &segv_bus_chain : &segv_chain, wanted ? &own : (struct sigaction *)0, &found);
        if (rc != 0) saved = errno;
        mprotect_chains_unlock(&before);
        if (rc == 0 && was) *was = found;
        errno = saved;
        return rc;
    }

    static int mprotect_is_over(int sig) {
        return chain_is_in_place(sig == SIGBUS ? &segv_bus_chain : &segv_chain);
    }

    static void mprotect_child(void) {
        pthread_mutex_init(&mprotect_install, 0);
        mprotect_changer = 0;
        mprotect_n_users = 0;
        segv_child();
    }
    static int mprotect_at_fork(void) { return pthread_atfork(0, 0, mprotect_child); }
    """
    void mprotect_install_lock() nogil
    void mprotect_install_unlock() nogil
    int mprotect_chains_install() nogil
    void mprotect_chains_remove() nogil
    int mprotect_action(int sig, const void* wanted, void* was) noexcept nogil
    int mprotect_is_over(int sig) noexcept nogil
    int mprotect_at_fork()
    uint32_t mprotect_n_users


# Giving the write permission back must not fail: the program's own memory would stay read-only. The
# kernel may be out of memory for a moment, so it is tried again, about a second long.
cdef enum:
    CLOSE_TRIES = 1000
    QUIESCE_LIMIT_MS = 1000

# How long to wait for the end of a moment in which a thread blocks SIGSEGV, before a window is given up; and before
# the way back is.
cdef enum:
    PATIENCE_NS = 5_000_000
    LONG_PATIENCE_NS = 1_000_000_000
# The signal masks are looked at again once that has taken less than this part of the time since; more often for a
# while where threads have come or gone: most that block a signal do so when they begin.
    LOOK_SHARE = 16
    NEWCOMERS_SHARE = 1
    NEWCOMERS_NS = 20_000_000

# Read and written under the fork lock.
cdef threads_found _found = THREADS_CLEAR
cdef uint32_t _n_threads = 0
cdef uint64_t _looked_ns = 0     # when the masks were looked at last,
cdef uint64_t _look_ns = 0       # and how much of this thread's processor time that took
cdef uint64_t _changed_ns = 0    # when the number of threads was seen to be another
cdef uint64_t _blocked_ns = 0    # since when a thread blocks SIGSEGV, 0: none does


cdef int _install_locked(sys_error* err) noexcept nogil:
    """Put our handlers where they are not. The caller holds the install lock."""
    if sys_injected(CALL_SIGACTION, 0, 0, err):
        return -1
    return sys_check(mprotect_chains_install() != 0, CALL_SIGACTION, 0, 0, err)


cdef int mprotect_enter(sys_error* err) noexcept nogil:
    """Install the handlers, or check that they are still there; -1 with *err when they cannot be."""
    cdef int rc
    mprotect_install_lock()
    if mprotect_n_users == 0 and not segv_chain.installed:
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


cdef bint _quiesce() noexcept nogil:
    """Can no thread be on its way to the handler any more?"""
    cdef sys_error ignored
    cdef bint is_quiet
    cdef int dir
    if segv.n_windows == 0:
        return True
    sys_error_clear(&ignored)
    dir = sys_open_read(THREADS_DIRECTORY, &ignored)
    is_quiet = dir >= 0 and threads_quiesce(dir, QUIESCE_LIMIT_MS)
    sys_close(dir)
    return is_quiet


cdef void mprotect_leave() noexcept nogil:
    """Put the previous handlers back, once no thread can still be on its way to ours.

    Where that cannot be told in a second, ours stay: they pass on what is not their own, and the next
    leave tries again. A handler that somebody installed over ours is left alone.
    """
    mprotect_install_lock()
    if mprotect_n_users > 0:
        # Zero in a forked child: the enter was the parent's.
        _n_users_add(-1)
    if mprotect_n_users == 0 and segv_chain.installed and segv.stuck_lo == segv.stuck_hi and _quiesce():
        mprotect_chains_remove()
    mprotect_install_unlock()


cdef int mprotect_ready(sys_error* err) noexcept nogil:
    """Before a window, and before the fork lock is taken: is the handler still there?

    Somebody may have put another handler over ours since mprotect_enter, past the calls that are redirected: looked
    at here, and mended, because a writer that waits would otherwise reach that one. What is left is the
    time from here to the end of the window.
    """
    cdef int rc = 0
    if sys_injected(CALL_SIGACTION, 0, 0, err):
        return -1
    if not chain_is_in_place(&segv_chain):
        mprotect_install_lock()
        rc = _install_locked(err)
        mprotect_install_unlock()
    return rc


# ---- windows --------------------------------------------------------------------------------------

cdef void _look(bint is_way_back) noexcept nogil:
    """What was found a moment ago serves as well, but not to refuse the way back: nobody would try that again."""
    global _found, _n_threads, _looked_ns, _look_ns, _changed_ns, _blocked_ns
    cdef uint64_t begun_ns = sys_now_ns(), spent_ns
    cdef uint32_t n_threads = threads_count()
    cdef sys_error ignored
    cdef int dir, share = LOOK_SHARE
    cdef bint serves = _found == THREADS_CLEAR or (_found == THREADS_BLOCKED and not is_way_back)
    if n_threads != _n_threads:
        serves = False
        _n_threads = n_threads
        _changed_ns = begun_ns
    if begun_ns - _changed_ns < <uint64_t>NEWCOMERS_NS:
        share = NEWCOMERS_SHARE
    if serves and n_threads != 0 and begun_ns - _looked_ns < share * _look_ns:
        return
    spent_ns = sys_spent_ns()
    sys_error_clear(&ignored)
    dir = sys_open_read(THREADS_DIRECTORY, &ignored)
    _found = threads_look(dir) if dir >= 0 else THREADS_UNKNOWN
    sys_close(dir)
    _looked_ns = sys_now_ns()
    _look_ns = sys_spent_ns() - spent_ns
    if _found != THREADS_BLOCKED:
        _blocked_ns = 0
    elif _blocked_ns == 0:
        _blocked_ns = _looked_ns


cdef bint mprotect_may_shut(bint is_way_back) noexcept nogil:
    """May a window be opened, as far as the signal masks of all threads go? The caller holds the fork lock, which is
    given up meanwhile where a thread blocks SIGSEGV: perhaps for a moment only.

    `is_way_back`: that has to be possible where /proc cannot be read, too.
    """
    cdef uint64_t patience_ns = LONG_PATIENCE_NS if is_way_back else PATIENCE_NS
    _look(is_way_back)
    while _found == THREADS_BLOCKED and sys_now_ns() - _blocked_ns < patience_ns:
        forks_unlock()
        sys_pause()
        forks_lock()
        _look(is_way_back)
    return _found == THREADS_CLEAR or (_found == THREADS_UNKNOWN and is_way_back)


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
    return chain_is_in_place(&segv_chain) or chain_is_in_place(&segv_bus_chain)


segv_reader_return = reader_return
calls_route_actions(<calls_action>mprotect_action, <calls_asked>mprotect_is_over)

if mprotect_at_fork() != 0:
    raise MemoryError("pthread_atfork failed: ksmcore cannot be made safe against fork")
