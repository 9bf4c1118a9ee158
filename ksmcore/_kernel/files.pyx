"""Files that Python code opens, so that no forked child has them (see syscalls).

Reading needs nothing of Python's but what is here: a process that has gone into a chroot, or is about to end, must
still be able to ask the kernel.
"""

from libc.errno cimport EINTR, ENOMEM, errno

from ksmcore._kernel.syscalls cimport (
    sys_close, sys_drop, sys_entered, sys_error, sys_error_clear, sys_file, sys_is_kept, sys_keep, sys_list_lock,
    sys_open_read,
)

import os

cdef extern from "<unistd.h>" nogil:
    ssize_t read(int fd, void* buf, size_t count)
    ssize_t write(int fd, const void* buf, size_t count)


def open_read(path):
    """A descriptor for reading a file, to be given back with `close`. Raises OSError."""
    cdef bytes encoded = os.fsencode(path)
    cdef const char* name = encoded
    cdef sys_error err
    cdef int fd
    sys_error_clear(&err)
    with nogil:
        fd = sys_open_read(name, &err)
    if fd < 0:
        raise OSError(err.code, os.strerror(err.code), os.fspath(path))
    return fd


def close(int fd):
    """Close what `open_read` opened or `keep` was given; nothing where the number is another's by now."""
    with nogil:
        sys_close(fd)


def keep(int fd):
    """Have forked children close a descriptor, and be closed by `close` here. Raises OSError; then it is closed."""
    cdef int kept
    with nogil:
        sys_list_lock()
        kept = sys_entered(fd)
    if kept < 0:
        raise OSError(ENOMEM, os.strerror(ENOMEM))


def read_all(path):
    """All bytes of a file. Raises OSError."""
    cdef char buf[16384]
    cdef ssize_t n
    cdef int code = 0
    cdef bytearray found = bytearray()
    cdef int fd = open_read(path)
    try:
        while True:
            with nogil:
                n = read(fd, buf, sizeof(buf))
                code = errno if n < 0 else 0
            if n > 0:
                found += buf[:n]
            elif code != EINTR:
                break
    finally:
        close(fd)
    if code != 0:
        raise OSError(code, os.strerror(code), os.fspath(path))
    return bytes(found)


cdef class Waker:
    """A pipe, for a thread that waits for descriptors and may have to be woken. No forked child has it."""

    cdef sys_file ends[2]

    def __cinit__(self):
        self.ends[0].fd = self.ends[1].fd = -1

    def __init__(self):
        """Raises OSError."""
        cdef int fd
        # Python's pipes are not inherited by other programs; of a fork before they are listed the child keeps two
        # descriptors that stand for nothing.
        for k, fd in enumerate(os.pipe()):
            os.set_blocking(fd, False)
            keep(fd)
            sys_keep(&self.ends[k], fd)

    def fileno(self):
        """What can be read once it was woken."""
        return self.ends[0].fd

    def is_kept(self):
        """Is it still there? The program may have closed it."""
        return sys_is_kept(&self.ends[0]) and sys_is_kept(&self.ends[1])

    def wake(self):
        """Nothing where it is woken already, or was closed."""
        if self.is_kept():
            write(self.ends[1].fd, b"!", 1)

    def sleep(self):
        """Forget that it was woken."""
        cdef char buf[64]
        while self.is_kept() and read(self.ends[0].fd, buf, sizeof(buf)) > 0:
            pass

    def close(self):
        """What is still there of it."""
        for k in range(2):
            sys_drop(&self.ends[k])
