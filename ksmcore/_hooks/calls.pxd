"""Which memory the C library's functions are writing into at the moment; see calls.pyx."""

from libc.stdint cimport uint32_t, uintptr_t

# None: calls can be told of here; else why not.
cdef object calls_missing()
# Counted: have calls of all loaded objects told of from here on. keep_segv: and SIGSEGV kept out of masks of signals.
cdef void calls_begin(bint keep_segv) noexcept nogil
cdef void calls_end(bint keep_segv) noexcept nogil
# Objects that were loaded since are looked at. No lock is held.
cdef void calls_look() noexcept nogil

# sigaction(), by which programs change what SIGSEGV and SIGBUS do while calls are redirected, and whether a handler of
# ours is over theirs at the moment. Called on any thread.
ctypedef int (*calls_action)(int sig, const void* wanted, void* was) noexcept nogil
ctypedef int (*calls_asked)(int sig) noexcept nogil
cdef void calls_route_actions(calls_action route, calls_asked is_over) noexcept nogil

# All of these under the fork lock, but for calls_first, whose answer may be over at once.
# From here until calls_let_in a call that begins, and may write into that memory, waits. Is one in flight already?
cdef bint calls_shut(uintptr_t addr, size_t len_bytes) noexcept nogil
cdef void calls_let_in() noexcept nogil
# The lowest part of the range from *lo to *hi that a call in flight may write into, if there is one.
cdef bint calls_first(uintptr_t* lo, uintptr_t* hi) noexcept nogil

# Have threads look for a place for their records so often; returns what it was. For tests.
cdef uint32_t calls_probe(uint32_t n_places) noexcept nogil
