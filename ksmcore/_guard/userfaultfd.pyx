"""The userfaultfd guards: the kernel itself makes writers wait, without any signal handler.

Two ways of closing a window, chosen by what lies under it:

  move      anonymous pages, where system calls can be made to wait as well. The range is registered for
            missing pages, and the pages are moved to a place that only the scanner knows (UFFDIO_MOVE):
            whoever touches them waits. Compared there; those that are not remapped move back. No device
            writes to them in between: the kernel refuses to move a page that is pinned for direct I/O or
            io_uring (EBUSY).
  protect   pages over the store, which cannot be moved, and all pages where only user code can be made to
            wait: a system call would get EFAULT even for reading, were the page missing. The range is
            registered for write-protection and protected; writers wait.

Where a move reports an error, what really happened is asked of pagemap, never taken from the error: the
target was empty before and nobody else can reach it, so a page that is there was moved. (Linux 6.18 moves
pages and then says EEXIST, after it had to try one of them again.)

No signal handler runs on the thread that has a window open (see forks.pxd): one that wrote into it, or read a
page that is away, would wait for the thread that it has interrupted.

A page that is shared with a child since a fork is refused like a pinned one. A write fault tells the two
apart: it gives the page back to this process alone, and such a page cannot have been pinned for writing.

What is left of a huge page is refused likewise, as long as its first page is not this process's alone (Linux asks
about that one, whichever is to be moved): since a fork, say, in which a child or this process wrote to it. To advise
that memory is not needed soon (MADV_COLD) has such a remainder split into pages of the usual size. One that is
pinned is not split.

Writers are woken explicitly: their place in memory may belong to another mapping by then, of which
userfaultfd does not know. A writer that came to wait before the remapping is found by the wake, since
both need the lock of the memory map; one that comes later sees the new mapping.

The descriptor lives from the first enter to the last leave. A program that closes it in between, in the
middle of a window, has asked the kernel to let everybody in: that is its own doing.
"""

from libc.errno cimport EAGAIN, EBADF, EBUSY, EEXIST, EINVAL, ENOENT
from libc.stdint cimport uint8_t, uint32_t, uintptr_t
from libc.string cimport memcpy, memset

from ksmcore._guard.scratch cimport (
    scratch_empty, scratch_end, scratch_init, scratch_register, scratch_t, scratch_take,
)
from ksmcore._guard.window cimport CHANGED, DONE, GUARD_UFFD, N_GUARDS, PINNED, REFUSED, WINDOW_PAGES, WINDOW_STUCK
from ksmcore._kernel.forks cimport forks_lock, forks_unlock
from ksmcore._kernel.pagemap cimport (
    PAGE_PRESENT, PAGE_SWAPPED, pagemap, pagemap_close, pagemap_open, pagemap_query,
)
from ksmcore._kernel.syscalls cimport (
    ADVISE_COLD, ADVISE_DONTNEED, ADVISE_POPULATE_WRITE, CALL_OPEN, CALL_USERFAULTFD, sys_advise, sys_close, sys_drop,
    sys_error, sys_error_clear, sys_file, sys_is_kept, sys_is_passing, sys_keep, sys_page_bytes, sys_pause, sys_unmap,
)
from ksmcore._kernel.uffd cimport (
    UFFD_MISSING, UFFD_PROTECTED, uffd_copy, uffd_count, uffd_move, uffd_open, uffd_protect, uffd_register,
    uffd_unregister, uffd_wake,
)

cdef extern from *:
    """
    #include <pthread.h>

    static pthread_mutex_t userfaultfd_install = PTHREAD_MUTEX_INITIALIZER;
    static void userfaultfd_install_lock(void) { pthread_mutex_lock(&userfaultfd_install); }
    static void userfaultfd_install_unlock(void) { pthread_mutex_unlock(&userfaultfd_install); }
    static void userfaultfd_install_renew(void) { pthread_mutex_init(&userfaultfd_install, 0); }
    """
    void userfaultfd_install_lock() nogil
    void userfaultfd_install_unlock() nogil
    void userfaultfd_install_renew() nogil
    int pthread_atfork(
        void (*prepare)() noexcept nogil, void (*parent)() noexcept nogil, void (*child)() noexcept nogil
    )

