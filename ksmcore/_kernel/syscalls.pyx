"""Every system call of the core, each return value checked and errno kept at once.

A failing call fills a `sys_error` that its caller owns, so that the reason survives until the GIL is
held again and an OSError can be raised from it. Tests can make any call fail (see sys_orders).

Every descriptor that ksmcore opens stands in one list, from its first moment to its last: a forked child closes all
of them before anything else (kept.h). Those of Python code too, see `open_read` and `keep`.
"""

import os

from libc.errno cimport EAGAIN, EINTR, EIO, EMFILE, ENFILE, ENOMEM, errno
from libc.stdint cimport uint32_t, uint64_t, uintptr_t
from libc.string cimport memset
from posix.time cimport CLOCK_MONOTONIC, CLOCK_THREAD_CPUTIME_ID, clock_gettime, timespec
from posix.types cimport off_t

cdef extern from "_kernel/kept.h" nogil:
    void kept_lock()
    void kept_opening()
    void kept_unlock()
    int kept_opened(int fd)
    int kept_entered(int fd)
    void kept_close(int fd)
    void kept_child()
    void ksm_identify(int fd, uint64_t* dev, uint64_t* ino)

cdef extern from "_kernel/syscalls.h":
    int ksm_memfd(const char* name) nogil
    int ksm_truncate(int fd, off_t length) nogil
    ssize_t ksm_write_at(int fd, const void* buf, size_t count, off_t offset) nogil
    void* ksm_map_view(size_t len, int fd, off_t offset) nogil
    bint ksm_locks_future(size_t page_bytes) nogil
    size_t ksm_file_limit() nogil
    void* ksm_map(void* addr, size_t len, int prot, int flags, int fd, off_t offset) nogil
    void* ksm_grow(void* old, size_t old_len, size_t new_len) nogil
    int ksm_move(void* source, void* target, size_t len) nogil
    void ksm_sleep_ns(uint64_t ns) nogil
    int ksm_own_thread() nogil
    bint ksm_has_thread(int number) nogil
    int F_ADD_SEALS, F_SEAL_WRITE
    unsigned int major(uint64_t dev) nogil
    unsigned int minor(uint64_t dev) nogil

cdef extern from "<sys/mman.h>" nogil:
    int PROT_READ, PROT_WRITE
    int MAP_PRIVATE, MAP_SHARED, MAP_ANONYMOUS, MAP_FIXED
    int MADV_DONTNEED, MADV_DONTFORK, MADV_DONTDUMP, MADV_HUGEPAGE, MADV_NOHUGEPAGE
    int MADV_SEQUENTIAL, MADV_RANDOM, MADV_MERGEABLE
    int MADV_POPULATE_WRITE, MADV_COLD
    int munmap(void* addr, size_t len)
    int mprotect(void* addr, size_t len, int prot)
    int madvise(void* addr, size_t len, int advice)
    int mincore(void* addr, size_t len, unsigned char* vec)

cdef extern from "<fcntl.h>" nogil:
    int O_RDONLY, O_CLOEXEC
    int FALLOC_FL_PUNCH_HOLE, FALLOC_FL_KEEP_SIZE
    int open(const char* path, int flags, ...)
    int fcntl(int fd, int cmd, ...)
    int fallocate(int fd, int mode, off_t offset, off_t len)

cdef extern from "<unistd.h>" nogil:
    int _SC_PAGESIZE
    long sysconf(int name)
    ssize_t pread(int fd, void* buf, size_t count, off_t offset)


# In the order of enum sys_call.
CALL_NAMES = (
    "none", "mmap", "munmap", "mremap", "mprotect", "madvise", "mincore", "memfd_create",
    "ftruncate", "fallocate", "pwrite", "pread", "open", "sigaction", "seal", "userfaultfd",
    "uffd_register", "uffd_unregister", "uffd_protect", "uffd_move", "uffd_copy", "uffd_wake",
    "pagemap_scan", "tracker", "signal_masks",
    "uffd_register_then_fail", "uffd_move_then_fail",
)


cdef sys_orders sys_ordered


# ---- errors ---------------------------------------------------------------------------------

