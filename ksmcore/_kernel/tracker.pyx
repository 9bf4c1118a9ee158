"""Written-page tracking: the kernel notes which pages are written, so that the others need not be read.

A region is watched by an asynchronous userfaultfd (Linux 6.7; no privileges): its pages can be protected
so that the first write to each costs its writer a microsecond and nothing else. No writer waits, no
message is sent, no signal; what was written shows in a survey (see pagemap). Pages of the store need no
watching, since a written one is no page of a file any more.

A mapping belongs to one userfaultfd at most, so a guard window is let go by the tracker before it is opened,
and taken back afterwards. Pages that were let go count as written: the safe side.

Whatever goes wrong here costs time or a missed merge, never a byte: what is merged is compared in a window.
What the tracker cannot see is memory that a device has pinned from before the protection on.

In a forked child nothing is watched, and the descriptor is closed: through it any memory of the parent's that was
never touched could be given bytes.
"""

from libc.stdint cimport uintptr_t

from ksmcore._kernel.maps cimport maps_each_in, maps_is_private_data, vma_t
from ksmcore._kernel.pagemap cimport pagemap, pagemap_close, pagemap_open, pagemap_try_scanning
from ksmcore._kernel.syscalls cimport (
    CALL_TRACKER, sys_drop, sys_error, sys_error_clear, sys_injected, sys_is_kept, sys_keep, sys_page_bytes,
)
from ksmcore._kernel.uffd cimport UFFD_PROTECTED, uffd_open_async, uffd_protect, uffd_register, uffd_unregister

from libc.errno cimport EINVAL, ENOMEM, ENOSYS
import os


ctypedef struct watching:
    int fd
    uintptr_t start
    uintptr_t end
    sys_error err                # the first failure


cdef int tracker_open(tracker_t* tracker, const pagemap* pm, sys_error* err) noexcept nogil:
    """-1 with *err where the kernel has no such thing, or does not allow it."""
    tracker.file.fd = -1
    if sys_injected(CALL_TRACKER, 0, 0, err):
        return -1
    if not pm.scans:
        err.code = ENOSYS
        err.call = <int>CALL_TRACKER
        return -1
    sys_keep(&tracker.file, uffd_open_async(err))
    return 0 if tracker.file.fd >= 0 else -1


cdef void tracker_close(tracker_t* tracker) noexcept nogil:
    """All that it watched is plain memory again."""
    sys_drop(&tracker.file)


cdef bint tracker_is_there(tracker_t* tracker) noexcept nogil:
    """False, from then on, once the program has closed the descriptor: nothing is watched any more."""
    if tracker.file.fd >= 0 and not sys_is_kept(&tracker.file):
        sys_drop(&tracker.file)
    return tracker.file.fd >= 0


cdef void _watch(const vma_t* vma, void* context) noexcept nogil:
    cdef watching* all = <watching*>context
    cdef uintptr_t start = max(vma.start, all.start)
    cdef uintptr_t end = min(vma.end, all.end)
    if all.err.code == 0 and vma.inode == 0 and maps_is_private_data(vma):
        _register(all.fd, start, end - start, &all.err)


cdef int _register(int fd, uintptr_t addr, size_t len_bytes, sys_error* err) noexcept nogil:
    if sys_injected(CALL_TRACKER, addr, len_bytes, err):
        return -1
    return uffd_register(fd, addr, len_bytes, UFFD_PROTECTED, err)


cdef int tracker_watch(tracker_t* tracker, uintptr_t addr, uintptr_t end, sys_error* err) noexcept nogil:
    """Watch the anonymous memory in [addr, end); at most two mappings more. All of it, or -1 with *err."""
    cdef watching all
    all.fd = tracker.file.fd
    all.start = addr
    all.end = end
    sys_error_clear(&all.err)
    if maps_each_in(addr, end, _watch, &all, err) != 0:
        tracker_unwatch(tracker, addr, end)
        return -1
    if all.err.code != 0:
        err[0] = all.err
        tracker_unwatch(tracker, addr, end)
        return -1
    return 0


cdef void tracker_unwatch(tracker_t* tracker, uintptr_t addr, uintptr_t end) noexcept nogil:
    """Nothing in [addr, end) is watched from here on, and no page protected.

    It fails where the program has mapped something else there, and then nothing of what was watched is left, or a
    piece that costs writers a fault and is seen as written. Where it is refused the tracker is closed, which nobody
    can refuse: nothing at all is watched then (see tracker_is_there).
    """
    cdef sys_error failed
    sys_error_clear(&failed)
    if uffd_unregister(tracker.file.fd, addr, end - addr, &failed) != 0 and failed.code not in (EINVAL, ENOMEM):
        tracker_close(tracker)


cdef void tracker_disarm(tracker_t* tracker, uintptr_t addr, size_t len_bytes) noexcept nogil:
    """These pages count as written. Unchecked: it fails where nothing is watched, so nothing protected."""
    cdef sys_error ignored
    sys_error_clear(&ignored)
    uffd_protect(tracker.file.fd, addr, len_bytes, False, &ignored)


cdef int tracker_let_go(int fd, uintptr_t addr, size_t len_bytes, sys_error* err) noexcept nogil:
    if fd < 0:
        return 0
    if sys_injected(CALL_TRACKER, addr, len_bytes, err):
        return -1
    return uffd_unregister(fd, addr, len_bytes, err)


cdef void tracker_take_back(int fd, uintptr_t addr, size_t len_bytes) noexcept nogil:
    """Unchecked: what is not watched cannot be protected, which shows there (see quiet)."""
    cdef sys_error ignored
    sys_error_clear(&ignored)
    if fd >= 0:
        _register(fd, addr, len_bytes, &ignored)


def probe():
    """None when written pages can be tracked here and now, else why not."""
    cdef pagemap pm
    cdef tracker_t tracker
    cdef sys_error err
    cdef int rc
    sys_error_clear(&err)
    pagemap_open(&pm, sys_page_bytes(), True)
    pagemap_try_scanning(&pm)
    rc = tracker_open(&tracker, &pm, &err)
    tracker_close(&tracker)
    pagemap_close(&pm)
    return None if rc == 0 else os.strerror(err.code)
