"""Memory to ask the kernel about."""

import ctypes
import mmap

import pytest

from helpers.libc import libc
from helpers.memory import PAGE, private_memory


@pytest.fixture
def three_mappings():
    """Address of 12 pages: 4 that can be written, 4 that cannot, 4 that can."""
    area = private_memory(14)
    export = ctypes.c_char.from_buffer(area)
    addr = ctypes.addressof(export) + PAGE
    middle = ctypes.c_void_p(addr + 4 * PAGE), ctypes.c_size_t(4 * PAGE)
    assert libc.mprotect(*middle, mmap.PROT_READ) == 0
    yield addr
    assert libc.mprotect(*middle, mmap.PROT_READ | mmap.PROT_WRITE) == 0
    del export
    area.close()
