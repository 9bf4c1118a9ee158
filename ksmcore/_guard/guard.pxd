"""Keeping writers out of pages while they are compared and remapped; see guard.pyx.

    window_t w                  its first fields filled in
    guard_open(&w, &err)        from here on, of each page with outcome DONE: no write gets in, none is lost
      ... read at w.bytes, set the outcome of pages that are not to be remapped to something else, remap
      the others, or leave them away (guard_takes_away) ...
    guard_close(&w, ...)        the others are as they were before, and whoever waits goes on

Between open and close the caller must not need the GIL, must not allocate and must not take a lock: the
fork lock is held, and a thread that waits may hold anything. No signal handler runs on the caller's thread
meanwhile (see forks.pxd): it would wait for ever, if it wrote into the window.
"""

from libc.stdint cimport uint32_t, uintptr_t

from ksmcore._guard.window cimport guard_kind, window_t
from ksmcore._kernel.syscalls cimport sys_error


# A guard must be entered before a window is opened and left afterwards; entering is counted. It costs
# tens of microseconds, so it is done once for a batch of windows.
cdef int guard_enter(guard_kind kind, sys_error* err) noexcept nogil
cdef int guard_enter_any(guard_kind* kind, sys_error* err) noexcept nogil      # or the next weaker one
# For the way back, which must not depend on one guard: when it could not be entered, or a window failed that it had
# been entered for, is it to blame, and is there a weaker one to try?
cdef bint guard_weaker(guard_kind* kind, bint entered, const sys_error* err) noexcept nogil
cdef void guard_leave(guard_kind kind) noexcept nogil

cdef bint guard_is_barred(guard_kind kind) noexcept nogil    # would windows be barred, see WINDOW_BARRED?
# Is a call in flight that this window must not meet? If so, the lowest part of *lo to *hi that one may
# write into.
cdef bint guard_calls(const window_t* w, uintptr_t* lo, uintptr_t* hi) noexcept nogil
cdef int guard_open(window_t* w, sys_error* err) noexcept nogil
cdef bint guard_takes_away(const window_t* w) noexcept nogil
cdef int guard_close(window_t* w, bint all_remapped, sys_error* err) noexcept nogil

# What was moved away and is not needed any more is given up a lot at once, and the rest before leaving.
cdef void guard_tidy(guard_kind kind) noexcept nogil

cdef guard_kind guard_by_name(str name) except *
cdef str guard_name(guard_kind kind)
cdef uint32_t guard_n_waits() noexcept nogil     # accesses that had to wait for a window, ever