cdef int _fail(sys_error* err, sys_call call, int code, uintptr_t addr, size_t len_bytes) noexcept nogil:
    """Keep the first failure; always -1, so that callers can return it."""
    if err.code == 0:
        err.code = code
        err.call = <int>call
        err.addr = addr
        err.len_bytes = len_bytes
    return -1


cdef int sys_check(bint failed, sys_call call, uintptr_t addr, size_t len_bytes, sys_error* err) noexcept nogil:
    if not failed:
        return 0
    return _fail(err, call, errno, addr, len_bytes)


cdef int sys_injected(sys_call call, uintptr_t addr, size_t len_bytes, sys_error* err) noexcept nogil:
    if not sys_ordered.armed or sys_ordered.count[<int>call] == 0:
        return 0
    if sys_ordered.after[<int>call] > 0:
        sys_ordered.after[<int>call] -= 1
        return 0
    sys_ordered.count[<int>call] -= 1
    return _fail(err, call, sys_ordered.code[<int>call], addr, len_bytes)


cdef void sys_error_clear(sys_error* err) noexcept nogil:
    err.code = err.call = 0
    err.addr = err.len_bytes = 0


cdef bint sys_is_passing(int code) noexcept nogil:
    return code in (EMFILE, ENFILE, ENOMEM, EAGAIN, EINTR)


cdef object sys_error_raise(sys_error* err, str what):
    """Raise the OSError (MemoryError for ENOMEM) that `err` describes; needs the GIL."""
    cdef str call = CALL_NAMES[err.call]
    cdef str where = ""
    if err.len_bytes:
        where = f" of {err.len_bytes} bytes at {err.addr:#x}" if err.addr else f" of {err.len_bytes} bytes"
    if err.call == CALL_SIGNAL_MASKS:
        raise RuntimeError(
            f"{what}: a thread of this process blocks SIGSEGV, and would end it if it wrote there meanwhile; unblock "
            "that signal, or use another guard than 'mprotect' (memory is as it was, all bytes are right)"
        )
    message = f"{what}: {call}{where} failed: {os.strerror(err.code)}"
    if err.code == ENOMEM:
        raise MemoryError(
            f"[Errno {err.code}] {message} (out of memory, or of mappings: see vm.max_map_count)"
        )
    raise OSError(err.code, message)


# ---- memory ---------------------------------------------------------------------------------

cdef size_t sys_page_bytes() noexcept nogil:
    return <size_t>sysconf(_SC_PAGESIZE)


cdef uint64_t sys_now_ns() noexcept nogil:
    """A monotonic clock; no system call where the kernel shows the time to programs."""
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <uint64_t>now.tv_sec * 1000000000 + <uint64_t>now.tv_nsec


cdef uint64_t sys_spent_ns() noexcept nogil:
    """Processor time of this thread."""
    cdef timespec now
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now)
    return <uint64_t>now.tv_sec * 1000000000 + <uint64_t>now.tv_nsec


cdef void sys_pause() noexcept nogil:
    ksm_sleep_ns(1_000_000)


cdef void sys_sleep_ns(uint64_t ns) noexcept nogil:
    ksm_sleep_ns(ns)


cdef int sys_own_thread() noexcept nogil:
    return ksm_own_thread()


cdef bint sys_has_thread(int number) noexcept nogil:
    return number > 0 and ksm_has_thread(number)


cdef bint sys_is_mapped(uintptr_t addr, size_t len_bytes) noexcept nogil:
    """False when a page of the range has no mapping at all."""
    cdef unsigned char resident[1024]
    cdef size_t most = sizeof(resident) * sys_page_bytes(), n
    while len_bytes > 0:
        n = min(len_bytes, most)
        if mincore(<void*>addr, n, resident) != 0 and errno == ENOMEM:
            return False
        addr += n
        len_bytes -= n
    return True


cdef size_t sys_file_limit() noexcept nogil:
    return ksm_file_limit()


cdef bint sys_locks_future() noexcept nogil:
    return ksm_locks_future(sys_page_bytes())


