"""The memory of all libraries: malloc and its kin, for all loaded objects."""

import os
import shutil
from pathlib import Path

import pytest

import ksmcore
from helpers.native import compiled
from helpers.processes import run_python
from ksmcore._arrays import memory

pytestmark = pytest.mark.skipif(memory.missing() is not None, reason=str(memory.missing()))

STRESS = bool(os.environ.get("KSMCORE_STRESS"))

BEGIN = """
    import ctypes, os, sys, threading, warnings
    warnings.filterwarnings("ignore", message=".*multi-threaded", category=DeprecationWarning)
    import numpy as np
    import ksmcore
    from ksmcore._arrays import arena, memory
    from ksmcore._testing.arena import check_arena
    KIB, MIB = 1 << 10, 1 << 20
    ksmcore.install_allocator(64 * KIB, memory="all")

    def taken():
        return arena.numbers()["taken_bytes"]
"""
END = """
    assert check_arena() == 0
"""


def passes(body: str, *arguments: object, **env: str) -> None:
    seconds = 3600 if STRESS else 120
    given = [str(one) for one in arguments]
    done = run_python(BEGIN, body, END, arguments=given, timeout_seconds=seconds, **env)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.fixture(scope="session")
def native_path(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("malloc"), [Path(__file__).parent / "malloc.c"])


@pytest.mark.skipif("LD_PRELOAD" in os.environ, reason="something is preloaded already")
def test_a_malloc_that_was_preloaded_stays_the_one_below(tmp_path):
    library = compiled(tmp_path, [Path(__file__).parent / "preloaded.c"])
    passes(
        """
        n_calls = ctypes.c_ulong.in_dll(ctypes.CDLL(sys.argv[1]), "preloaded_n_calls")
        before = n_calls.value
        small = [bytearray(1000) for _ in range(5000)]
        assert n_calls.value - before >= 5000
        assert taken() == 0
        blocks = [bytearray(b"x" * MIB) for _ in range(4)]
        assert taken() >= 4 * MIB
        for block in blocks:
            block += bytes(MIB)
        assert ksmcore.dedup().bytes_saved > 6 * MIB
        # Blocks that begin on a page, of either.
        for _ in range(2000):
            del bytearray(4096 - 32)[:]
        del blocks, block
        assert taken() < MIB
        """,
        library,
        LD_PRELOAD=str(library),
    )


def test_what_is_no_numpy_array_is_merged_as_well():
    passes("""
        page = bytes(range(1, 251)) * 16 + b"x" * 96
        blocks = [page * 256 + bytes(7) for _ in range(4)]
        arrays = [bytearray(block) for block in blocks]
        assert taken() > 8 * MIB
        saved = ksmcore.dedup().bytes_saved
        assert saved > 7 * MIB, saved
        assert all(block == blocks[0] == array for block, array in zip(blocks, arrays))
        arrays[0][:5] = b"other"
        assert arrays[1] == blocks[0]
        del blocks, arrays
        assert taken() < MIB
    """)


def test_small_blocks_stay_below():
    passes("""
        before = taken()
        blocks = [bytes(60 * KIB) for _ in range(100)]
        assert taken() == before
    """)


def test_zeros_touch_no_page():
    passes("""
        from helpers.kernels_view import present_pages
        libc = ctypes.CDLL(None)
        libc.calloc.restype = ctypes.c_void_p
        addr = libc.calloc(4 * MIB, 1)
        assert addr % 4096 == 0
        assert sum(present_pages(addr, 1024)) == 0
        libc.free(ctypes.c_void_p(addr))
    """)


def test_a_bytearray_that_grows_keeps_its_bytes():
    passes("""
        grown = bytearray()
        piece = bytes(range(256)) * 64
        n = 0
        while len(grown) < 100 * MIB:
            grown += piece
            n += 1
            if n % 1000 == 0:
                assert grown.endswith(piece)
        assert grown == piece * n
        assert taken() > 100 * MIB
        del grown
        assert taken() < MIB
    """)


def test_what_grows_while_it_is_merged_keeps_its_bytes():
    passes("""
        page = bytes(range(1, 251)) * 16 + b"x" * 96
        grown = [bytearray(page * 16 * 1024) for _ in range(2)]
        assert ksmcore.dedup().bytes_saved > 60 * MIB
        for array in grown:
            array += page * 16 * 1024
        assert grown[0] == grown[1] == page * 32 * 1024
        assert ksmcore.dedup().bytes_saved > 0
        assert grown[0] == grown[1] == page * 32 * 1024
    """)