cdef enum:
    CLOSE_TRIES = 1000     # a millisecond apart: giving pages back must not fail
    MOVE_TRIES = 100       # of a page that the kernel holds for a moment
    MOVE_ATTEMPTS = 3      # at first, after a write fault, and after huge pages were split
    COPY_AFTER = 10        # tries of moving a page back before it is copied instead
    SCRATCH_PAGES = 512    # of the usual size, that are given up at once: a tenth of a millisecond

# One for each kind of guard. `n_users`, the descriptor and the scratch change under the install lock; what
# belongs to a window, under the fork lock.
ctypedef struct guard_state:
    sys_file file
    bint moves                 # the kernel can move pages
    uint32_t n_users
    scratch_t scratch          # where pages are moved to
    scratch_t huge_scratch     # the same for huge pages; made for the first of them
    pagemap pm
    bint is_stuck              # the last window could not be given back
    window_t stuck
    uint8_t stuck_outcomes[<int>WINDOW_PAGES]

cdef guard_state _states[<int>N_GUARDS]
cdef uint32_t _n_waits = 0


cdef int userfaultfd_probe(guard_kind kind, bint* moves, sys_error* err) noexcept nogil:
    """Can this guard be had? *moves: and does it refuse pinned pages?"""
    cdef int fd
    moves[0] = kind == GUARD_UFFD
    fd = uffd_open(kind != GUARD_UFFD, moves, err)
    sys_close(fd)
    return 0 if fd >= 0 else -1


cdef int _begin(guard_state* state, bint user_mode_only, sys_error* err) noexcept nogil:
    state.moves = not user_mode_only
    sys_keep(&state.file, uffd_open(user_mode_only, &state.moves, err))
    if state.file.fd < 0:
        return -1
    if not state.moves:
        return 0
    err.code = pagemap_open(&state.pm, sys_page_bytes(), True)
    if state.pm.file.fd < 0 and not sys_is_passing(err.code):
        # Without it nobody knows where a page is when a move fails.
        state.moves = False
        err.code = 0
        return 0
    err.call = <int>CALL_OPEN
    if (
        state.pm.file.fd >= 0
        and scratch_init(&state.scratch, <size_t>SCRATCH_PAGES * sys_page_bytes(), False, err) == 0
        and scratch_register(&state.scratch, state.file.fd, err) == 0
    ):
        return 0
    _end(state)
    return -1


cdef void _end(guard_state* state) noexcept nogil:
    scratch_end(&state.scratch)
    scratch_end(&state.huge_scratch)
    pagemap_close(&state.pm)
    sys_drop(&state.file)


cdef int _heal(guard_state* state, sys_error* err) noexcept nogil:
    """Try once more to give back the window that is stuck, if one is. The caller holds the fork lock."""
    if not state.is_stuck:
        return 0
    if _give_back(state, &state.stuck, False, True, err) != 0:
        return -1
    state.is_stuck = False
    return 0


cdef void _heal_if_stuck(guard_state* state) noexcept nogil:
    cdef sys_error ignored
    if state.is_stuck:
        sys_error_clear(&ignored)
        forks_lock()
        _heal(state, &ignored)
        forks_unlock()


cdef int userfaultfd_enter(guard_kind kind, sys_error* err) noexcept nogil:
    cdef guard_state* state = &_states[<int>kind]
    cdef int rc = 0
    userfaultfd_install_lock()
    _heal_if_stuck(state)
    if state.n_users == 0 and state.file.fd < 0:
        rc = _begin(state, kind != GUARD_UFFD, err)
    if rc == 0:
        state.n_users += 1
    userfaultfd_install_unlock()
    return rc


cdef void userfaultfd_leave(guard_kind kind) noexcept nogil:
    cdef guard_state* state = &_states[<int>kind]
    userfaultfd_install_lock()
    # Zero in a forked child: the enter was the parent's.
    if state.n_users > 0:
        state.n_users -= 1
        _heal_if_stuck(state)
        if state.n_users == 0 and not state.is_stuck:
            _end(state)
    userfaultfd_install_unlock()


