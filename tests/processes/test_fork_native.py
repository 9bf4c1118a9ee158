"""Forks that Python does not make: fork() and vfork() of C, from a thread of C, through ctypes;
and forks of Python while threads of C allocate."""

import ctypes
import os
from pathlib import Path

import numpy as np
import pytest

import ksmcore
from helpers.forks import THREADS_RUN, exit_code, finish, live, live_anew, scanning, watch
from helpers.native import compiled
from helpers.processes import FORK_OFTEN, run_python
from helpers.waiting import wait_until
from ksmcore._kernel import forks

pytestmark = pytest.mark.filterwarnings(THREADS_RUN)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    source = Path(__file__).with_name("forker.c")
    return compiled(tmp_path_factory.mktemp("forker"), [source])


@pytest.fixture(scope="module")
def forker(library):
    loaded = ctypes.CDLL(str(library))
    loaded.forker_many.restype = loaded.forker_one.restype = ctypes.c_long
    return loaded


def pointers(array: np.ndarray, expected: np.ndarray) -> list[object]:
    return [
        ctypes.c_void_p(array.ctypes.data),
        ctypes.c_void_p(expected.ctypes.data),
        ctypes.c_size_t(array.nbytes),
    ]


def test_fork_by_ctypes(engine, memory):
    """Python's own hooks do not run in this child; the engine starts empty all the same."""
    generation = forks.generation()
    pid = ctypes.CDLL(None).fork()
    if pid == 0:
        watch()

        def work() -> None:
            assert forks.generation() == generation + 1
            assert engine.stats() == ksmcore.Engine().stats()
            live_anew(memory, 1000)

        finish(work)
    live(memory, 100)
    assert exit_code(pid) == 0
    memory.check()


@pytest.mark.parametrize("closes", [False, True])
def test_a_child_forked_by_a_c_thread(engine, memory, forker, closes):
    """It keeps its bytes, whatever the parent does."""
    news, orders = os.pipe(), os.pipe()
    pid = forker.forker_one(*pointers(memory.arrays[0], memory.expected[0]), news[1], orders[0])
    assert os.read(news[0], 1) == b"."
    # The model is the child's own copy, so this does not change what it compares with.
    live(memory, 100)
    assert engine.stats().store_pages_frozen > 0
    if closes:
        engine.close()
    os.write(orders[1], b"g")
    assert exit_code(pid) == 0
    memory.check()
    for fd in (*news, *orders):
        os.close(fd)


@pytest.mark.parametrize("by_vfork", [0, 1], ids=["fork", "vfork"])
def test_forks_of_a_c_thread_while_another_thread_scans(engine, memory, forker, by_vfork):
    with scanning(memory):
        before = engine.stats().pages_merged

        def has_merged_meanwhile():
            for array, expected in zip(memory.arrays, memory.expected, strict=True):
                assert forker.forker_many(*pointers(array, expected), 60, by_vfork) == 0
            return engine.stats().pages_merged > before

        wait_until(has_merged_meanwhile)


def test_a_vfork_freezes_nothing(engine, memory, forker):
    """The child leaves the parent's memory before the parent goes on."""
    assert forker.forker_many(*pointers(memory.arrays[0], memory.expected[0]), 3, 1) == 0
    live(memory, 100)
    assert engine.stats().store_pages_frozen == 0


def test_forks_wait_for_threads_that_allocate_without_the_gil(library):
    """In the child the arena is never in the midst of a change."""
    program = f"""
        import ctypes, threading
        import ksmcore
        from ksmcore._arrays import allocator

        ksmcore.install_allocator()
        others = allocator.use_here(65536)
        capsule = allocator.use_here(65536)
        allocator.use_again(others)

        # PyDataMem_Handler: name[127], version, context, malloc, calloc, realloc, free
        pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
        pointer_of.restype = ctypes.c_void_p
        address = pointer_of(ctypes.py_object(capsule), b"mem_handler")
        handler = (ctypes.c_void_p * 5).from_address(address + 128)
        context, take, _, _, give = map(ctypes.c_void_p, handler)
        allocate = ctypes.CDLL({str(library)!r}).forker_allocate
        over = ctypes.c_int(0)
        def work(n_bytes):
            allocate(take, give, context, ctypes.c_size_t(n_bytes), ctypes.byref(over))
        def end():
            over.value = 1
        threads = [threading.Thread(target=work, args=(n,)) for n in (70_000, 80_000, 200_000)]
        fork_often(threads, end, 300)
    """
    done = run_python(FORK_OFTEN, program)
    assert (done.returncode, done.stderr) == (0, "")