cdef void* _map(
    uintptr_t addr, size_t len_bytes, int prot, int flags, int fd, off_t offset, sys_error* err
) noexcept nogil:
    cdef void* p
    if sys_injected(CALL_MMAP, addr, len_bytes, err):
        return NULL
    p = ksm_map(<void*>addr, len_bytes, prot, flags, fd, offset)
    sys_check(p == NULL, CALL_MMAP, addr, len_bytes, err)
    return p


cdef void* sys_map_anon(size_t len_bytes, sys_error* err) noexcept nogil:
    """New private anonymous memory, readable and writable, anywhere."""
    return _map(0, len_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0, err)


cdef void* sys_map_anon_aligned(size_t len_bytes, size_t align_bytes, sys_error* err) noexcept nogil:
    """The same, beginning at a multiple of align_bytes, which is one of pages."""
    cdef sys_error ignored
    cdef uintptr_t addr = <uintptr_t>sys_map_anon(len_bytes + align_bytes, err), start
    if addr == 0:
        return NULL
    start = (addr + align_bytes - 1) // align_bytes * align_bytes
    # Unchecked: what cannot be cut off takes addresses, no memory.
    sys_error_clear(&ignored)
    if start != addr:
        sys_unmap(addr, start - addr, &ignored)
    sys_unmap(start + len_bytes, addr + align_bytes - start, &ignored)
    return <void*>start


cdef int sys_map_anon_at(uintptr_t addr, size_t len_bytes, sys_error* err) noexcept nogil:
    """Replace what is mapped at `addr` by private anonymous zeros."""
    cdef int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED
    return 0 if _map(addr, len_bytes, PROT_READ | PROT_WRITE, flags, -1, 0, err) != NULL else -1


cdef int sys_map_store_at(
    uintptr_t addr, size_t len_bytes, int fd, off_t offset, sys_error* err
) noexcept nogil:
    """Replace what is mapped at `addr` by the file, copy-on-write."""
    cdef int prot = PROT_READ | PROT_WRITE
    return 0 if _map(addr, len_bytes, prot, MAP_PRIVATE | MAP_FIXED, fd, offset, err) != NULL else -1


cdef void* sys_map_view(size_t len_bytes, int fd, off_t offset, sys_error* err) noexcept nogil:
    """Map the file read-only, anywhere, for this process only, and not locked. Private: it never counts as a
    writable mapping of the file."""
    cdef void* p
    if sys_injected(CALL_MMAP, 0, len_bytes, err):
        return NULL
    p = ksm_map_view(len_bytes, fd, offset)
    sys_check(p == NULL, CALL_MMAP, 0, len_bytes, err)
    return p


cdef void* sys_map_lease(size_t len_bytes, int fd, sys_error* err) noexcept nogil:
    """Map the file writable and shared, for children to inherit; nobody reads or writes it."""
    return _map(0, len_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0, err)


cdef int sys_unmap(uintptr_t addr, size_t len_bytes, sys_error* err) noexcept nogil:
    if sys_injected(CALL_MUNMAP, addr, len_bytes, err):
        return -1
    return sys_check(munmap(<void*>addr, len_bytes) != 0, CALL_MUNMAP, addr, len_bytes, err)


cdef void* sys_grow(void* array, size_t old_bytes, size_t new_bytes, sys_error* err) noexcept nogil:
    """Grow an array made by sys_map_anon; moves page tables, not bytes. NULL: the old one stays."""
    cdef void* p
    if sys_injected(CALL_MREMAP, <uintptr_t>array, new_bytes, err):
        return NULL
    p = ksm_grow(array, old_bytes, new_bytes)
    sys_check(p == NULL, CALL_MREMAP, <uintptr_t>array, new_bytes, err)
    return p


cdef int sys_move(uintptr_t source, uintptr_t target, size_t len_bytes, sys_error* err) noexcept nogil:
    """Move the pages at `source` over those at `target`, in one step for everybody who looks."""
    if sys_injected(CALL_MREMAP, target, len_bytes, err):
        return -1
    return sys_check(
        ksm_move(<void*>source, <void*>target, len_bytes) != 0, CALL_MREMAP, target, len_bytes, err
    )