# ---- moving pages ---------------------------------------------------------------------------------

cdef uint32_t _n_there(guard_state* state, uintptr_t target, uint32_t n) noexcept nogil:
    """How many pages from `target` on are there, without a gap."""
    cdef uint8_t flags[<int>WINDOW_PAGES]
    cdef sys_error ignored
    cdef uint32_t i
    sys_error_clear(&ignored)
    if pagemap_query(&state.pm, target, n, flags, &ignored) != 0:
        return 0
    for i in range(n):
        # Not PAGE_UNSURE by itself: where there is no page map to ask, that is said of pages that are not there.
        if not flags[i] & (PAGE_PRESENT | PAGE_SWAPPED):
            return i
    return n


cdef void _move(
    guard_state* state, uintptr_t target, uintptr_t source, uint32_t n, size_t page_bytes, uint8_t* moved, int* codes
) noexcept nogil:
    """Move n pages, to where none is yet, as far as the kernel allows: moved[i], or else errno in codes[i].

    One call serves many pages, but only within one mapping at either end; where a call fails for that,
    it is tried with half as many.
    """
    cdef uint32_t done = 0, piece = n, tries = 0, k, n_moved
    cdef size_t moved_bytes
    cdef sys_error err
    memset(moved, 0, n)
    while done < n:
        piece = min(piece, n - done)
        sys_error_clear(&err)
        k = piece
        if uffd_move(
            state.file.fd, target + done * page_bytes, source + done * page_bytes, k * page_bytes, &moved_bytes, &err
        ) == 0:
            n_moved = k
            piece = n
        else:
            n_moved = _n_there(state, target + done * page_bytes, k)
        if n_moved > 0:
            k = n_moved
            memset(moved + done, 1, k)
            done += k
            tries = 0
        elif err.code == EINVAL and k > 1:
            piece = k // 2
        elif err.code == EAGAIN and tries < <uint32_t>MOVE_TRIES:
            tries += 1
        else:
            codes[done] = err.code
            done += 1
            tries = 0
            piece = n


cdef uint32_t _move_out(guard_state* state, window_t* w) noexcept nogil:
    """Take the pages away from everybody. Returns how many were refused as pinned."""
    cdef int codes[<int>WINDOW_PAGES]
    cdef uint32_t i, n_busy = 0
    _move(state, w.scratch, w.addr, w.n_pages, w.page_bytes, w.away, codes)
    for i in range(w.n_pages):
        if w.away[i]:
            w.outcomes[i] = DONE
        elif codes[i] == EBUSY:
            w.outcomes[i] = PINNED
            n_busy += 1
        else:
            # Given up by the program since it was looked at; or of a mapping that is not as it was.
            w.outcomes[i] = CHANGED if codes[i] == ENOENT else REFUSED
    return n_busy


cdef int _put_back(guard_state* state, window_t* w, bint may_copy, sys_error* err) noexcept nogil:
    """Move back what was taken away and not dealt with. -1 when a page is still away."""
    cdef int codes[<int>WINDOW_PAGES]
    cdef uint8_t moved[<int>WINDOW_PAGES]
    cdef uint32_t i = 0, start, k
    cdef int rc = 0
    cdef uintptr_t home, there
    cdef sys_error failed
    while i < w.n_pages:
        if not w.away[i] or w.outcomes[i] == DONE:
            i += 1
            continue
        start = i
        while i < w.n_pages and w.away[i] and w.outcomes[i] != DONE:
            i += 1
        home = w.addr + start * w.page_bytes
        there = w.scratch + start * w.page_bytes
        _move(state, home, there, i - start, w.page_bytes, moved, codes)
        for k in range(i - start):
            if moved[k]:
                w.away[start + k] = 0
                continue
            # EINVAL: the program has changed the mapping in the meantime (its permission, its lock).
            if may_copy or codes[k] == EINVAL:
                sys_error_clear(&failed)
                uffd_copy(state.file.fd, home + k * w.page_bytes, there + k * w.page_bytes, w.page_bytes, &failed)
                if failed.code == 0 or failed.code == ENOENT or failed.code == EEXIST:
                    codes[k] = ENOENT
            if codes[k] == ENOENT:
                # Copied; or the program has unmapped its memory, and nobody misses the page.
                w.away[start + k] = 0
                continue
            if err.code == 0:
                err.code = codes[k]
                err.call = <int>CALL_USERFAULTFD
                err.addr = home + k * w.page_bytes
                err.len_bytes = w.page_bytes
            rc = -1
    return rc


