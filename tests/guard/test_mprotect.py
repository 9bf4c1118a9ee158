"""The mprotect guard: no write is lost, true faults reach their handler, nothing is left behind."""

import faulthandler
import threading

import numpy as np
import pytest

import ksmcore
from helpers.memory import PAGE, random_pages
from helpers.processes import run_python
from ksmcore._testing import hooks

FAULTHANDLER = ("-X", "faulthandler")
calls_are_redirected = pytest.mark.skipif(
    ksmcore.features()["calls"] is not None, reason="calls are not redirected here"
)


@pytest.fixture
def guard():
    return "mprotect"


def test_the_handler_is_there_only_while_a_pass_runs(engine, rng):
    a = engine.array(random_pages(rng, 8192))
    during = []
    assert not hooks.handler_installed()
    engine.scan(progress=lambda done, total: during.append(hooks.handler_installed()))
    assert all(during)
    assert not hooks.handler_installed()
    assert a.size


def test_it_is_removed_with_busy_threads_around(engine, rng):
    source = random_pages(rng, 256)
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
    a = engine.array(random_pages(rng, 64))
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
    done = run_python(CRASH, call, flags=FAULTHANDLER)
    assert done.returncode == -11
    assert "Segmentation fault" in done.stderr
    assert "in crash" in done.stderr


@pytest.mark.parametrize("when", ["during", "after"])
def test_a_true_fault_ends_the_process_without_a_handler(when):
    call = "engine.dedup(progress=crash)" if when == "during" else "engine.dedup(); crash(1, 1)"
    done = run_python(CRASH, call, flags=())
    assert done.returncode == -11


def test_a_fault_in_registered_memory_that_the_program_protected_is_a_true_one():
    done = run_python(
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
        flags=FAULTHANDLER,
    )
    assert done.returncode == -11
    assert "in crash" in done.stderr


def test_faulthandler_enabled_in_the_middle_of_a_scan_works_in_later_scans():
    done = run_python(
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
        """,
        flags=(),
    )
    assert done.returncode == -11
    assert "in crash" in done.stderr


PLACED = """
    import ctypes, faulthandler, signal, sys, numpy as np, ksmcore
    from ksmcore._testing import hooks
    engine = ksmcore.Engine(guard="mprotect")
    a = engine.array(np.arange(8 << 20, dtype=np.uint8))
    b = engine.array(np.arange(8 << 20, dtype=np.uint8))
    libc = ctypes.CDLL(None)
    libc.signal.restype = ctypes.c_void_p
    libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    def in_a_pass(change):
        todo = [change]
        def once(done, total):
            if todo:
                todo.pop()()
                assert hooks.handler_installed()
        b[::4096] ^= 1
        engine.dedup(progress=once)
        assert not todo and not hooks.handler_installed()
    def crash():
        ctypes.memset(8, 1, 1)
"""


@calls_are_redirected
@pytest.mark.parametrize("crashes", ["in_a_pass(crash)", "crash()"])
def test_a_handler_that_comes_in_a_pass_leaves_ours_in_place_and_gets_its_faults(crashes):
    done = run_python(PLACED, f"in_a_pass(faulthandler.enable); {crashes}", flags=())
    assert done.returncode == -11
    assert "in crash" in done.stderr


@calls_are_redirected
def test_a_handler_that_goes_in_a_pass_is_gone():
    done = run_python(
        PLACED,
        """
        for n in range(20):
            in_a_pass(faulthandler.enable)
            in_a_pass(faulthandler.disable)
        faulthandler.enable()
        in_a_pass(faulthandler.disable)
        in_a_pass(lambda: (faulthandler.enable(), faulthandler.disable()))
        print("before", flush=True)
        in_a_pass(crash)
        """,
        flags=(),
    )
    assert (done.stdout, done.stderr) == ("before\n", "")
    assert done.returncode == -11


@calls_are_redirected
def test_who_asks_in_a_pass_finds_the_programs_handler():
    """And nothing of ours."""
    done = run_python(
        PLACED,
        """
        HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_int)
        mine = HANDLER(lambda sig: None)
        at = ctypes.cast(mine, ctypes.c_void_p).value
        found = []
        for sig in (signal.SIGSEGV, signal.SIGBUS):
            in_a_pass(lambda: found.append(libc.signal(sig, at)))
            in_a_pass(lambda: found.append(libc.signal(sig, 1)))
            in_a_pass(lambda: found.append(libc.signal(sig, None)))
            found.append(libc.signal(sig, None))
        print(found == [None, at, 1, None] * 2)
        """,
        flags=(),
    )
    assert (done.stdout, done.stderr) == ("True\n", "")


@calls_are_redirected
def test_handlers_that_come_and_go_beside_passes_without_pause():
    done = run_python(
        """
        import faulthandler, time, numpy as np, ksmcore
        engine = ksmcore.Engine(guard="mprotect")
        arrays = [engine.array(np.ones(1 << 16)) for _ in range(40)]
        end, n = time.monotonic() + 4, 0
        with engine.start(sleep_millisecs=0, max_cpu=100):
            while time.monotonic() < end:
                for switch in (faulthandler.enable, faulthandler.disable):
                    switch()
                    for array in arrays:
                        array[::512] = n
                        array[::512] = 1
                n += 1
        print(engine.stats().pages_merged > 0)
        """,
        flags=(),
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")


def test_a_handler_of_the_program_gets_its_faults_and_can_mend_them():
    """A C handler with SA_SIGINFO that mprotects the page and returns, as garbage collectors do."""
    done = run_python(
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
        """,
        flags=(),
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