@pytest.mark.parametrize("mib", [5, 40])
def test_a_block_that_grows_is_young_again(mib):
    """In place: what was merged of it could not be moved when it grows on. On a machine that stalls
    it may have aged again before it is looked at; then it is given longer."""
    passes(
        """
        import time
        engine = ksmcore.default_engine()
        size = int(sys.argv[1]) * MIB

        def young(seconds):
            passes = engine._now().passes
            passes.tidy(idle_only=True, young_seconds=seconds)
            before = engine.stats()
            begun = passes.begin_batches()
            passes.make_batch(0, 1 << 40)
            passes.end_batches(begun)
            return engine.stats().skipped["young"] - before.skipped["young"]

        for attempt in range(8):
            seconds = 0.1 * 2**attempt
            block = bytearray(os.urandom(size))
            made = time.monotonic()
            block += b"x"  # with room from here on
            time.sleep(max(made + 1.2 * seconds - time.monotonic(), 0))
            before = young(seconds)
            block += bytes(len(block) // 7)  # more than Python itself has kept room for
            gained = young(seconds) - before
            if gained >= size // 4096:
                break
        else:
            raise AssertionError(f"{gained} pages were young")
        """,
        mib,
    )


def test_given_back_after_it_was_undone():
    passes("""
        block = bytes(3 * MIB)
        array = np.zeros(MIB)
        ksmcore.uninstall_allocator()
        before = taken()
        assert before > 3 * MIB
        other = bytes(3 * MIB)
        assert taken() == before
        del block, array
        assert taken() < MIB
        ksmcore.install_allocator(64 * KIB, memory="all")
        other = bytes(3 * MIB)
        assert taken() > 3 * MIB
    """)


def test_forked_children_go_on():
    passes("""
        kept = bytes(range(256)) * 16 * KIB
        ksmcore.dedup()
        for _ in range(5):
            pid = os.fork()
            if pid == 0:
                try:
                    blocks = [bytes(range(256)) * 16 * KIB for _ in range(3)]
                    assert kept == blocks[0]
                    assert ksmcore.dedup().bytes_saved > 7 * MIB
                    blocks.append(blocks[0] + b"more")
                    assert blocks[0] == blocks[1] == kept
                    del blocks, kept
                except BaseException:
                    import traceback
                    traceback.print_exc()
                    os._exit(1)
                os._exit(0)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert kept == bytes(range(256)) * 16 * KIB
    """)