# ---- windows --------------------------------------------------------------------------------------

cdef bint userfaultfd_moves(const window_t* w) noexcept nogil:
    """Is this window closed by moving its pages away?"""
    return not w.over_store and _states[<int>w.guard].moves


cdef int _unregister(int fd, const window_t* w, sys_error* err) noexcept nogil:
    """EINVAL: the program has mapped something there that userfaultfd does not know. What else is in the
    range is then let go page by page."""
    cdef sys_error failed
    cdef uint32_t i
    sys_error_clear(&failed)
    if uffd_unregister(fd, w.addr, w.n_pages * w.page_bytes, &failed) == 0:
        return 0
    if failed.code == EINVAL:
        for i in range(w.n_pages):
            sys_error_clear(&failed)
            if uffd_unregister(fd, w.addr + i * w.page_bytes, w.page_bytes, &failed) != 0 and failed.code != EINVAL:
                break
        else:
            return 0
    if err.code == 0:
        err[0] = failed
    return -1


cdef int _give_back(guard_state* state, window_t* w, bint all_remapped, bint may_copy, sys_error* err) noexcept nogil:
    """Everything that ends a window; may be called again when it failed."""
    global _n_waits
    if userfaultfd_moves(w) and _put_back(state, w, may_copy, err) != 0:
        return -1
    if not all_remapped and _unregister(state.file.fd, w, err) != 0:
        return -1
    _n_waits += uffd_count(state.file.fd)
    return uffd_wake(state.file.fd, w.addr, w.n_pages * w.page_bytes, err)


cdef int userfaultfd_release(window_t* w, bint all_remapped, sys_error* err) noexcept nogil:
    """WINDOW_STUCK when the kernel would not take the pages back. Then they stay shut; every window, enter
    and leave from then on first tries again."""
    cdef guard_state* state = &_states[<int>w.guard]
    cdef sys_error again
    cdef int tries, rc = -1
    for tries in range(<int>CLOSE_TRIES):
        sys_error_clear(&again)
        rc = _give_back(state, w, all_remapped, tries >= COPY_AFTER, &again)
        if rc == 0:
            break
        sys_pause()
    if rc != 0:
        err[0] = again
        state.stuck = w[0]
        memcpy(state.stuck_outcomes, w.outcomes, w.n_pages)
        state.stuck.outcomes = state.stuck_outcomes
        state.is_stuck = True
        return WINDOW_STUCK
    return 0


cdef int _undo(window_t* w, sys_error* err) noexcept nogil:
    """Shutting failed with *err, perhaps for a part of the range only: let everybody in again."""
    cdef sys_error again
    sys_error_clear(&again)
    memset(w.outcomes, CHANGED, w.n_pages)
    if userfaultfd_release(w, False, &again) != 0:
        err[0] = again
        return WINDOW_STUCK
    return -1


