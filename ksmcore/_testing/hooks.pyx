"""Hooks into the state of compiled modules, for tests."""

from ksmcore._guard.mprotect cimport mprotect_is_installed
from ksmcore._pass cimport quiet
from ksmcore._records cimport store


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
