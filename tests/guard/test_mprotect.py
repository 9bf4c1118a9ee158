"""The mprotect guard: no write is lost, true faults reach their handler, nothing is left behind."""

import faulthandler
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest

import ksmcore
from ksmcore._testing import hooks

PAGE = ksmcore.Engine.page_bytes


@pytest.fixture
def guard():
    return "mprotect"


def run(code: str, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *flags, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_the_handler_is_there_only_while_a_pass_runs(engine, rng):
    a = engine.array(rng.integers(0, 256, 8192 * PAGE, dtype=np.uint8))
    during = []
    assert not hooks.handler_installed()
    engine.scan(progress=lambda done, total: during.append(hooks.handler_installed()))
    assert all(during)
    assert not hooks.handler_installed()
    assert a.size


def test_it_is_removed_with_busy_threads_around(engine, rng):
    source = rng.integers(0, 256, 256 * PAGE, dtype=np.uint8)
    a, b = engine.array(source), engine.array(source)
    stop = threading.Event()

    def busy() -> None:
        numbers = np.arange(100_000)
        while not stop.is_set():
            numbers = numbers * 3 + 1

    threads = [threading.Thread(target=busy) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(5):
        engine.dedup(a, b)
        assert not hooks.handler_installed()
        a[::PAGE] += 1
        b[::PAGE] += 1
    stop.set()
    for thread in threads:
        thread.join()


def test_faulthandler_is_still_the_one_in_charge(engine, rng):
    was_enabled = faulthandler.is_enabled()
    faulthandler.enable()
    a = engine.array(rng.integers(0, 256, 64 * PAGE, dtype=np.uint8))
    engine.dedup(a)
    assert faulthandler.is_enabled()
    if not was_enabled:
        faulthandler.disable()


CRASH = """
    import ctypes, faulthandler, numpy as np, ksmcore
    engine = ksmcore.Engine(guard="mprotect")
    a = engine.array(np.arange(8 << 20, dtype=np.uint8))
    b = engine.array(np.arange(8 << 20, dtype=np.uint8))
    def crash(done, total):
        if done > 0:
            ctypes.memset(8, 1, 1)
"""


@pytest.mark.parametrize("when", ["during", "after"])
def test_a_true_fault_reaches_faulthandler(when):
    call = "engine.dedup(progress=crash)" if when == "during" else "engine.dedup(); crash(1, 1)"
    done = run(textwrap.dedent(CRASH) + call, "-X", "faulthandler")
    assert done.returncode == -11
    assert "Segmentation fault" in done.stderr
    assert "in crash" in done.stderr


@pytest.mark.parametrize("when", ["during", "after"])
def test_a_true_fault_ends_the_process_without_a_handler(when):
    call = "engine.dedup(progress=crash)" if when == "during" else "engine.dedup(); crash(1, 1)"
    done = run(textwrap.dedent(CRASH) + call)
    assert done.returncode == -11


def test_a_fault_in_registered_memory_that_the_program_protected_is_a_true_one():
    done = run(
        """
        import ctypes, numpy as np, ksmcore
        engine = ksmcore.Engine(guard="mprotect")
        a = engine.array(np.arange(8 << 20, dtype=np.uint8))
        b = engine.array(np.arange(8 << 20, dtype=np.uint8))
        libc = ctypes.CDLL(None)
        addr = a.__array_interface__["data"][0]
        def crash(done, total):
            if done > 0:
                libc.mprotect(ctypes.c_void_p(addr), ctypes.c_size_t(4096), 1)
                a[0] = 1
        engine.dedup(progress=crash)
        """,
        "-X",
        "faulthandler",
    )
    assert done.returncode == -11
    assert "in crash" in done.stderr


def test_faulthandler_enabled_in_the_middle_of_a_scan_works_in_later_scans():
    done = run(
        """
        import ctypes, faulthandler, numpy as np, ksmcore
        engine = ksmcore.Engine(guard="mprotect")
        a = engine.array(np.arange(8 << 20, dtype=np.uint8))
        b = engine.array(np.arange(8 << 20, dtype=np.uint8))
        engine.dedup(progress=lambda done, total: faulthandler.enable())
        def crash(done, total):
            if done > 0:
                ctypes.memset(8, 1, 1)
        engine.dedup(progress=crash)
        """
    )
    assert done.returncode == -11
    assert "in crash" in done.stderr


def test_a_handler_of_the_program_gets_its_faults_and_can_mend_them():
    """A C handler with SA_SIGINFO that mprotects the page and returns, as garbage collectors do."""
    done = run(
        """
        import ctypes, mmap, numpy as np, ksmcore
        libc = ctypes.CDLL(None, use_errno=True)
        page = mmap.PAGESIZE
        memory = mmap.mmap(-1, page, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        addr = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        mended = []
        HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
        @HANDLER
        def mend(sig, info, context):
            mended.append(sig)
            libc.mprotect(ctypes.c_void_p(addr), ctypes.c_size_t(page), 3)
        class SigAction(ctypes.Structure):
            _fields_ = [("handler", HANDLER), ("mask", ctypes.c_ulong * 16),
                        ("flags", ctypes.c_int), ("restorer", ctypes.c_void_p)]
        action = SigAction(mend, (ctypes.c_ulong * 16)(), 4, None)
        assert libc.sigaction(11, ctypes.byref(action), None) == 0
        engine = ksmcore.Engine(guard="mprotect")
        a = engine.array(np.arange(8 << 20, dtype=np.uint8))
        b = engine.array(np.arange(8 << 20, dtype=np.uint8))
        def fault(done, total):
            libc.mprotect(ctypes.c_void_p(addr), ctypes.c_size_t(page), 1)
            ctypes.memset(addr, 1, 1)
        engine.dedup(progress=fault)
        during = len(mended)
        fault(0, 0)
        print(during > 0, len(mended) == during + 1, memory[0])
        """
    )
    assert done.stderr == ""
    assert done.stdout.split() == ["True", "True", "1"]


def test_no_write_is_lost_while_pages_merge(engine):
    """Writers count up in every page and so bring all pages to the same contents again and again;
    each reads back what it wrote. The scanner merges without pause."""
    n_pages, n_words, stop = 64, PAGE // 8, threading.Event()
    arrays = [engine.empty((n_pages, n_words), np.uint64) for _ in range(2)]
    lost: list[str] = []
    rounds = [0, 0]

    def write(which: int) -> None:
        array = arrays[which]
        value = 0
        while not stop.is_set():
            value += 1
            array[:] = value  # NumPy lets go of the GIL while it fills
            if not (array == value).all():
                lost.append(f"array {which}: wrote {value}, read {np.unique(array)}")
                return
            np.add(array, 1, out=array)
            value += 1
            if not (array == value).all():
                lost.append(f"array {which}: added to {value}, read {np.unique(array)}")
                return
            rounds[which] = value

    threads = [threading.Thread(target=write, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    merged = 0
    for _ in range(400):
        merged += engine.dedup(*arrays).pages_merged
    stop.set()
    for thread in threads:
        thread.join()
    assert lost == []
    assert merged > 0
    assert min(rounds) > 10
