"""The guard: what keeps writers out of a window, a range of pages being compared and remapped.

Three kinds, with the same interface; what each guarantees is in docs/guarantees.md. One window exists per
process. Its lock is the fork lock, so a fork never happens inside a window.

Two of them cannot make system calls wait, and the third sees no direct input into pages over the store. There no window
is opened over memory that a call in flight may write into, where calls tell of it (_hooks/calls). The way back cannot
leave such memory as it is for as long as a call may last (a socket from which nothing comes): it waits for a while, and
then opens its window all the same.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t, uintptr_t
from libc.string cimport memset

from ksmcore._guard.mprotect cimport (
    mprotect_enter, mprotect_leave, mprotect_may_shut, mprotect_n_waits, mprotect_ready, mprotect_release,
    mprotect_shut,
)
from ksmcore._guard.userfaultfd cimport (
    userfaultfd_enter, userfaultfd_leave, userfaultfd_moves, userfaultfd_n_waits, userfaultfd_probe,
    userfaultfd_release, userfaultfd_shut, userfaultfd_tidy,
)
from ksmcore._guard.window cimport DONE, GUARD_MPROTECT, GUARD_UFFD, GUARD_UFFD_USER, WINDOW_BARRED, WINDOW_IN_CALL
from ksmcore._hooks.calls cimport calls_first, calls_let_in, calls_look, calls_shut
from ksmcore._kernel.forks cimport forks_lock, forks_unlock
from ksmcore._kernel.syscalls cimport (
    CALL_UFFD_PROTECT, CALL_UFFD_REGISTER, CALL_UFFD_REGISTER_THEN_FAIL, CALL_UFFD_UNREGISTER,
    CALL_UFFD_WAKE, CALL_USERFAULTFD, sys_error, sys_error_clear, sys_is_passing, sys_now_ns, sys_pause,
)

import os

# In the order of enum guard_kind.
_NAMES = ("mprotect", "userfaultfd-user", "userfaultfd")

cdef enum:
    PATIENCE_NS = 1_000_000_000    # for the end of calls in flight, when a window is due

# When a window was opened last though a call was in flight: the next ones, of the same stretch, do not wait anew.
# Under the fork lock.
cdef uint64_t _forced_ns = 0


cdef int guard_enter(guard_kind kind, sys_error* err) noexcept nogil:
    """The signal handler is there with every guard: it also rescues the scanner from pages that the
    program takes away while they are read."""
    if mprotect_enter(err) != 0:
        return -1
    if kind != GUARD_MPROTECT and userfaultfd_enter(kind, err) != 0:
        mprotect_leave()
        return -1
    calls_look()
    return 0


cdef int guard_enter_any(guard_kind* kind, sys_error* err) noexcept nogil:
    """Enter, and where the kernel does not allow this guard, by whatever errno, the strongest that it does allow. What
    there is only for the moment no descriptor or memory for is not given up."""
    while guard_enter(kind[0], err) != 0:
        if sys_is_passing(err.code) or not guard_weaker(kind, False, err):
            return -1
        sys_error_clear(err)
    return 0


cdef bint guard_weaker(guard_kind* kind, bint entered, const sys_error* err) noexcept nogil:
    """*kind becomes the next weaker guard, if this one is to blame for *err."""
    if kind[0] == GUARD_MPROTECT or entered and err.call not in (
        <int>CALL_USERFAULTFD, <int>CALL_UFFD_REGISTER, <int>CALL_UFFD_UNREGISTER, <int>CALL_UFFD_PROTECT,
        <int>CALL_UFFD_WAKE, <int>CALL_UFFD_REGISTER_THEN_FAIL,
    ):
        return False
    kind[0] = GUARD_UFFD_USER if kind[0] == GUARD_UFFD else GUARD_MPROTECT
    return True


cdef void guard_leave(guard_kind kind) noexcept nogil:
    if kind != GUARD_MPROTECT:
        userfaultfd_leave(kind)
    mprotect_leave()


cdef bint guard_is_barred(guard_kind kind) noexcept nogil:
    """Asked before work that windows are the end of. What it says may be over by then: guard_open asks again."""
    cdef bint may_shut
    if kind != GUARD_MPROTECT:
        return False
    forks_lock()
    may_shut = mprotect_may_shut(False)
    forks_unlock()
    return not may_shut


cdef bint _minds_calls(const window_t* w) noexcept nogil:
    """Pages that are moved away are safe from any call: it waits, and whoever has one pinned keeps it from being
    moved."""
    return not guard_takes_away(w)


cdef bint guard_calls(const window_t* w, uintptr_t* lo, uintptr_t* hi) noexcept nogil:
    """Asked before a window, so that it can be cut to leave calls in flight out. guard_open asks again."""
    return _minds_calls(w) and calls_first(lo, hi)


cdef bint _shut_calls(window_t* w) noexcept nogil:
    """Have calls that begin wait. False: one is in flight, and nothing happened. The caller holds the fork lock, which
    is given up meanwhile where the window is due."""
    global _forced_ns
    cdef uint64_t begun_ns = 0, now_ns
    while calls_shut(w.addr, w.n_pages * w.page_bytes):
        now_ns = sys_now_ns()
        if begun_ns == 0:
            begun_ns = now_ns
        if w.is_due and (now_ns - _forced_ns < <uint64_t>PATIENCE_NS or now_ns - begun_ns >= <uint64_t>PATIENCE_NS):
            _forced_ns = now_ns
            break
        calls_let_in()
        if not w.is_due:
            return False
        forks_unlock()
        sys_pause()
        forks_lock()
    return True


cdef int guard_open(window_t* w, sys_error* err) noexcept nogil:
    """0: shut, and the fork lock held. -1: nothing happened; *err tells why. WINDOW_BARRED, WINDOW_IN_CALL: nothing
    happened. WINDOW_STUCK: nor can what was shut be opened again; the caller must report that."""
    cdef int rc
    if w.guard == GUARD_MPROTECT and mprotect_ready(err) != 0:
        return -1
    forks_lock()
    if w.guard == GUARD_MPROTECT and not mprotect_may_shut(w.is_way_back):
        rc = WINDOW_BARRED
    elif _minds_calls(w) and not _shut_calls(w):
        rc = WINDOW_IN_CALL
    elif w.guard == GUARD_MPROTECT:
        memset(w.outcomes, DONE, w.n_pages)
        w.bytes = <const uint8_t*>w.addr
        rc = mprotect_shut(w.addr, w.n_pages * w.page_bytes, err)
    else:
        rc = userfaultfd_shut(w, err)
    if rc != 0:
        calls_let_in()
        forks_unlock()
    return rc


cdef bint guard_takes_away(const window_t* w) noexcept nogil:
    """Are the pages of this window moved away? Then one that is found to be zeros is simply not moved back.

    Elsewhere a new mapping has to replace it. Were it given up in place, the kernel would take it out of the page table
    first, and have the processors forget it a moment later: a thread that writes there in between would write to a new
    page, while others still read the old one."""
    return w.guard != GUARD_MPROTECT and userfaultfd_moves(w)


cdef int guard_close(window_t* w, bint all_remapped, sys_error* err) noexcept nogil:
    """Let everybody in again, wake who waits, release the fork lock.

    `all_remapped`: every page of the range got a new, writable mapping.
    WINDOW_STUCK when the kernel would not give something back; the caller must report that.
    """
    cdef int rc
    if w.guard == GUARD_MPROTECT:
        rc = mprotect_release(w.addr, w.n_pages * w.page_bytes, all_remapped, err)
    else:
        rc = userfaultfd_release(w, all_remapped, err)
    calls_let_in()
    forks_unlock()
    return rc


cdef void guard_tidy(guard_kind kind) noexcept nogil:
    """Give up the memory that windows have left behind. Outside of a window, entered."""
    if kind != GUARD_MPROTECT:
        userfaultfd_tidy(kind)


cdef guard_kind guard_by_name(str name) except *:
    if name not in _NAMES:
        raise ValueError(f"no guard {name!r}")
    return <guard_kind><int>_NAMES.index(name)


cdef str guard_name(guard_kind kind):
    return _NAMES[<int>kind]


cdef uint32_t guard_n_waits() noexcept nogil:
    return mprotect_n_waits() + userfaultfd_n_waits()


def probe(str name, bint now=True):
    """None when the guard of this name can be had here, else why not. With `now` False: whether it could be had but for
    want of descriptors or memory at the moment."""
    cdef guard_kind kind = guard_by_name(name)
    cdef sys_error err
    cdef bint moves = False
    cdef int rc = 0
    sys_error_clear(&err)
    if kind != GUARD_MPROTECT:
        rc = userfaultfd_probe(kind, &moves, &err)
    return None if rc == 0 or (not now and sys_is_passing(err.code)) else os.strerror(err.code)


def refuses_pinned(str name):
    """Whether the guard of this name, to be had here, leaves pages alone that are pinned for a device."""
    cdef guard_kind kind = guard_by_name(name)
    cdef sys_error err
    cdef bint moves = False
    sys_error_clear(&err)
    return kind == GUARD_UFFD and userfaultfd_probe(kind, &moves, &err) == 0 and bool(moves)
