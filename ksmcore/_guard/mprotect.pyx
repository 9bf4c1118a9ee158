"""The mprotect guard: the write permission taken away, and a SIGSEGV handler that makes writers wait.

While a window is open, the handler (mprotect.h) makes a thread that writes into it wait until it is closed, then
lets it try again. What this guarantees: the store of a user thread is never lost and never fails, provided
that the thread has SIGSEGV unblocked (the kernel ends a process that faults with it blocked). What it
does not: a system call that writes into the window fails with EFAULT, because the kernel asks for the
permission without raising a signal; and a write that forces its way past the permission
(/proc/self/mem) is not kept out at all.

Lock order: engine lock, then install lock, then gate.
"""

from libc.stdint cimport uint32_t, uintptr_t
from libc.signal cimport SIGSEGV
from posix.signal cimport sigaction_t

from ksmcore._kernel.forks cimport gate_lock, gate_unlock
from ksmcore._kernel.reader cimport reader_return
from ksmcore._kernel.syscalls cimport (
    error_clear, sys_error, sys_is_mapped, sys_page_bytes, sys_pause, sys_protect, sys_sigaction,
)
from ksmcore._guard.window cimport WINDOW_STUCK

cdef extern from "_guard/mprotect.h":
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
    void segv_child()

cdef extern from *:
    """
    #include <dirent.h>
    #include <fcntl.h>
    #include <stdio.h>

    static pthread_mutex_t signal_install = PTHREAD_MUTEX_INITIALIZER;
    static uint32_t signal_n_users;

    static void install_lock(void) { pthread_mutex_lock(&signal_install); }
    static void install_unlock(void) { pthread_mutex_unlock(&signal_install); }

    static void signal_child(void) {
        pthread_mutex_init(&signal_install, 0);
        signal_n_users = 0;
        segv_child();
    }
    static int signal_at_fork(void) { return pthread_atfork(0, 0, signal_child); }

    /* Processor time of thread `tid` in ns, and whether it is off the processor of its own will
       (asleep in the kernel, stopped, or gone; not held by a debugger, which sees the signal before
       the handler does), from /proc. -1 when it cannot be told. */
    static int signal_thread(int tasks, const char *tid, uint64_t *ran_ns, int *asleep) {
        char path[64], buf[512];
        int fd;
        ssize_t n;
        snprintf(path, sizeof path, "%s/stat", tid);
        fd = openat(tasks, path, O_RDONLY | O_CLOEXEC);
        if (fd < 0) { *asleep = 1; return errno == ENOENT ? 0 : -1; }
        n = read(fd, buf, sizeof buf - 1);
        close(fd);
        if (n <= 0) { *asleep = 1; return 0; }
        buf[n] = 0;
        /* the name may hold spaces and brackets; the state follows the last bracket */
        char *state = strrchr(buf, ')');
        if (!state || !state[1] || !state[2]) return -1;
        *asleep = strchr("SDIZXT", state[2]) != 0;
        snprintf(path, sizeof path, "%s/schedstat", tid);
        fd = openat(tasks, path, O_RDONLY | O_CLOEXEC);
        if (fd < 0) return -1;
        n = read(fd, buf, sizeof buf - 1);
        close(fd);
        if (n <= 0) return -1;
        buf[n] = 0;
        *ran_ns = strtoull(buf, 0, 10);
        return 0;
    }

    /* A thread that faulted in the last window may still be on its way to the handler: runnable, in
       the kernel, not yet given its signal. Return 1 once that can be true of no thread: each has been
       seen asleep, or has used SIGNAL_RAN_NS of processor time since (the way to the handler takes
       microseconds and never sleeps after the fault was judged). The kernel brings the processor time
       up to date at a tick or a switch only, so the first change seen may be of time used before; it
       is from that change on that the thread must have run. 0: not within `limit_ms`, or /proc does
       not tell. */
    #define SIGNAL_RAN_NS 100000u
    #define SIGNAL_MAX_THREADS 256
    static int signal_quiesce(int limit_ms) {
        struct { char tid[16]; uint64_t ran_ns; int changed; } busy[SIGNAL_MAX_THREADS];
        int n_busy = 0, asleep, tasks;
        uint64_t ran_ns = 0;
        char self[16];
        struct dirent *entry;
        DIR *dir = opendir("/proc/self/task");
        if (!dir) return 0;
        tasks = dirfd(dir);
        snprintf(self, sizeof self, "%ld", (long)syscall(SYS_gettid));
        while ((entry = readdir(dir))) {
            if (entry->d_name[0] == '.' || !strcmp(entry->d_name, self)) continue;
            if (signal_thread(tasks, entry->d_name, &ran_ns, &asleep) != 0) { n_busy = -1; break; }
            if (asleep) continue;
            if (n_busy == SIGNAL_MAX_THREADS || strlen(entry->d_name) > 15) { n_busy = -1; break; }
            strcpy(busy[n_busy].tid, entry->d_name);
            busy[n_busy].changed = 0;
            busy[n_busy++].ran_ns = ran_ns;
        }
        while (n_busy > 0 && limit_ms-- > 0) {
            struct timespec pause = {0, 1000000L};
            nanosleep(&pause, 0);
            for (int i = n_busy - 1; i >= 0; i--) {
                if (signal_thread(tasks, busy[i].tid, &ran_ns, &asleep) != 0) continue;
                if (asleep || (busy[i].changed && ran_ns - busy[i].ran_ns >= SIGNAL_RAN_NS)) {
                    busy[i] = busy[--n_busy];
                } else if (!busy[i].changed && ran_ns != busy[i].ran_ns) {
                    busy[i].changed = 1;
                    busy[i].ran_ns = ran_ns;
                }
            }
        }
        closedir(dir);
        return n_busy == 0;
    }
    """
    void install_lock() nogil
    void install_unlock() nogil
    int signal_at_fork()
    bint signal_quiesce(int limit_ms) nogil
    uint32_t signal_n_users


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