cdef int sys_protect(uintptr_t addr, size_t len_bytes, bint writable, sys_error* err) noexcept nogil:
    cdef int prot = PROT_READ | PROT_WRITE if writable else PROT_READ
    if sys_injected(CALL_MPROTECT, addr, len_bytes, err):
        return -1
    return sys_check(mprotect(<void*>addr, len_bytes, prot) != 0, CALL_MPROTECT, addr, len_bytes, err)


cdef int sys_advise(uintptr_t addr, size_t len_bytes, advice what, sys_error* err) noexcept nogil:
    cdef int value = MADV_DONTNEED
    if what == ADVISE_DONTFORK:
        value = MADV_DONTFORK
    elif what == ADVISE_DONTDUMP:
        value = MADV_DONTDUMP
    elif what == ADVISE_HUGEPAGE:
        value = MADV_HUGEPAGE
    elif what == ADVISE_NOHUGEPAGE:
        value = MADV_NOHUGEPAGE
    elif what == ADVISE_SEQUENTIAL:
        value = MADV_SEQUENTIAL
    elif what == ADVISE_RANDOM:
        value = MADV_RANDOM
    elif what == ADVISE_MERGEABLE:
        value = MADV_MERGEABLE
    elif what == ADVISE_POPULATE_WRITE:
        value = MADV_POPULATE_WRITE
    elif what == ADVISE_COLD:
        value = MADV_COLD
    if sys_injected(CALL_MADVISE, addr, len_bytes, err):
        return -1
    return sys_check(madvise(<void*>addr, len_bytes, value) != 0, CALL_MADVISE, addr, len_bytes, err)


cdef int sys_mincore(
    uintptr_t addr, size_t len_bytes, unsigned char* resident, sys_error* err
) noexcept nogil:
    if sys_injected(CALL_MINCORE, addr, len_bytes, err):
        return -1
    return sys_check(mincore(<void*>addr, len_bytes, resident) != 0, CALL_MINCORE, addr, len_bytes, err)


# ---- files ----------------------------------------------------------------------------------

cdef int sys_memfd(const char* name, sys_error* err) noexcept nogil:
    cdef int fd
    if sys_injected(CALL_MEMFD_CREATE, 0, 0, err):
        return -1
    kept_opening()
    fd = kept_opened(ksm_memfd(name))
    sys_check(fd < 0, CALL_MEMFD_CREATE, 0, 0, err)
    return fd


cdef int sys_truncate(int fd, off_t len_bytes, sys_error* err) noexcept nogil:
    if sys_injected(CALL_FTRUNCATE, 0, <size_t>len_bytes, err):
        return -1
    while ksm_truncate(fd, len_bytes) != 0:
        if errno != EINTR:
            return _fail(err, CALL_FTRUNCATE, errno, 0, <size_t>len_bytes)
    return 0


cdef int sys_write_at(
    int fd, const void* source, size_t len_bytes, off_t offset, sys_error* err
) noexcept nogil:
    """Write everything or fail; a source that is not mapped gives EFAULT, never a signal."""
    cdef size_t done = 0
    cdef ssize_t n
    if sys_injected(CALL_PWRITE, <uintptr_t>source, len_bytes, err):
        return -1
    while done < len_bytes:
        n = ksm_write_at(fd, <const char*>source + done, len_bytes - done, offset + <off_t>done)
        if n > 0:
            done += <size_t>n
        elif n == 0:
            return _fail(err, CALL_PWRITE, EIO, <uintptr_t>source, len_bytes)
        elif errno != EINTR:
            return _fail(err, CALL_PWRITE, errno, <uintptr_t>source, len_bytes)
    return 0


cdef int sys_read_at(int fd, void* target, size_t len_bytes, off_t offset, sys_error* err) noexcept nogil:
    """Read everything or fail; a file that ends early gives EIO."""
    cdef size_t done = 0
    cdef ssize_t n
    if sys_injected(CALL_PREAD, 0, len_bytes, err):
        return -1
    while done < len_bytes:
        n = pread(fd, <char*>target + done, len_bytes - done, offset + <off_t>done)
        if n > 0:
            done += <size_t>n
        elif n == 0:
            return _fail(err, CALL_PREAD, EIO, 0, len_bytes)
        elif errno != EINTR:
            return _fail(err, CALL_PREAD, errno, 0, len_bytes)
    return 0