def test_a_hook_of_a_fork_may_allocate():
    """One that was registered before ours is called after it, under the arena's lock."""
    done = run_python(
        """
        import ctypes
        HOOK = ctypes.CFUNCTYPE(None)
        libc = ctypes.CDLL(None)
        libc.malloc.restype = ctypes.c_void_p
        held = []
        def in_c():
            held.append(libc.malloc(3 << 20))
            if len(held) > 2:
                libc.free(ctypes.c_void_p(held.pop(0)))
        called = HOOK(in_c)
        libc.__register_atfork(called, called, called, None)
        grown = []
        def grow():
            if not grown:
                return
            for n_bytes in (50 << 20, 1 << 20, 3 << 20, 60 << 20, 20 << 20):
                grown[0] = libc.realloc(ctypes.c_void_p(grown[0]), n_bytes)
                assert ctypes.string_at(grown[0], 1) == b"g"
        called_to_grow = HOOK(grow)
        libc.__register_atfork(called_to_grow, called_to_grow, called_to_grow, None)
        """,
        BEGIN,
        """
        libc = ctypes.CDLL(None)  # which finds the hooks
        libc.malloc.restype = libc.realloc.restype = ctypes.c_void_p
        for n_bytes in [3 * MIB] * 5 + [40 * MIB] * 3:
            grown[:] = [libc.malloc(n_bytes)]
            ctypes.memset(grown[0], ord("g"), n_bytes)
            pid = os.fork()
            if pid == 0:
                os._exit(0)
            assert os.waitpid(pid, 0)[1] == 0
        """,
        END,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_lines_longer_than_their_buffer(tmp_path):
    """getline grows its caller's buffer inside the C library."""
    path = tmp_path / "lines"
    path.write_bytes(b"".join(b"%d" % (i % 10) * (50_000 * i) + b"\n" for i in range(1, 12)))
    passes(
        """
        libc = ctypes.CDLL(None, use_errno=True)
        libc.fopen.restype = ctypes.c_void_p
        libc.getline.restype = ctypes.c_ssize_t
        file = ctypes.c_void_p(libc.fopen(sys.argv[1].encode(), b"r"))
        line, room = ctypes.c_void_p(), ctypes.c_size_t()
        for i in range(1, 12):
            n = libc.getline(ctypes.byref(line), ctypes.byref(room), file)
            assert ctypes.string_at(line, n) == b"%d" % (i % 10) * (50_000 * i) + b"\\n"
        libc.free(line)
        libc.fclose(file)
        """,
        path,
    )


def test_what_finds_no_room_to_grow_moves_to_the_c_library():
    passes("""
        import resource
        libc = ctypes.CDLL(None)
        libc.malloc.restype = libc.realloc.restype = ctypes.c_void_p
        block = libc.malloc(100 * MIB)
        ctypes.memset(block, 7, 100 * MIB)
        with open("/proc/self/statm") as file:
            there = int(file.read().split()[0]) * os.sysconf("SC_PAGESIZE")
        resource.setrlimit(resource.RLIMIT_AS, (there + 260 * MIB, resource.RLIM_INFINITY))
        block = libc.realloc(ctypes.c_void_p(block), 200 * MIB)
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
        assert ctypes.string_at(block, 100 * MIB) == b"\\7" * (100 * MIB)
        assert taken() < MIB
        libc.free(ctypes.c_void_p(block))
    """)


def test_absurd_sizes_are_refused_as_before():
    passes("""
        libc = ctypes.CDLL(None, use_errno=True)
        for name, arguments in {
            "malloc": (2**63 + 5,), "calloc": (2**62, 8), "realloc": (None, 2**63 + 5),
            "reallocarray": (None, 2**62, 8), "valloc": (2**63,), "memalign": (64, 2**63),
        }.items():
            function = getattr(libc, name)
            function.restype = ctypes.c_void_p
            ctypes.set_errno(0)
            given = [one if one is None else ctypes.c_size_t(one) for one in arguments]
            assert function(*given) is None
            assert ctypes.get_errno() == 12, name
        there = ctypes.c_void_p()
        assert libc.posix_memalign(ctypes.byref(there), 24, ctypes.c_size_t(MIB)) == 22
        libc.free(None)
        libc.malloc_usable_size.restype = ctypes.c_size_t
        assert libc.malloc_usable_size(None) == 0
    """)


@pytest.mark.parametrize(
    ("threshold", "guard", "n_turns", "n_turns_long"),
    [
        (16 << 10, None, 20_000, 17_000_000),  # no scanner
        (4 << 10, "userfaultfd", 10_000, 700_000),
        (64 << 10, "userfaultfd", 10_000, 700_000),
        (4 << 10, "mprotect", 10_000, 700_000),
        (64 << 10, "mprotect", 10_000, 700_000),
    ],
)
def test_threads_that_allocate_grow_and_give_back_in_turns(
    tmp_path, native_path, threshold, guard, n_turns, n_turns_long
):
    """While the scanner merges what they hold, processes are forked, libraries come and go, and it
    is undone and done again."""
    other_path = shutil.copy(native_path, tmp_path / "other.so")
    if guard is not None and ksmcore.features()[guard] is not None:
        pytest.skip("not to be had here")
    passes(
        """
        native, other_path = ctypes.CDLL(sys.argv[1]), sys.argv[4]
        native.stress.restype = native.give_all_back.restype = ctypes.c_long
        threshold, n_turns = int(sys.argv[2]), int(sys.argv[3])

        def load_and_unload():
            # A library that takes memory, and gives back what others have taken.
            other = ctypes.CDLL(other_path)
            turns = map(ctypes.c_long, (2, 300, n, 1 << 20))
            assert other.stress(*turns) == 0
            assert other.give_all_back() == 0
            other.give_back.argtypes = [ctypes.c_void_p]
            libc = ctypes.CDLL(None)
            libc.malloc.restype = ctypes.c_void_p
            other.give_back(libc.malloc(3 * MIB))
            libc.dlclose(ctypes.c_void_p(other._handle))

        ksmcore.install_allocator(threshold, memory="all")
        most_bytes = 1 << 16
        if sys.argv[5] != "None":
            ksmcore.start(sleep_millisecs=0)
            most_bytes = 1 << 20
        wrong = []
        def work(seed):
            wrong.append(native.stress(3, n_turns, seed, most_bytes))
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(2)]
        for thread in threads:
            thread.start()
        n = 0
        while any(thread.is_alive() for thread in threads):
            n += 1
            if n % 3 == 0:
                ksmcore.uninstall_allocator()
                ksmcore.install_allocator(threshold, memory="all")
            load_and_unload()
            pid = os.fork()
            if pid == 0:
                load_and_unload()
                os._exit(0)
            assert os.waitpid(pid, 0)[1] == 0
        for thread in threads:
            thread.join()
        ksmcore.stop()
        assert wrong == [0, 0], wrong
        assert native.give_all_back() == 0
        """,
        native_path,
        threshold,
        n_turns_long if STRESS else n_turns,  # in 6 threads
        other_path,
        guard,
        KSMCORE_GUARD=guard or "auto",
        PYTHONWARNINGS="ignore",
    )


def test_a_vector_that_grows_by_little(native_path):
    passes(
        """
        native = ctypes.CDLL(sys.argv[1])
        native.grow.restype = ctypes.c_long
        for n_bytes, step in ((3 * MIB, 1000), (200 * MIB, 300_000)):
            assert native.grow(ctypes.c_long(n_bytes), ctypes.c_long(step)) == 0
        """,
        native_path,
    )


@pytest.mark.parametrize("which", ["some", None, 3])
def test_other_words_are_refused(which):
    with pytest.raises(ValueError, match="memory must be"):
        ksmcore.install_allocator(memory=which)
