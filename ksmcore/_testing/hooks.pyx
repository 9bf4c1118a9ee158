"""Hooks into the state of compiled modules, for tests."""

from libc.stdint cimport uintptr_t

from ksmcore._guard.mprotect cimport mprotect_is_installed
from ksmcore._kernel.reader cimport ksm_reader, reader_enter, reader_here, reader_leave
from ksmcore._pass cimport quiet
from ksmcore._records cimport store

cdef extern from "_kernel/reader.h" nogil:
    int ksm_read_copy(ksm_reader* reader, void* target, const void* source, size_t len_bytes)


def watch_from(size_t n_pages):
    """Watch regions of at least so many pages, under any engine; returns what it was."""
    before = quiet.quiet_min_pages
    quiet.quiet_min_pages = n_pages
    return before


def tell_huge(int answer):
    """Have new stores take memory files for huge (1), or not (0), or ask the kernel (-1)."""
    store.store_told_huge = answer


def handler_installed():
    """True while ksmcore's SIGSEGV handler is the process's."""
    return mprotect_is_installed()


def enter_reader():
    """Have this thread be one that reads memory which may go away. Each is left by this thread, with leave_reader."""
    reader_enter()


def leave_reader():
    reader_leave()


cdef bint _can_read(uintptr_t addr) noexcept nogil:
    cdef char byte
    return ksm_read_copy(reader_here(), &byte, <const void*>addr, 1) == 0


def can_read(uintptr_t addr):
    """Between enter_reader and leave_reader: is there a byte? Needs the handler."""
    return _can_read(addr)