cdef int _shut_by_moving(guard_state* state, window_t* w, sys_error* err) noexcept nogil:
    cdef sys_error ignored
    cdef size_t len_bytes = w.n_pages * w.page_bytes
    cdef uint32_t attempt, n_busy, i
    cdef uint8_t busy[<int>WINDOW_PAGES]
    cdef scratch_t* scratch = &state.scratch
    if w.is_huge:
        sys_error_clear(&ignored)
        if state.huge_scratch.addr != 0 or scratch_init(
            &state.huge_scratch, <size_t>WINDOW_PAGES * w.page_bytes, True, &ignored
        ) == 0:
            scratch = &state.huge_scratch
    for attempt in range(<uint32_t>MOVE_ATTEMPTS):
        # Another place each time: what could only be copied back is still in the last one.
        if scratch_take(scratch, state.file.fd, len_bytes, &w.scratch, err) != 0:
            return -1
        w.bytes = <const uint8_t*>w.scratch
        if uffd_register(state.file.fd, w.addr, len_bytes, UFFD_MISSING, err) != 0:
            return _undo(w, err)
        n_busy = _move_out(state, w)
        if n_busy == 0 or attempt == <uint32_t>MOVE_ATTEMPTS - 1:
            return 0
        for i in range(w.n_pages):
            busy[i] = w.outcomes[i] == PINNED
            w.outcomes[i] = CHANGED
        if userfaultfd_release(w, False, err) != 0:
            return WINDOW_STUCK
        for i in range(w.n_pages):
            sys_error_clear(&ignored)
            if busy[i]:
                sys_advise(
                    w.addr + i * w.page_bytes, w.page_bytes,
                    ADVISE_POPULATE_WRITE if attempt == 0 else ADVISE_COLD, &ignored
                )
    return 0


cdef int userfaultfd_shut(window_t* w, sys_error* err) noexcept nogil:
    """Close the window to everybody. -1: nothing is shut; WINDOW_STUCK: nor can it be opened again."""
    cdef guard_state* state = &_states[<int>w.guard]
    cdef size_t len_bytes = w.n_pages * w.page_bytes
    memset(w.away, 0, w.n_pages)
    memset(w.outcomes, DONE, w.n_pages)
    if not sys_is_kept(&state.file):
        err.code = EBADF
        err.call = <int>CALL_USERFAULTFD
        err.addr = w.addr
        err.len_bytes = len_bytes
        return -1
    if _heal(state, err) != 0:
        return WINDOW_STUCK
    if userfaultfd_moves(w):
        return _shut_by_moving(state, w, err)
    w.bytes = <const uint8_t*>w.addr
    if (
        uffd_register(state.file.fd, w.addr, len_bytes, UFFD_PROTECTED, err) != 0
        or uffd_protect(state.file.fd, w.addr, len_bytes, True, err) != 0
    ):
        return _undo(w, err)
    return 0


cdef void userfaultfd_tidy(guard_kind kind) noexcept nogil:
    cdef guard_state* state = &_states[<int>kind]
    forks_lock()
    # What is stuck there is nobody's to give up.
    if not state.is_stuck:
        scratch_empty(&state.scratch)
        scratch_empty(&state.huge_scratch)
    forks_unlock()


cdef uint32_t userfaultfd_n_waits() noexcept nogil:
    return _n_waits


cdef void _before_fork() noexcept nogil:
    """Runs before the fork lock is taken: what is away now would be missing in the child."""
    cdef int kind
    for kind in range(<int>N_GUARDS):
        _heal_if_stuck(&_states[kind])


cdef void _in_child() noexcept nogil:
    """The descriptors are closed (see forks), and the scratch was not inherited. Pages that are stuck in
    it are lost to the child: better that it faults there than that it reads zeros."""
    cdef sys_error ignored
    cdef uint32_t i
    cdef int kind
    cdef const window_t* stuck
    userfaultfd_install_renew()
    sys_error_clear(&ignored)
    for kind in range(<int>N_GUARDS):
        stuck = &_states[kind].stuck
        for i in range(stuck.n_pages if _states[kind].is_stuck else 0):
            if stuck.away[i] and stuck.outcomes[i] != DONE:
                sys_unmap(stuck.addr + i * stuck.page_bytes, stuck.page_bytes, &ignored)
        memset(&_states[kind], 0, sizeof(guard_state))
        _states[kind].file.fd = -1
        _states[kind].pm.file.fd = -1


cdef int _kind
for _kind in range(<int>N_GUARDS):
    _states[_kind].file.fd = -1
    _states[_kind].pm.file.fd = -1
if pthread_atfork(_before_fork, NULL, _in_child) != 0:
    raise MemoryError("pthread_atfork failed: ksmcore cannot be made safe against fork")
