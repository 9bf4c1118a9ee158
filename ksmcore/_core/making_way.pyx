"""Threads of ours make way for forks: they end before one, and are there again after it.

Python (3.12 and newer) warns when a process of several threads forks, and it counts those that the kernel has. So
before a fork of Python's (`os.fork`, and all that calls it) each thread of ours is asked to make way, and the fork
waits until the kernel has it no more; afterwards it is started again, in the parent. A fork of plain C code is not
waited for.

The hooks of Python's are C here, and take no lock: no handler of a signal runs in them, so none cuts them off. Nor does
one that comes meanwhile cut off the hooks of others, which run after ours and may be Python code: the thread that forks
gets signals again when all is over. What forks in the midst of them (a finaliser, a hook of another's, another thread)
finds nothing taken. Whether a thread has gone is one state, changed by whoever finds it as expected:

    HERE -> ASKED    before a fork
    ASKED -> AWAY    the thread, as the last that it does; it holds nothing any more
    ASKED -> HERE    after the fork: the thread had not noticed, or is about to, and then goes on
    AWAY -> HERE     after the fork: it is started anew
    AWAY -> ENDED    whoever waits for its end: it is not started any more

A fork waits for a time only: a thread may be in a callback that waits for whoever forks. Then it stays, as any other
thread does. Which of ours forks itself stays too.
"""

from libc.stdint cimport uint64_t

from ksmcore._kernel.forks cimport forks_announce, forks_generation, forks_is_coming, forks_over
from ksmcore._kernel.syscalls cimport sys_has_thread, sys_now_ns, sys_own_thread, sys_sleep_ns

import _thread
import os
import threading

cdef extern from "_kernel/signals.h" nogil:
    ctypedef struct sigset_t:
        pass
    void ksm_block_signals(sigset_t* before)
    void ksm_restore_signals(const sigset_t* before)

cdef extern from * nogil:
    """
    /* Of each thread: forks that it is in the midst of, and what it blocked before the first. */
    static __thread int forks_depth;
    static __thread sigset_t forks_mask;

    static void keep_signals_away(void) { if (forks_depth++ == 0) ksm_block_signals(&forks_mask); }
    /* One that began before this was imported has kept none away. */
    static void let_signals_come(void) { if (forks_depth > 0 && --forks_depth == 0) ksm_restore_signals(&forks_mask); }
    """
    void keep_signals_away()
    void let_signals_come()
    int __ATOMIC_SEQ_CST
    bint __atomic_compare_exchange_n(int* value, int* expected, int wanted, bint weak, int good, int bad)
    int __atomic_load_n(int* value, int order)
    void __atomic_store_n(int* value, int n, int order)

cdef enum:
    HERE = 0
    ASKED
    AWAY
    ENDED

# A census of tens of thousands of mappings takes a tenth of a second, and on a busy machine several times that.
cdef uint64_t MOST_WAIT_NS = 1000000000
cdef uint64_t LEAST_SLEEP_NS = 20000
cdef uint64_t MOST_SLEEP_NS = 1000000

# Of the process of this generation: threads that there are or that are away, and the numbers of those that have ended
# and may still be the kernel's.
cdef set _threads = set()
cdef set _ending = set()
cdef unsigned long _generation = 0


cdef _renew():
    """In a forked child there is none of them."""
    global _threads, _ending, _generation
    if _generation != forks_generation():
        _generation = forks_generation()
        _threads = set()
        _ending = set()


cdef class Bell:
    """Wakes one thread that waits for it. Whatever is raised by a signal handler in the midst of `ring` or `wait`, it
    has been rung or it has not, or was heard."""

    cdef object silent           # a lock, taken while it is not rung

    def __cinit__(self):
        self.silent = threading.Lock()
        self.silent.acquire()

    def ring(self):
        try:
            self.silent.release()
        except RuntimeError:
            pass                 # it rings already

    def wait(self, double seconds):
        """Until it rings, or so long; then it is silent again."""
        return self.silent.acquire(True, max(seconds, 0.0))


