"""Another process's memory while it changes."""

import itertools
import mmap
import os
import signal
import subprocess
import sys

import pytest

from ksmcore._kernel.outside import CannotLookError, Outside

PAGE = mmap.PAGESIZE


def place_of(process, addr):
    return next(place for place in process.places() if place.start <= addr < place.end)


@pytest.fixture
def memory():
    with mmap.mmap(-1, 64 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as made:
        yield made


def address_of(memory):
    import ctypes

    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def test_only_what_is_there_is_read(memory):
    """And nothing is brought into memory by that."""
    for page in (3, 4, 9):
        memory[page * PAGE] = page
    start = address_of(memory)
    with Outside(os.getpid()) as process:
        for _ in range(2):
            place = place_of(process, start)._replace(start=start, end=start + 64 * PAGE)
            found = [
                ((pages.addr - start) // PAGE + i, pages.data[i * PAGE])
                for pages in process.own_pages(place)
                for i in range(len(pages.entries))
            ]
            assert found == [(3, 3), (4, 4), (9, 9)]


def test_pages_that_go_meanwhile_are_counted(memory):
    memory[:] = b"x" * (64 * PAGE)
    start = address_of(memory)
    with Outside(os.getpid()) as process:
        place = place_of(process, start)._replace(start=start, end=start + 64 * PAGE)
        real = process._fill
        process._fill = lambda addr, data: addr >= start + 2 * PAGE and real(addr, data)
        assert sum(len(pages.entries) for pages in process.own_pages(place)) == 62
        assert process.n_gone == 2


def test_files_and_shared_memory_are_not_read():
    with mmap.mmap(-1, 8 * PAGE) as shared:
        shared[:] = b"y" * (8 * PAGE)
        with Outside(os.getpid()) as process:
            assert not place_of(process, address_of(shared)).may_own
            assert process.n_elsewhere >= 8


def test_a_process_that_becomes_another_program_or_ends():
    code = "import os; print('a', flush=True); os.read(0, 1); os.execv('/bin/cat', ['cat'])"
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with child:
        assert child.stdout.readline() == b"a\n"
        with Outside(child.pid) as process:
            places = [place for place in process.places() if place.may_own]
            assert process.is_there()
            child.stdin.write(b"12")
            child.stdin.flush()
            assert child.stdout.read(1) == b"2"  # by cat
            assert not process.is_there()
            assert [pages for place in places for pages in process.own_pages(place)] == []
        with Outside(child.pid) as process:
            child.send_signal(signal.SIGKILL)
            child.wait()
            assert not process.is_there()
            assert process.places() == []


def test_descriptors_are_given_back():
    before = os.listdir("/proc/self/fd")
    with Outside(os.getpid()) as process:
        assert process.command
    with pytest.raises(CannotLookError, match="no process"):
        Outside(2**22 + 1)
    assert os.listdir("/proc/self/fd") == before


def test_memory_behind_a_library_is_not_its_own():
    """The kernel has both in one mapping where they have the same rights."""
    import ctypes

    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    fixed_noreplace, size = 0x100000, 64 * PAGE
    how = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | fixed_noreplace
    with Outside(os.getpid()) as process:
        n_tried = 0
        before = process.places()
        for data, variables in itertools.pairwise(before):
            is_theirs = data.is_written_file and data.end == variables.start
            if not is_theirs or variables.name or not variables.may_own:
                continue
            end = variables.end
            if libc.mmap(end, size, mmap.PROT_READ | mmap.PROT_WRITE, how, -1, 0) != end:
                continue  # something lies there
            n_tried += 1
            try:
                ctypes.memset(end, 1, size)
                after = process.places()
                assert variables in after
                assert place_of(process, end).start == end
            finally:
                libc.munmap(ctypes.c_void_p(end), ctypes.c_size_t(size))
        if n_tried == 0:
            pytest.skip("something lies behind the variables of each library")