cdef int signal_enter(sys_error* err) noexcept nogil:
    """Install the handler, or check that it is still there; -1 with *err when it cannot be."""
    cdef int rc
    install_lock()
    if signal_n_users == 0 and not segv.installed:
        segv_forget_windows()
    rc = _install_locked(err)
    if rc == 0:
        _n_users_add(1)
        _unstick()
    install_unlock()
    return rc


cdef void _unstick() noexcept nogil:
    """Ask again for the permission that a close could not get."""
    cdef sys_error ignored
    if segv.stuck_lo == segv.stuck_hi:
        return
    error_clear(&ignored)
    gate_lock()
    if sys_protect(segv.stuck_lo, segv.stuck_hi - segv.stuck_lo, True, &ignored) == 0:
        segv.stuck_lo = segv.stuck_hi = 0
    gate_unlock()


cdef void _n_users_add(int delta) noexcept nogil:
    global signal_n_users
    signal_n_users = <uint32_t>(<int>signal_n_users + delta)


cdef void signal_leave() noexcept nogil:
    """Put the previous handler back, once no thread can still be on its way to ours.

    Where that cannot be told in a second, ours stays: it passes on what is not its own, and the next
    leave tries again. A handler that somebody installed over ours is left alone.
    """
    cdef sigaction_t now
    cdef sys_error err
    error_clear(&err)
    install_lock()
    if signal_n_users > 0:
        # Zero in a forked child: the enter was the parent's.
        _n_users_add(-1)
    if signal_n_users == 0 and segv.installed and segv.stuck_lo == segv.stuck_hi:
        if segv.n_windows == 0 or signal_quiesce(QUIESCE_LIMIT_MS):
            if sys_sigaction(SIGSEGV, NULL, &now, &err) == 0:
                if not segv_is_installed(&now):
                    segv_displaced(&now)
                    segv.installed = 0
                elif sys_sigaction(SIGSEGV, &segv.previous, NULL, &err) == 0:
                    segv.installed = 0
    install_unlock()


cdef int signal_ready(sys_error* err) noexcept nogil:
    """Before a window, and before the gate is taken: is the handler still there?

    Somebody may have put another handler over ours since signal_enter (faulthandler.enable does): looked
    at here, and mended, because a writer that waits would otherwise reach that one. What is left is the
    time from here to the end of the window.
    """
    cdef sigaction_t now
    cdef int rc = sys_sigaction(SIGSEGV, NULL, &now, err)
    if rc == 0 and not segv_is_installed(&now):
        install_lock()
        rc = _install_locked(err)
        install_unlock()
    return rc


cdef int signal_protect(uintptr_t addr, size_t len_bytes, sys_error* err) noexcept nogil:
    """Announce the window, then protect it: a fault never precedes its window."""
    cdef sys_error again
    segv_open(addr, addr + len_bytes)
    if sys_protect(addr, len_bytes, False, err) != 0:
        # mprotect may have protected a part before it failed.
        error_clear(&again)
        if signal_release(addr, len_bytes, False, &again) != 0:
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
        error_clear(&failed)
        if sys_protect(page, page_bytes, True, &failed) != 0 and sys_is_mapped(page, page_bytes):
            err[0] = failed
            return -1
        page += page_bytes
    return 0


cdef int signal_release(
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
            error_clear(&again)
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


cdef uint32_t signal_n_waits() noexcept nogil:
    return segv.n_waits


cdef bint signal_is_installed() noexcept nogil:
    cdef sigaction_t now
    cdef sys_error err
    error_clear(&err)
    return sys_sigaction(SIGSEGV, NULL, &now, &err) == 0 and segv_is_installed(&now)


segv_reader_return = reader_return

if signal_at_fork() != 0:
    raise MemoryError("pthread_atfork failed: ksmcore cannot be made safe against fork")
