"""What the C library's calls are told, and tell, for tests."""

from libc.stdint cimport uint32_t, uintptr_t

from ksmcore._hooks.calls cimport calls_begin, calls_end, calls_first, calls_let_in, calls_look, calls_probe, calls_shut
from ksmcore._kernel.forks cimport forks_lock, forks_unlock


def begin(bint keep_segv=False):
    with nogil:
        calls_begin(keep_segv)


def end(bint keep_segv=False):
    with nogil:
        calls_end(keep_segv)


def look():
    with nogil:
        calls_look()


def shut(uintptr_t addr, size_t len_bytes):
    """Have calls that may write there wait until let_in; False, and nothing, where one is in flight. Between the two
    nobody forks, and this thread gets no signals."""
    cdef bint met
    with nogil:
        forks_lock()
        met = calls_shut(addr, len_bytes)
        if met:
            calls_let_in()
            forks_unlock()
    return not met


def let_in():
    with nogil:
        calls_let_in()
        forks_unlock()


def first(uintptr_t addr, size_t len_bytes):
    """The lowest part of that range that a call in flight may write into, as (address, bytes); None."""
    cdef uintptr_t lo = addr, hi = addr + len_bytes
    return (lo, hi - lo) if calls_first(&lo, &hi) else None


def probe(uint32_t n_places):
    """Have threads look for a place for their records so often; returns what it was."""
    return calls_probe(n_places)
