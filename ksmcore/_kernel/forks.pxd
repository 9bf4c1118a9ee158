"""Forks: the lock that keeps them out, and whether the children still live; see forks.pyx."""

from libc.stdint cimport uint32_t


# The fork lock: held by whoever must not be interrupted by a fork of this process (an open guard
# window, a change of the store). fork() itself waits for it. No signal handler runs on the thread that holds it, but
# for faults of its own. Of other locks only that of the list of descriptors is taken inside it.
cdef void forks_lock() noexcept nogil
cdef void forks_unlock() noexcept nogil
cdef uint32_t forks_count() noexcept nogil           # forks of this process so far; stable while the lock is held
cdef uint32_t forks_generation() noexcept nogil      # grows by one in every forked child

# Python announces its forks before it begins with them; who may take long then cuts it short.
cdef void forks_announce() noexcept nogil
cdef bint forks_over() noexcept nogil
cdef bint forks_is_coming() noexcept nogil

# Whether children live is only found out while somebody watches: each store does, while it has a file.
cdef void forks_watch(int delta) noexcept nogil
# The caller holds the fork lock.
cdef void forks_look() noexcept nogil                # find out which children are gone
cdef bint forks_living(uint32_t after, uint32_t last) noexcept nogil
