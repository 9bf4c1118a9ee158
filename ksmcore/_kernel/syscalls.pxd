"""System calls; see syscalls.pyx."""

from libc.stdint cimport uint32_t, uint64_t, uintptr_t
from posix.types cimport off_t


cdef enum sys_call:
    CALL_NONE
    CALL_MMAP
    CALL_MUNMAP
    CALL_MREMAP
    CALL_MPROTECT
    CALL_MADVISE
    CALL_MINCORE
    CALL_MEMFD_CREATE
    CALL_FTRUNCATE
    CALL_FALLOCATE
    CALL_PWRITE
    CALL_PREAD
    CALL_OPEN
    CALL_SIGACTION
    CALL_SEAL
    CALL_USERFAULTFD
    CALL_UFFD_REGISTER
    CALL_UFFD_UNREGISTER
    CALL_UFFD_PROTECT
    CALL_UFFD_MOVE
    CALL_UFFD_COPY
    CALL_UFFD_WAKE
    CALL_PAGEMAP_SCAN
    CALL_TRACKER
    CALL_SIGNAL_MASKS              # of the threads: not one call, and what they are may forbid others
    CALL_UFFD_REGISTER_THEN_FAIL   # for tests only: done, and reported as failed
    CALL_UFFD_MOVE_THEN_FAIL
    N_CALLS


# What a failed call leaves behind. The first failure stays until the owner clears it.
ctypedef struct sys_error:
    int code               # errno, 0 when nothing failed
    int call               # enum sys_call
    uintptr_t addr         # first byte of the range concerned, 0 when there is none
    size_t len_bytes       # length of that range


# A descriptor that is kept, and the file that it stood for when it was opened. A program may close all
# descriptors, ours included, and get their numbers for files of its own: so it is asked before each use.
ctypedef struct sys_file:
    int fd                 # -1: none
    uint64_t dev
    uint64_t ino


cdef enum advice:
    ADVISE_DONTNEED
    ADVISE_DONTFORK
    ADVISE_DONTDUMP
    ADVISE_HUGEPAGE
    ADVISE_NOHUGEPAGE
    ADVISE_SEQUENTIAL
    ADVISE_RANDOM
    ADVISE_MERGEABLE
    ADVISE_POPULATE_WRITE
    ADVISE_COLD


# Every function returns 0 (or the value asked for) on success and -1 (or NULL) on failure, with *err filled.
cdef void* sys_map_anon(size_t len_bytes, sys_error* err) noexcept nogil
cdef void* sys_map_anon_aligned(size_t len_bytes, size_t align_bytes, sys_error* err) noexcept nogil
cdef int sys_map_anon_at(uintptr_t addr, size_t len_bytes, sys_error* err) noexcept nogil
cdef int sys_map_store_at(
    uintptr_t addr, size_t len_bytes, int fd, off_t offset, sys_error* err
) noexcept nogil
cdef void* sys_map_view(size_t len_bytes, int fd, off_t offset, sys_error* err) noexcept nogil
cdef void* sys_map_lease(size_t len_bytes, int fd, sys_error* err) noexcept nogil
cdef int sys_unmap(uintptr_t addr, size_t len_bytes, sys_error* err) noexcept nogil
cdef void* sys_grow(void* array, size_t old_bytes, size_t new_bytes, sys_error* err) noexcept nogil
cdef int sys_move(uintptr_t source, uintptr_t target, size_t len_bytes, sys_error* err) noexcept nogil
cdef int sys_protect(uintptr_t addr, size_t len_bytes, bint writable, sys_error* err) noexcept nogil
cdef int sys_advise(uintptr_t addr, size_t len_bytes, advice what, sys_error* err) noexcept nogil
cdef int sys_mincore(
    uintptr_t addr, size_t len_bytes, unsigned char* resident, sys_error* err
) noexcept nogil
cdef int sys_memfd(const char* name, sys_error* err) noexcept nogil
cdef int sys_truncate(int fd, off_t len_bytes, sys_error* err) noexcept nogil
cdef int sys_write_at(int fd, const void* source, size_t len_bytes, off_t offset, sys_error* err) noexcept nogil
cdef int sys_read_at(int fd, void* target, size_t len_bytes, off_t offset, sys_error* err) noexcept nogil
cdef int sys_punch(int fd, off_t offset, size_t len_bytes, sys_error* err) noexcept nogil
cdef int sys_seal(int fd, sys_error* err) noexcept nogil       # against writing; EBUSY while mapped for that
cdef int sys_open_read(const char* path, sys_error* err) noexcept nogil
cdef void sys_read_text(const char* path, char* text, size_t n_bytes) noexcept nogil
cdef void sys_close(int fd) noexcept nogil                        # if it still is what was opened
# The list of all that is open. Its lock is held around whatever opens a descriptor, and around a fork.
cdef void sys_list_lock() noexcept nogil
cdef void sys_list_unlock() noexcept nogil
cdef void sys_opening() noexcept nogil           # locks, for what is to be opened
cdef int sys_opened(int fd) noexcept nogil       # enters what was just opened, and unlocks: its number, or -1 and errno
cdef int sys_entered(int fd) noexcept nogil      # the same, and it keeps its number whatever that is
cdef void sys_close_in_child() noexcept nogil    # all of it; and makes the lock anew
cdef void sys_keep(sys_file* file, int fd) noexcept nogil         # remember what an open descriptor is
cdef bint sys_is_kept(const sys_file* file) noexcept nogil        # is it still that?
cdef void sys_drop(sys_file* file) noexcept nogil                 # close it if so
cdef void sys_device(const sys_file* file, uint64_t* dev_major, uint64_t* dev_minor) noexcept nogil
cdef size_t sys_page_bytes() noexcept nogil
cdef uint64_t sys_now_ns() noexcept nogil            # monotonic
cdef uint64_t sys_spent_ns() noexcept nogil
cdef void sys_pause() noexcept nogil                 # sleep one millisecond
cdef void sys_sleep_ns(uint64_t ns) noexcept nogil    # or until a signal comes
cdef int sys_own_thread() noexcept nogil             # the kernel's number of this thread
cdef bint sys_has_thread(int number) noexcept nogil  # has this process a thread of that number, dying ones included?
cdef bint sys_is_mapped(uintptr_t addr, size_t len_bytes) noexcept nogil
cdef bint sys_locks_future() noexcept nogil          # is all new memory locked?
cdef size_t sys_file_limit() noexcept nogil          # the largest that a file may become (RLIMIT_FSIZE)

# Failures that a test orders: after[c] calls of c succeed, then count[c] of them fail with errno code[c].
ctypedef struct sys_orders:
    bint armed
    int after[<int>N_CALLS]
    int count[<int>N_CALLS]
    int code[<int>N_CALLS]

cdef sys_orders sys_ordered


# For the modules that have further system calls (uffd, pagemap, maps, tracker): -1 and *err filled when the call
# failed, with errno as it stands; -1 and *err filled when a test ordered it to fail.
cdef int sys_check(bint failed, sys_call call, uintptr_t addr, size_t len_bytes, sys_error* err) noexcept nogil
cdef int sys_injected(sys_call call, uintptr_t addr, size_t len_bytes, sys_error* err) noexcept nogil

cdef void sys_error_clear(sys_error* err) noexcept nogil
cdef bint sys_is_passing(int code) noexcept nogil     # an errno of a moment: no descriptor, no memory
cdef object sys_error_raise(sys_error* err, str what)
