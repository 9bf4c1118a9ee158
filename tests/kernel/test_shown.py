"""What pages show, by single questions and by the text of maps."""

import ctypes
import mmap

import numpy as np
import pytest

from ksmcore._kernel import mappings
from ksmcore._kernel.shown import NOTHING, UNKNOWN, Shown

PAGE = mmap.PAGESIZE


@pytest.fixture(params=["asked", "text"])
def numbers(request, monkeypatch):
    if request.param == "text":

        def refuse(*_):
            raise OSError(25, "not there before Linux 6.11")

        monkeypatch.setattr(mappings.fcntl, "ioctl", refuse)
    made = Shown()
    return lambda memory: made.of(
        ctypes.addressof(ctypes.c_char.from_buffer(memory)), len(memory) // PAGE
    )


def test_private_pages_of_a_file_are_known_until_they_are_written(tmp_path, numbers):
    (tmp_path / "file").write_bytes(bytes(range(8)) * PAGE)
    with open(tmp_path / "file", "rb") as file:
        a = mmap.mmap(file.fileno(), 8 * PAGE, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
        b = mmap.mmap(
            file.fileno(),
            4 * PAGE,
            mmap.MAP_PRIVATE,
            mmap.PROT_READ | mmap.PROT_WRITE,
            offset=2 * PAGE,
        )
    assert a[3 * PAGE] == 0  # read: it is there now
    b[PAGE] = 1
    first, second = numbers(a), numbers(b)
    assert len(np.unique(first)) == 8
    assert second[1] == UNKNOWN
    assert (second[[0, 2, 3]] == first[[2, 4, 5]]).all()


def test_untouched_written_and_shared_memory(numbers):
    memory = mmap.mmap(-1, 4 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory[2 * PAGE] = 1
    assert numbers(memory).tolist() == [NOTHING, NOTHING, UNKNOWN, NOTHING]
    shared = mmap.mmap(-1, 2 * PAGE)
    assert numbers(shared).tolist() == [UNKNOWN, UNKNOWN]