cdef class MakesWay:
    """What a thread of ours is to forks. Its `run` is to return True as soon as `is_asked`, and False when it has
    ended; it is called again then, on this thread or on another. `ring` wakes it where it waits.

    `lock` is what it may wait for, with `is_mine()`: a fork by who holds that does not wait long.
    """

    cdef object run
    cdef object ring
    cdef object lock
    cdef object alive            # a lock, taken while there is a thread
    cdef int state
    cdef int number              # the kernel's, 0: it has not begun
    cdef unsigned long generation

    def __cinit__(self, run, ring, lock=None):
        self.run = run
        self.ring = ring
        self.lock = lock
        self.alive = threading.Lock()
        self.state = ENDED

    cdef bint _becomes(self, int expected, int wanted) noexcept:
        return __atomic_compare_exchange_n(
            &self.state, &expected, wanted, False, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST
        )

    cdef int _now(self) noexcept:
        return __atomic_load_n(&self.state, __ATOMIC_SEQ_CST)

    def start(self):
        """Start the thread, which gets no signals but for faults of its own. RuntimeError where the system has no
        further one; then there is none."""
        try:
            self._begin()
        except BaseException:
            self._end()
            raise

    cdef _begin(self):
        cdef sigset_t before
        # No handler of Python's may raise in the midst of it: whoever waited for the end of a thread that never began
        # would wait for ever.
        ksm_block_signals(&before)
        try:
            self.alive.acquire()      # free, or about to be: a thread that makes way may be in its last step
            try:
                _renew()
                for number in tuple(_ending):
                    if not sys_has_thread(number):
                        _ending.discard(number)
                self.generation = _generation
                self.number = 0
                __atomic_store_n(&self.state, HERE, __ATOMIC_SEQ_CST)
                _threads.add(self)
                _thread.start_new_thread(self._main, ())
            except BaseException:
                self.alive.release()
                raise
        finally:
            ksm_restore_signals(&before)

    cdef _end(self):
        __atomic_store_n(&self.state, ENDED, __ATOMIC_SEQ_CST)
        _threads.discard(self)

    def _main(self):
        cdef bint makes_way = False
        self.number = sys_own_thread()
        try:
            while not makes_way and self.run():
                makes_way = self._becomes(ASKED, AWAY)
        finally:
            _renew()                  # a finaliser may have forked here, and this be the child
            _ending.add(self.number)
            if not makes_way:
                self._end()
            self.alive.release()

    def is_asked(self):
        """Should it return now?"""
        return self._now() == ASKED

    def is_alive(self):
        """Also while it makes way."""
        return self.generation == forks_generation() and self._now() != ENDED

    def come_back(self):
        """Where it could not be started again after a fork: once more."""
        if self.generation == forks_generation() and not forks_is_coming() and self._becomes(AWAY, HERE):
            self._return()

    cdef _return(self):
        try:
            self._begin()
        except (RuntimeError, MemoryError):
            # There is no further thread at the moment: the next fork tries again, and `come_back`.
            self._becomes(HERE, AWAY)

    def join(self, double timeout=-1.0):
        """Wait for its end, so many seconds at most; False where it has not come. One that is away has ended."""
        while self.is_alive():
            if self._becomes(AWAY, ENDED):
                _threads.discard(self)
            elif self.alive.acquire(True, timeout):
                self.alive.release()  # and it may have made way
            else:
                return False
        return True

    cdef _wait_for_number(self, uint64_t end):
        cdef uint64_t sleep_ns = LEAST_SLEEP_NS
        with nogil:
            while self.number == 0 and sys_now_ns() < end:
                sys_sleep_ns(sleep_ns)
                sleep_ns = min(2 * sleep_ns, MOST_SLEEP_NS)


cdef _wait_until_gone(int number, uint64_t end):
    cdef uint64_t sleep_ns = LEAST_SLEEP_NS
    with nogil:
        while sys_has_thread(number) and sys_now_ns() < end:
            sys_sleep_ns(sleep_ns)
            sleep_ns = min(2 * sleep_ns, MOST_SLEEP_NS)


cdef bint _is_held(MakesWay thread):
    try:
        return thread.lock is not None and thread.lock.is_mine()
    except Exception:
        return False


def _before():
    cdef MakesWay thread
    cdef uint64_t end
    cdef int own = sys_own_thread()
    cdef bint waits = True
    cdef list asked = []
    keep_signals_away()
    _renew()
    forks_announce()
    for thread in tuple(_threads):
        if thread.number == own:
            continue
        waits = waits and not _is_held(thread)
        if thread._becomes(HERE, ASKED) or thread._now() == ASKED:
            asked.append(thread)
            try:
                thread.ring()
            except Exception:
                pass             # it rings already, or its descriptors were closed
    end = sys_now_ns() + (MOST_WAIT_NS if waits else MOST_WAIT_NS // 50)
    for thread in asked:
        thread._wait_for_number(end)
        _wait_until_gone(thread.number, end)
    for number in tuple(_ending):
        if number != own:
            _wait_until_gone(number, end)
            _ending.discard(number)


def _after_in_parent():
    cdef MakesWay thread
    _renew()
    if forks_over():
        for thread in tuple(_threads):
            if not thread._becomes(ASKED, HERE) and thread._becomes(AWAY, HERE):
                thread._return()
    let_signals_come()


def _after_in_child():
    let_signals_come()


os.register_at_fork(before=_before, after_in_parent=_after_in_parent, after_in_child=_after_in_child)