cdef int sys_punch(int fd, off_t offset, size_t len_bytes, sys_error* err) noexcept nogil:
    """Give the file's memory of this range back to the system."""
    if sys_injected(CALL_FALLOCATE, 0, len_bytes, err):
        return -1
    while fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, <off_t>len_bytes) != 0:
        if errno != EINTR:
            return _fail(err, CALL_FALLOCATE, errno, 0, len_bytes)
    return 0


cdef int sys_seal(int fd, sys_error* err) noexcept nogil:
    if sys_injected(CALL_SEAL, 0, 0, err):
        return -1
    return sys_check(fcntl(fd, F_ADD_SEALS, F_SEAL_WRITE) != 0, CALL_SEAL, 0, 0, err)


cdef int sys_open_read(const char* path, sys_error* err) noexcept nogil:
    cdef int fd
    if sys_injected(CALL_OPEN, 0, 0, err):
        return -1
    kept_opening()
    fd = kept_opened(open(path, O_RDONLY | O_CLOEXEC))
    sys_check(fd < 0, CALL_OPEN, 0, 0, err)
    return fd


cdef void sys_read_text(const char* path, char* text, size_t n_bytes) noexcept nogil:
    """A small file of the kernel, or the beginning of it, up to n_bytes - 1; nothing where it cannot be read."""
    cdef sys_error ignored
    cdef int fd
    memset(text, 0, n_bytes)
    sys_error_clear(&ignored)
    fd = sys_open_read(path, &ignored)
    if fd >= 0:
        # Always reported as failed, for there are fewer bytes; those that there are have come.
        sys_read_at(fd, text, n_bytes - 1, 0, &ignored)
        sys_close(fd)


cdef void sys_close(int fd) noexcept nogil:
    if fd >= 0:
        kept_close(fd)


cdef void sys_list_lock() noexcept nogil:
    kept_lock()


cdef void sys_list_unlock() noexcept nogil:
    kept_unlock()


cdef void sys_opening() noexcept nogil:
    kept_opening()


cdef int sys_opened(int fd) noexcept nogil:
    return kept_opened(fd)


cdef int sys_entered(int fd) noexcept nogil:
    return kept_entered(fd)


cdef void sys_close_in_child() noexcept nogil:
    kept_child()


cdef void sys_keep(sys_file* file, int fd) noexcept nogil:
    file.fd = fd
    ksm_identify(fd, &file.dev, &file.ino)


cdef bint sys_is_kept(const sys_file* file) noexcept nogil:
    cdef uint64_t dev, ino
    ksm_identify(file.fd, &dev, &ino)
    return file.fd >= 0 and ino != 0 and dev == file.dev and ino == file.ino


cdef void sys_drop(sys_file* file) noexcept nogil:
    if sys_is_kept(file):
        sys_close(file.fd)
    file.fd = -1


cdef void sys_device(const sys_file* file, uint64_t* dev_major, uint64_t* dev_minor) noexcept nogil:
    """The device of a kept file, as /proc/self/maps shows it."""
    dev_major[0] = major(file.dev)
    dev_minor[0] = minor(file.dev)


# ---- for Python code ------------------------------------------------------------------------

def page_bytes():
    """Size of a system page in bytes."""
    return sys_page_bytes()


def locks_future():
    """Is all new memory of this process locked (mlockall(2) with MCL_FUTURE)?"""
    return bool(ksm_locks_future(sys_page_bytes()))


def features():
    """What of the kernel ksmcore can use here: name -> None when it is there, else why it is not."""
    cdef sys_error err
    cdef int fd
    found = {}
    sys_error_clear(&err)
    fd = sys_open_read(b"/proc/self/pagemap", &err)
    found["pagemap"] = None if fd >= 0 else os.strerror(err.code)
    sys_close(fd)
    sys_error_clear(&err)
    fd = sys_memfd(b"ksmcore-probe", &err)
    found["memfd"] = None if fd >= 0 else os.strerror(err.code)
    sys_close(fd)
    return found
