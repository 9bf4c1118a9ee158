"""Scopes: what a `with` block takes and gives back.

Written in C because a signal handler of Python's, Ctrl-C among them, may raise between any two calls of Python
code: a lock that Python code had just taken would stay taken for as long as somebody keeps the traceback. Python
enters and leaves these without a look at signals between the taking and the block, or between the block and the
giving back; but for Python 3.14 (seen with 3.14.10), which looks before the block. Then nobody has the scope any more,
and it gives back what it has taken as it goes: when the last reference goes, and not when the collector finds it in a
cycle, where a generator may still be in its block. They belong to one process: a forked child makes others.
"""

cimport cython

from cpython.pythread cimport PyThread_get_thread_ident

import threading


@cython.no_gc_clear
cdef class LockScope:
    """A lock that is held within the block. For one `with` block."""

    cdef object lock
    cdef bint is_taken

    def __cinit__(self, lock):
        self.lock = lock

    def __enter__(self):
        # A handler that raises while this waits leaves the lock to others.
        self.lock.acquire()
        self.is_taken = True
        return self

    def __exit__(self, *error):
        if self.is_taken:
            self.is_taken = False
            self.lock.release()

    def __dealloc__(self):
        self.__exit__()


cdef class PassLock:
    """One walk at a time in an engine: a whole `scan` or `dedup`, or one batch of the scanner."""

    cdef object lock
    cdef unsigned long owner     # thread that holds it, 0: none. Another thread sees its own number never.

    def __cinit__(self):
        self.lock = threading.Lock()

    def is_mine(self):
        """Does this thread hold it?"""
        return self.owner == <unsigned long>PyThread_get_thread_ident()

    def check_outside(self):
        """RuntimeError where waiting for it would be waiting for oneself."""
        if self.is_mine():
            raise RuntimeError(
                "this thread is in the middle of a pass of this engine (in a progress callback, or a signal "
                "handler): let it end first"
            )

    def acquire(self):
        self.check_outside()
        self.lock.acquire()
        self.owner = <unsigned long>PyThread_get_thread_ident()

    def release(self):
        self.owner = 0
        self.lock.release()


@cython.no_gc_clear
cdef class GuardScope:
    """The guard of a core, ready for windows within the block."""

    cdef object core
    cdef object entered

    def __cinit__(self, core):
        self.core = core

    def __enter__(self):
        self.entered = self.core.enter_guard()
        return self

    def __exit__(self, *error):
        entered, self.entered = self.entered, None
        if entered is not None:
            self.core.leave_guard(entered)

    def __dealloc__(self):
        self.__exit__()


@cython.no_gc_clear
cdef class HoldScope:
    """Memory that is held within the block: nothing in it is merged. For one `with` block.

    `take` gives the hold on the memory itself, with `ranges` of (address, length), which `release`
    ends.
    """

    cdef object core
    cdef object take
    cdef object export
    cdef object held             # (region id, address) of what was held

    def __cinit__(self, core, take):
        self.core = core
        self.take = take

    def __enter__(self):
        if self.held is not None:
            raise RuntimeError("this hold was entered before: ask for another")
        # Python code: an exception leaves nothing but the buffer's export in its frames.
        export = self.take()
        held = []
        try:
            for addr, n_bytes in export.ranges:
                held += self.core.hold(addr, n_bytes)
        except BaseException:
            for region_id, addr in held:
                self.core.let_go(region_id, addr)
            export.release()
            raise
        if not held:
            export.release()
            raise ValueError("nothing of this buffer is registered with this engine")
        self.held = held
        self.export = export

    def __exit__(self, *error):
        held, self.held = self.held, ()
        if not held:
            return
        try:
            for region_id, addr in held:
                self.core.let_go(region_id, addr)
        finally:
            self.export.release()

    def __dealloc__(self):
        self.__exit__()
