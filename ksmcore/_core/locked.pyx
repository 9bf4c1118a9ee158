"""An engine's core behind its lock, in the process that it belongs to.

Every method of it and of its subclasses takes the lock for as long as it touches the core, and never holds it while
Python code could run, so a garbage collection cannot meet it from inside. The lock is taken without the GIL, since
a scanning thread holds it for a span at a time (some milliseconds at most).

A forked child inherits a copy of the core that belongs to its parent: the first call in the child
throws it away and begins anew, empty. What is given up on purpose: the child's share of the lock.
"""

from cpython.pythread cimport (
    PyThread_acquire_lock, PyThread_allocate_lock, PyThread_free_lock, PyThread_release_lock, WAIT_LOCK,
)
from libc.stdint cimport uint32_t, uintptr_t

from ksmcore._guard.guard cimport guard_by_name, guard_enter, guard_enter_any
from ksmcore._guard.window cimport GUARD_MPROTECT, GUARD_UFFD, guard_kind
from ksmcore._hooks.calls cimport calls_begin, calls_end, calls_missing
from ksmcore._kernel.forks cimport forks_generation
from ksmcore._kernel.syscalls cimport sys_error, sys_error_clear, sys_error_raise, sys_pause
from ksmcore._pages cimport checksum_by_name
from ksmcore._pass.state cimport state_destroy, state_init
from ksmcore._records.store cimport MAX_SHARERS

cdef extern from "<pthread.h>":
    uintptr_t pthread_self() nogil

cdef extern from *:
    int __ATOMIC_SEQ_CST
    uintptr_t get_owner "__atomic_load_n"(uintptr_t* owner, int order) nogil
    void put_owner "__atomic_store_n"(uintptr_t* owner, uintptr_t value, int order) nogil
    uint32_t __atomic_add_fetch(uint32_t* value, uint32_t n, int order) nogil
    uint32_t __atomic_sub_fetch(uint32_t* value, uint32_t n, int order) nogil
    uint32_t __atomic_load_n(uint32_t* value, int order) nogil
    uint32_t __atomic_exchange_n(uint32_t* value, uint32_t wanted, int order) nogil

cdef enum:
    MOST_PAUSES = 8            # of a millisecond, for others to get the lock between two spans


cdef class LockedCore:
    """The core, its lock, and the guard that its windows are opened with."""

    def __cinit__(
        self, *, str order, str checksum, str guard, bint any_guard, bint with_pagemap,
        bint with_tracker, uint32_t n_buckets, bint hold_calls, bint hold_always
    ):
        self.guard = guard_by_name(guard)
        self.any_guard = any_guard
        self.n_buckets = n_buckets
        self.hold_always = hold_always
        self.hold_calls = hold_calls and calls_missing() is None
        self.with_pagemap = with_pagemap
        self.with_tracker = with_tracker
        self.c.by_content = order == "content"
        self.c.checksum = checksum_by_name(checksum)
        self.c.use_zero_pages = True
        self.c.smart_scan = False
        self.c.max_shared_pages = -1
        self.c.max_page_sharing = MAX_SHARERS
        self._begin()
        self._hold_calls(self.guard)

    def __dealloc__(self):
        self.let_calls_go()
        if self.lock != NULL:
            state_destroy(&self.c, self.generation != forks_generation())
            PyThread_free_lock(self.lock)

    cdef int _begin(self) except -1:
        cdef sys_error err
        sys_error_clear(&err)
        if state_init(&self.c, self.guard, self.n_buckets, self.with_pagemap, self.with_tracker, &err) != 0:
            if err.code == 0:
                raise MemoryError("no memory for an engine")
            sys_error_raise(&err, "engine")
        self.lock = PyThread_allocate_lock()
        if self.lock == NULL:
            state_destroy(&self.c, False)
            raise MemoryError("no lock")
        self.n_waiting = 0
        put_owner(&self.owner, 0, __ATOMIC_SEQ_CST)
        self.generation = forks_generation()
        return 0

    cdef int _own(self) except -1:
        """In a forked child: leave the parent's state alone and begin empty.

        The lock is not freed: a thread that does not exist here may hold it.
        """
        if self.generation != forks_generation():
            if self.lock != NULL:
                state_destroy(&self.c, True)
                self.lock = NULL
            # When this fails, the next call tries again.
            self._begin()
        return 0

    cdef void _lock(self) noexcept nogil:
        __atomic_add_fetch(&self.n_waiting, 1, __ATOMIC_SEQ_CST)
        self._take_lock()
        __atomic_sub_fetch(&self.n_waiting, 1, __ATOMIC_SEQ_CST)

    cdef void _take_lock(self) noexcept nogil:
        """For a walk, which is not to count among those that it lets in between."""
        PyThread_acquire_lock(self.lock, WAIT_LOCK)
        put_owner(&self.owner, pthread_self(), __ATOMIC_SEQ_CST)

    cdef void _unlock(self) noexcept nogil:
        put_owner(&self.owner, 0, __ATOMIC_SEQ_CST)
        PyThread_release_lock(self.lock)

    cdef bint is_mine(self) noexcept nogil:
        """Has this thread the lock? (What other threads write there meanwhile is never the name of this one. But a
        new thread of a forked child may have the name of one of its parent's, which had the lock then.)"""
        return self.generation == forks_generation() and get_owner(&self.owner, __ATOMIC_SEQ_CST) == pthread_self()

    cdef void _let_others(self) noexcept nogil:
        """Between two spans: the lock knows no order, and a walk that took it again at once would
        mostly win. So it steps back, for some milliseconds at most, while somebody waits."""
        cdef int tries = 0
        while __atomic_load_n(&self.n_waiting, __ATOMIC_SEQ_CST) != 0 and tries < MOST_PAUSES:
            sys_pause()
            tries += 1

    cdef int _enter(self, guard_kind* entered, sys_error* err) noexcept nogil:
        """Get ready to open windows; leave what was *entered.

        A guard that could be had once may be gone (a program that gives up its privileges): where any
        guard would do, a weaker one then takes its place for good.
        """
        entered[0] = self.c.guard
        if not self.any_guard:
            return guard_enter(entered[0], err)
        if guard_enter_any(entered, err) != 0:
            return -1
        self._hold_calls(entered[0])
        # Nobody else is inside with the former one, or it could still be had. So no window is open with it.
        self.c.guard = entered[0]
        return 0

    cdef void _hold_calls(self, guard_kind guard) noexcept nogil:
        """Calls in flight must not meet the windows of this guard, where it is one that cannot make them wait."""
        if not self.hold_calls or (guard == GUARD_UFFD and not self.hold_always):
            return
        if __atomic_exchange_n(&self.is_holding, 1, __ATOMIC_SEQ_CST) == 0:
            calls_begin(False)
        if guard == GUARD_MPROTECT and __atomic_exchange_n(&self.is_keeping, 1, __ATOMIC_SEQ_CST) == 0:
            calls_begin(True)

    cpdef void let_calls_go(self) noexcept:
        """No window is opened for this engine any more."""
        self.hold_calls = False
        if __atomic_exchange_n(&self.is_holding, 0, __ATOMIC_SEQ_CST) != 0:
            calls_end(False)
        if __atomic_exchange_n(&self.is_keeping, 0, __ATOMIC_SEQ_CST) != 0:
            calls_end(True)
