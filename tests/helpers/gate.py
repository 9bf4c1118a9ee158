"""What the tests of the gate share: asking it, and memory of every kind to ask about."""

import ctypes
import mmap

import pytest

from helpers.libc import MAP_FAILED, MAP_FIXED, libc, why_failed
from helpers.memory import PAGE, PRIVATE
from ksmcore._gate import buffers

N_PAGES = 16
LEN_BYTES = N_PAGES * PAGE
PROT_NONE = 0
READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE


def admit(buffer, **options):
    return admit_all([buffer], **options)[0]


def admit_all(given, *, page_bytes=PAGE, **options):
    """Both halves of the gate, as registration takes them."""
    held = []
    try:
        for buffer in given:
            held.append(buffers.Export(buffer, page_bytes))
    except BaseException:
        buffers.release_all(held)
        raise
    return buffers.admit(held, page_bytes=page_bytes, **options)


def refused(buffer, error=ValueError, **options):
    """Text of the error with which `buffer` is refused."""
    with pytest.raises(error) as caught:
        admit(buffer, **options)
    return str(caught.value)


def told_advice(admission):
    names = ("dontfork", "dontdump", "hugepage", "nohugepage")
    return {name for name in names if getattr(admission.traits, name)}


class Mapping:
    """Memory from mmap(2) itself, between two inaccessible pages so that no neighbour joins it."""

    def __init__(self, n_pages=N_PAGES, prot=READ_WRITE, flags=PRIVATE, fd=-1):
        self.len_bytes = n_pages * PAGE
        self.fence = libc.mmap(None, self.len_bytes + 2 * PAGE, PROT_NONE, PRIVATE, -1, 0)
        self.addr = libc.mmap(self.fence + PAGE, self.len_bytes, prot, flags | MAP_FIXED, fd, 0)
        if self.addr == MAP_FAILED:
            reason = why_failed("mmap")
            self.close()
            pytest.skip(reason)
        self.buffer = (ctypes.c_char * self.len_bytes).from_address(self.addr)

    def call(self, name, argument=0, first=0, n_pages=None):
        """Call a libc function on a stretch of pages; skip the test where it is not allowed."""
        len_bytes = self.len_bytes - first * PAGE if n_pages is None else n_pages * PAGE
        if getattr(libc, name)(self.addr + first * PAGE, len_bytes, argument) != 0:
            pytest.skip(why_failed(name))

    def close(self):
        libc.munmap(self.fence, self.len_bytes + 2 * PAGE)
