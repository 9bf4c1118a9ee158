"""Registration: what is taken and refused, what is never touched, and how memory comes back."""

import array
import ctypes
import gc
import mmap
import os
import subprocess
import sys
import textwrap
import threading
import warnings
import weakref

import numpy as np
import pytest

import ksmcore
from ksmcore._engine import registrar
from ksmcore._engine.stats import STORE_PATH
from ksmcore._kernel import smaps

PAGE = mmap.PAGESIZE
N_PAGES = 24


def octets(buffer):
    """The bytes of a buffer as an array on the same memory."""
    if isinstance(buffer, np.ndarray):
        return (buffer if buffer.flags.c_contiguous else buffer.T).reshape(-1).view(np.uint8)
    return np.frombuffer(buffer, np.uint8)


def address(buffer):
    return octets(buffer).ctypes.data


def fill(buffer, value=0xA5):
    """Equal pages that are not zero; returns the bytes."""
    octets(buffer)[:] = value
    return bytes(octets(buffer))


def store_bytes(start, end):
    """How many bytes of [start, end) map a store."""
    return sum(
        min(vma.end, end) - max(vma.start, start)
        for vma in smaps.vmas_in(start, end)
        if vma.path.startswith(STORE_PATH)
    )


def is_plain(start, end):
    """Whether [start, end) is plain private anonymous memory without a hole."""
    mappings = smaps.vmas_in(start, end)
    covered = sum(min(vma.end, end) - max(vma.start, start) for vma in mappings)
    return covered == end - start and all(
        vma.inode == 0 and vma.path in ("", "[heap]") and vma.writable and not vma.shared
        for vma in mappings
    )


def in_child(function):
    """Exit code of a forked child that runs `function`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of NumPy's threads, since Python 3.12
        child = os.fork()
    if child == 0:
        code = 99
        try:
            code = int(function())
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run(code):
    """What a Python of its own prints, with warnings as errors."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), done.stderr.strip()


def aligned_view(private_buffer, n_pages, offset=0):
    """An array of n_pages pages that begins `offset` bytes into a page."""
    memory = private_buffer(n_pages + 2)
    return np.frombuffer(memory, np.uint8)[PAGE + offset :][: n_pages * PAGE]


LEN_BYTES = N_PAGES * PAGE
KINDS = {
    "mmap": lambda: mmap.mmap(-1, LEN_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS),
    "bytearray": lambda: bytearray(LEN_BYTES),
    "array": lambda: array.array("d", bytes(LEN_BYTES)),
    "ctypes": lambda: (ctypes.c_char * LEN_BYTES)(),
    "memoryview": lambda: memoryview(bytearray(LEN_BYTES)),
    "ndarray": lambda: np.zeros(LEN_BYTES // 8),
    "ndarray of two dimensions": lambda: np.zeros((N_PAGES, PAGE), np.uint8),
    "ndarray in Fortran order": lambda: np.zeros((N_PAGES, PAGE), np.uint8, order="F"),
    "datetime64": lambda: np.zeros(LEN_BYTES // 8, "datetime64[ns]"),
    "structured": lambda: np.zeros(LEN_BYTES // 8, [("a", "i4"), ("b", "f4")]),
    "strings": lambda: np.zeros(LEN_BYTES // 16, "U4"),
    "masked": lambda: np.ma.zeros(LEN_BYTES // 8),
}


class TestBufferKinds:
    @pytest.mark.parametrize("kind", KINDS)
    def test_taken_merged_and_given_back(self, engine, kind):
        # GIVEN a buffer of equal pages
        buffer = KINDS[kind]()
        data = buffer.data if kind == "masked" else buffer
        content = fill(data)
        # WHEN it is registered and merged
        region = engine.register(buffer)
        addr, end = region.addr, region.addr + region.nbytes
        report = engine.dedup()
        # THEN its whole pages are merged
        assert N_PAGES - 1 <= region.n_pages <= N_PAGES
        assert report.pages_merged == region.n_pages
        assert store_bytes(addr, end) == region.nbytes
        assert bytes(octets(data)) == content
        # AND plain again once it is unregistered
        engine.unregister(buffer)
        assert is_plain(addr, end)
        assert bytes(octets(data)) == content

    def test_the_region_lies_inside(self, engine):
        buffer = np.zeros(LEN_BYTES, np.uint8)
        region = engine.register(buffer)
        assert address(buffer) <= region.addr
        assert region.addr % PAGE == 0
        assert region.nbytes == region.n_pages * PAGE
        assert region.addr + region.nbytes <= address(buffer) + buffer.nbytes


def refused_buffers():
    yield "not a buffer", object(), TypeError
    yield "objects", np.full(LEN_BYTES // 8, None), TypeError
    yield "read-only", bytes(LEN_BYTES), ValueError
    yield "not contiguous", np.zeros((2 * N_PAGES, PAGE), np.uint8)[::2], ValueError
    yield "no whole page", bytearray(PAGE - 1), ValueError
    yield "empty", bytearray(), ValueError
    yield "shared", mmap.mmap(-1, LEN_BYTES), ValueError


class TestRefused:
    @pytest.mark.parametrize(
        ("buffer", "error"),
        [pytest.param(buffer, error, id=name) for name, buffer, error in refused_buffers()],
    )
    @pytest.mark.parametrize("call", ["register", "dedup", "estimate"])
    def test_nothing_is_half_done(self, engine, private_buffer, call, buffer, error):
        fine = private_buffer(4)
        buffers = [buffer] if call == "register" else [fine, buffer]
        with pytest.raises(error):
            getattr(engine, call)(*buffers)
        assert engine.stats().regions == 0
        assert engine.regions == ()
        fine.close()

    def test_the_buffer_is_let_go(self, engine):
        buffer = bytearray(PAGE - 1)
        with pytest.raises(ValueError, match="no whole page"):
            engine.register(buffer)
        buffer.append(1)

    @pytest.mark.parametrize("call", ["register", "dedup"])
    def test_no_memory_for_the_second(self, engine, private_buffer, call):
        """An overlap that only shows when the first buffer is in: both are let go."""
        memory = private_buffer(8)
        view = memoryview(memory)
        first, second = view[: 6 * PAGE], view[4 * PAGE :]
        if call == "dedup":
            with pytest.raises(ValueError, match="overlaps"):
                engine.dedup(first, second)
            assert engine.stats().regions == 0
        else:
            engine.register(first)
            with pytest.raises(ValueError, match="overlaps"):
                engine.register(second)
            assert engine.stats().regions == 1
            engine.unregister(first)
        first.release()
        second.release()
        view.release()
        memory.close()

    def test_a_closed_engine(self):
        engine = ksmcore.Engine()
        engine.close()
        for call in (engine.register, engine.unregister, engine.dedup, engine.estimate):
            with pytest.raises(ValueError, match="closed"):
                call(bytearray(LEN_BYTES))
        for call in (engine.scan, engine.configure):
            with pytest.raises(ValueError, match="closed"):
                call()
        with pytest.raises(ValueError, match="closed"):
            engine.empty(3)


class TestOverlap:
    @pytest.fixture
    def pages(self, engine, private_buffer):
        """Slices of 32 pages, of which 8 to 24 are registered."""
        memory = np.frombuffer(private_buffer(32), np.uint8)
        fill(memory)
        self.region = engine.register(memory[8 * PAGE : 24 * PAGE])
        return lambda first, last: memory[first * PAGE : last * PAGE]

    def check_refused(self, engine, buffer, match):
        with pytest.raises(ValueError, match=match):
            engine.register(buffer)
        assert engine.stats().regions == 1
        assert engine.regions == (self.region,)
        engine._core.check()

    def test_repeated(self, engine, pages):
        self.check_refused(engine, pages(8, 24), "already registered")

    @pytest.mark.parametrize(("first", "last"), [(8, 9), (10, 20), (23, 24)])
    def test_nested(self, engine, pages, first, last):
        self.check_refused(engine, pages(first, last), "already registered")

    @pytest.mark.parametrize(
        ("first", "last"),
        [(0, 9), (7, 23), (7, 24), (8, 25), (23, 25), (0, 32)],
    )
    def test_overlapping(self, engine, pages, first, last):
        self.check_refused(engine, pages(first, last), "overlaps.*already registered")

    @pytest.mark.parametrize("scanned", ["dedup", "scan twice"])
    @pytest.mark.parametrize(("first", "last"), [(8, 24), (10, 20), (4, 12)])
    def test_after_merging_it_is_registered_not_a_store(self, engine, pages, scanned, first, last):
        if scanned == "dedup":
            engine.dedup()
        else:
            engine.scan()
            engine.scan()
        assert store_bytes(self.region.addr, self.region.addr + self.region.nbytes) > 0
        with pytest.raises(ValueError, match="already registered") as caught:
            engine.register(pages(first, last))
        assert "store" not in str(caught.value)

    @pytest.mark.parametrize("merged", [False, True])
    def test_adjacent_is_fine(self, engine, pages, merged):
        if merged:
            engine.dedup()
        before = engine.register(pages(0, 8))
        after = engine.register(pages(24, 32))
        assert engine.stats().regions == 3
        assert before.addr + before.nbytes == self.region.addr
        assert self.region.addr + self.region.nbytes == after.addr
        # Closing the middle one leaves its neighbours merged.
        engine.dedup()
        self.region.close()
        assert is_plain(self.region.addr, self.region.addr + self.region.nbytes)
        assert store_bytes(before.addr, after.addr + after.nbytes) == before.nbytes + after.nbytes

    def test_spanning_two_regions(self, engine, pages):
        engine.register(pages(24, 32))
        with pytest.raises(ValueError, match="overlaps"):
            engine.register(pages(20, 28))
        assert engine.stats().regions == 2

    def test_again_after_closing(self, engine, pages):
        self.region.close()
        engine.register(pages(7, 25))

    @pytest.mark.parametrize(("first", "last"), [(8, 24), (10, 20), (4, 12), (20, 30)])
    @pytest.mark.parametrize("merged", [False, True])
    def test_another_engine(self, engine, pages, first, last, merged):
        if merged:
            engine.dedup()
        with ksmcore.Engine() as other:
            with pytest.raises(ValueError, match="another engine"):
                other.register(pages(first, last))
            with pytest.raises(ValueError, match="another engine"):
                other.dedup(pages(first, last))
            assert other.stats().regions == 0
            engine.unregister(self.region)
            other.register(pages(first, last))
            assert other.stats().regions == 1

    def test_bytes_of_a_shared_page_are_no_overlap(self, engine, private_buffer):
        """Two arrays that meet inside a page: neither has that page."""
        memory = np.frombuffer(private_buffer(20), np.uint8)
        middle = 10 * PAGE + 100
        left = engine.register(memory[:middle])
        right = engine.register(memory[middle:])
        assert (left.n_pages, right.n_pages) == (10, 9)


class TestPartialPages:
    """A page that the buffer shares with strangers stays as it is."""

    @pytest.fixture(params=[1, 16, 100, PAGE - 1])
    def offset(self, request):
        return request.param

    def test_mappings_of_head_and_tail(self, engine, private_buffer, offset):
        memory = np.frombuffer(private_buffer(20), np.uint8)
        content = fill(memory)
        view = memory[PAGE + offset : 18 * PAGE + offset]
        region = engine.register(view)
        assert engine.dedup().pages_merged == region.n_pages == 16
        start = address(memory)
        assert region.addr == start + 2 * PAGE
        assert store_bytes(region.addr, region.addr + region.nbytes) == region.nbytes
        assert is_plain(start, start + 2 * PAGE)
        assert is_plain(start + 18 * PAGE, start + 20 * PAGE)
        assert bytes(memory) == content

    def test_strangers_can_write_meanwhile(self, engine, private_buffer, offset):
        memory = np.frombuffer(private_buffer(20), np.uint8)
        fill(memory)
        engine.dedup(memory[PAGE + offset : 18 * PAGE + offset])
        memory[PAGE] = 1
        memory[19 * PAGE - 1] = 2
        engine.dedup()
        assert memory[PAGE] == 1
        assert memory[19 * PAGE - 1] == 2
        assert (np.delete(memory, [PAGE, 19 * PAGE - 1]) == 0xA5).all()

    def test_unregistering(self, engine, private_buffer, offset):
        memory = np.frombuffer(private_buffer(20), np.uint8)
        content = fill(memory)
        view = memory[PAGE + offset : 18 * PAGE + offset]
        engine.dedup(view)
        engine.unregister(view)
        assert is_plain(address(memory), address(memory) + 20 * PAGE)
        assert bytes(memory) == content


class TestHold:
    """While it is registered a buffer cannot vanish."""

    def test_mmap(self, engine, private_buffer):
        buffer = private_buffer(N_PAGES)
        region = engine.register(buffer)
        with pytest.raises(BufferError):
            buffer.close()
        with pytest.raises(BufferError):
            buffer.resize(2 * LEN_BYTES)
        region.close()
        buffer.close()

    def test_bytearray(self, engine):
        buffer = bytearray(LEN_BYTES)
        region = engine.register(buffer)
        with pytest.raises(BufferError):
            buffer.append(0)
        with pytest.raises(BufferError):
            buffer.clear()
        region.close()
        buffer.append(0)

    def test_ndarray(self, engine):
        buffer = np.zeros(LEN_BYTES, np.uint8)
        engine.register(buffer)
        with pytest.raises(ValueError, match="resize"):
            buffer.resize(2 * LEN_BYTES)

    def test_dropping_the_last_name(self, engine):
        buffer = np.full(LEN_BYTES, 5, np.uint8)
        region = engine.register(buffer)
        del buffer
        gc.collect()
        engine.dedup()
        start, end = region.addr, region.addr + region.nbytes
        assert store_bytes(start, end) == region.nbytes
        region.close()

    @pytest.mark.parametrize("how", ["unregister buffer", "unregister region", "with", "engine"])
    def test_every_way_out_lets_go(self, how, private_buffer):
        buffer = private_buffer(N_PAGES)
        with ksmcore.Engine() as engine:
            region = engine.register(buffer)
            if how == "unregister buffer":
                engine.unregister(buffer)
            elif how == "unregister region":
                engine.unregister(region)
            elif how == "with":
                with region:
                    pass
        assert region.closed
        buffer.close()


class TestUnregister:
    def test_by_region(self, engine, private_buffer):
        region = engine.register(private_buffer(4))
        engine.unregister(region)
        assert region.closed
        assert engine.stats().regions == 0

    def test_by_buffer(self, engine, private_buffer):
        buffer = private_buffer(4)
        region = engine.register(buffer)
        engine.unregister(buffer)
        assert region.closed
        assert engine.regions == ()

    def test_by_another_view_of_the_same_bytes(self, engine, private_buffer):
        buffer = private_buffer(4)
        region = engine.register(buffer)
        engine.unregister(np.frombuffer(buffer, np.float64))
        assert region.closed

    def test_close_twice(self, engine, private_buffer):
        region = engine.register(private_buffer(4))
        region.close()
        region.close()
        engine.unregister(region)
        assert region.closed

    def test_close_inside_its_with(self, engine, private_buffer):
        with engine.register(private_buffer(4)) as region:
            assert not region.closed
            region.close()
        assert region.closed

    def test_with_closes_after_an_error(self, engine, private_buffer):
        with pytest.raises(KeyError), engine.register(private_buffer(4)) as region:
            raise KeyError
        assert region.closed

    def test_stranger(self, engine, private_buffer):
        with pytest.raises(ValueError, match="not registered"):
            engine.unregister(private_buffer(4))

    def test_stranger_that_is_no_buffer(self, engine):
        with pytest.raises(TypeError, match="not a buffer"):
            engine.unregister(17)

    @pytest.mark.parametrize(("first", "last"), [(0, 4), (1, 8), (2, 6)])
    def test_part(self, engine, private_buffer, first, last):
        buffer = private_buffer(8)
        engine.register(buffer)
        part = np.frombuffer(buffer, np.uint8)[first * PAGE : last * PAGE]
        with pytest.raises(ValueError, match="not registered"):
            engine.unregister(part)
        assert engine.stats().regions == 1

    def test_more_than_the_region(self, engine, private_buffer):
        buffer = private_buffer(8)
        engine.register(np.frombuffer(buffer, np.uint8)[: 4 * PAGE])
        with pytest.raises(ValueError, match="registered"):
            engine.unregister(buffer)
        assert engine.stats().regions == 1

    def test_with_another_engine(self, engine, private_buffer):
        buffer = private_buffer(4)
        region = engine.register(buffer)
        with ksmcore.Engine() as other:
            with pytest.raises(ValueError, match="another engine"):
                other.unregister(region)
            with pytest.raises(ValueError, match="another engine"):
                other.unregister(buffer)
        assert not region.closed

    def test_twice_by_buffer(self, engine, private_buffer):
        buffer = private_buffer(4)
        engine.register(buffer)
        engine.unregister(buffer)
        with pytest.raises(ValueError, match="not registered"):
            engine.unregister(buffer)

    def test_an_array_of_the_engine(self, engine):
        x = engine.full(LEN_BYTES, 3, np.uint8)
        engine.dedup()
        engine.unregister(x)
        assert engine.stats().regions == 0
        assert is_plain(address(x), address(x) + LEN_BYTES)
        assert (x == 3).all()

    def test_a_closed_region_says_so(self, engine, private_buffer):
        region = engine.register(private_buffer(4))
        assert "4 pages" in repr(region)
        region.close()
        assert "closed" in repr(region)
        for call in (engine.dedup, engine.estimate):
            with pytest.raises(ValueError, match=r"closed|not registered"):
                call(region)


WAYS_OUT = ["unregister", "close", "with", "engine.close", "with engine"]


class TestPlainAgain:
    """However a region ends, its memory is plain private memory again, with the same bytes."""

    def end(self, how, engine, region):
        if how == "unregister":
            engine.unregister(region)
        elif how == "close":
            region.close()
        elif how == "with":
            with region:
                pass
        elif how == "engine.close":
            engine.close()
        else:
            with engine:
                pass

    @pytest.mark.parametrize("how", WAYS_OUT)
    def test_mappings_and_bytes(self, engine, private_buffer, rng, how):
        # GIVEN merged pages, zero pages and unique pages side by side, and some written since
        buffer = private_buffer(64)
        pages = np.frombuffer(buffer, np.uint8).reshape(64, PAGE)
        pages[:32] = rng.integers(0, 256, PAGE, dtype=np.uint8)
        pages[32:48] = rng.integers(0, 256, (16, PAGE), dtype=np.uint8)
        region = engine.register(buffer)
        start, end = region.addr, region.addr + region.nbytes
        assert engine.dedup().pages_merged == 32
        pages[5] = 77
        pages[60, 3] = 1
        content = bytes(pages)
        # WHEN the region ends
        self.end(how, engine, region)
        # THEN no store is left, all is plain, and the bytes are the same
        assert store_bytes(start, end) == 0
        assert is_plain(start, end)
        assert bytes(pages) == content

    @pytest.mark.parametrize("how", WAYS_OUT)
    def test_dontneed_gives_zeros(self, engine, private_buffer, how):
        """What an allocator relies on."""
        buffer = private_buffer(N_PAGES)
        fill(buffer)
        region = engine.register(buffer)
        engine.dedup()
        self.end(how, engine, region)
        buffer.madvise(mmap.MADV_DONTNEED)
        assert buffer[:] == bytes(LEN_BYTES)

    def test_write_after(self, engine, private_buffer):
        a, b = private_buffer(N_PAGES), private_buffer(N_PAGES)
        fill(a)
        content = fill(b)
        engine.dedup(a, b)
        engine.unregister(a)
        a[:] = b"!" * LEN_BYTES
        assert b[:] == content
        assert a[:] == b"!" * LEN_BYTES

    def test_the_store_is_given_back(self, engine, private_buffer):
        buffer = private_buffer(N_PAGES)
        fill(buffer)
        region = engine.register(buffer)
        engine.dedup()
        assert os.fstat(engine._core.store_fd).st_blocks > 0
        region.close()
        assert os.fstat(engine._core.store_fd).st_blocks == 0
        assert engine.stats().store_pages == 0

    def test_register_merge_unregister_again_and_again(self, engine, private_buffer):
        buffer = private_buffer(N_PAGES)
        for value in range(1, 20):
            content = fill(buffer, value)
            with engine.register(buffer):
                assert engine.dedup().pages_merged == N_PAGES
            assert buffer[:] == content
            engine._core.check()
        assert engine.stats().regions == 0

    def test_at_exit(self):
        out, err = run(
            """
            import atexit, mmap

            def look():
                # Registered before ksmcore's own hook, so it runs after that.
                start = x.ctypes.data
                paths = {v.path for v in smaps.vmas_in(start, start + x.nbytes)}
                stores = [v for v in smaps.Snapshot().vmas_in(0, 1 << 64)
                          if v.path.startswith("/memfd:ksmcore-store") and v.writable]
                print(engine.closed, paths, len(stores), (x == 7).all(), set(m[:]), merged)

            atexit.register(look)
            import ksmcore
            from ksmcore._kernel import smaps
            engine = ksmcore.Engine()
            m = mmap.mmap(-1, 64 * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            m[:] = b"k" * len(m)
            region = engine.register(m)
            x = engine.full(64 * mmap.PAGESIZE, 7, "u1")
            merged = engine.dedup().pages_merged
            """
        )
        assert out == "True {''} 0 True {107} 128"
        assert err == ""

    def test_at_exit_of_the_default_engine(self):
        out, err = run(
            """
            import atexit
            atexit.register(lambda: print(
                {v.path for v in smaps.vmas_in(x.ctypes.data, x.ctypes.data + x.nbytes)}))
            import ksmcore
            from ksmcore._kernel import smaps
            x = ksmcore.full(1 << 20, 7, "u1")
            ksmcore.dedup()
            """
        )
        assert out == "{''}"
        assert err == ""


class TestPrivatize:
    def test_without_it_the_three_ways_out_are_named(self, engine):
        with mmap.mmap(-1, LEN_BYTES) as buffer:
            with pytest.raises(ValueError, match="shared anonymous") as caught:
                engine.register(buffer)
            for way_out in (
                "flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS",
                "ksmcore.empty",
                "register(buf, privatize=True)",
            ):
                assert way_out in str(caught.value)
            assert engine.stats().regions == 0

    def test_keeps_bytes_and_merges(self, engine):
        with mmap.mmap(-1, LEN_BYTES) as buffer:
            content = fill(buffer)
            with engine.register(buffer, privatize=True) as region:
                start, end = region.addr, region.addr + region.nbytes
                assert is_plain(start, end)
                assert buffer[:] == content
                assert engine.dedup().pages_merged == N_PAGES
                assert buffer[:] == content
            assert is_plain(start, end)
            assert buffer[:] == content

    def test_unique_bytes(self, engine, rng):
        with mmap.mmap(-1, 600 * PAGE) as buffer:
            content = rng.bytes(600 * PAGE)
            buffer[:] = content
            with engine.register(buffer, privatize=True):
                assert buffer[:] == content

    @pytest.mark.parametrize("privatize", [False, True])
    def test_what_a_child_writes(self, engine, private_buffer, privatize):
        with mmap.mmap(-1, LEN_BYTES) as buffer:
            fill(buffer, 1)
            if privatize:
                engine.register(buffer, privatize=True)
                engine.dedup()

            def write():
                buffer[:] = b"c" * LEN_BYTES
                return buffer[:] != b"c" * LEN_BYTES

            assert in_child(write) == 0
            assert buffer[:] == (b"\x01" if privatize else b"c") * LEN_BYTES
            engine.close()

    def test_harmless_for_private_memory(self, engine, private_buffer):
        buffer = private_buffer(N_PAGES)
        content = fill(buffer)
        engine.register(buffer, privatize=True)
        assert buffer[:] == content

    def test_not_for_files(self, engine, tmp_path):
        path = tmp_path / "file"
        path.write_bytes(bytes(LEN_BYTES))
        with (
            open(path, "r+b") as file,
            mmap.mmap(file.fileno(), LEN_BYTES) as buffer,
            pytest.raises(ValueError, match="file"),
        ):
            engine.register(buffer, privatize=True)


class TestPhaseWarning:
    def test_given(self, engine, private_buffer):
        engine.register(aligned_view(private_buffer, 40))
        with pytest.warns(ksmcore.PhaseWarning, match="16 bytes into a page") as caught:
            engine.register(aligned_view(private_buffer, 40, offset=16))
        assert len(caught) == 1
        assert caught[0].filename == __file__
        assert engine.stats().regions == 2

    def test_as_an_error_nothing_is_half_done(self, engine, private_buffer):
        engine.register(aligned_view(private_buffer, 40))
        second = aligned_view(private_buffer, 40, offset=16)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(ksmcore.PhaseWarning):
                engine.register(second)
        assert engine.stats().regions == 1
        assert len(engine.regions) == 1

    def test_not_for_the_same_phase(self, engine, private_buffer):
        for _ in range(2):
            engine.register(aligned_view(private_buffer, 40, offset=16))

    def test_not_for_other_sizes(self, engine, private_buffer):
        engine.register(aligned_view(private_buffer, 40))
        engine.register(aligned_view(private_buffer, 41, offset=16))

    def test_not_for_small_buffers(self, engine, private_buffer):
        engine.register(aligned_view(private_buffer, 4))
        engine.register(aligned_view(private_buffer, 4, offset=16))

    def test_not_after_the_other_is_closed(self, engine, private_buffer):
        engine.register(aligned_view(private_buffer, 40)).close()
        engine.register(aligned_view(private_buffer, 40, offset=16))


class TestLife:
    def test_close_twice(self, private_buffer):
        engine = ksmcore.Engine()
        region = engine.register(private_buffer(4))
        engine.close()
        engine.close()
        assert engine.closed
        assert region.closed
        assert "closed" in repr(engine)

    def test_with(self, private_buffer):
        with ksmcore.Engine() as engine:
            region = engine.register(private_buffer(4))
        assert engine.closed
        assert region.closed

    def test_never_closed(self, private_buffer):
        buffer = private_buffer(N_PAGES)
        content = fill(buffer)
        engine = ksmcore.Engine()
        region = engine.register(buffer)
        start, end = region.addr, region.addr + region.nbytes
        engine.dedup()
        del region
        del engine
        with pytest.warns(ResourceWarning, match=r"ksmcore\.Engine.*never closed"):
            gc.collect()
        assert is_plain(start, end)
        assert buffer[:] == content
        buffer.close()

    def test_never_closed_with_warnings_as_errors(self):
        out, err = run(
            """
            import gc, mmap, ksmcore
            from ksmcore._kernel import smaps
            m = mmap.mmap(-1, 64 * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            m[:] = b"k" * len(m)
            engine = ksmcore.Engine()
            start = engine.register(m).addr
            assert engine.dedup().pages_merged == 64
            del engine
            gc.collect()
            print({v.path for v in smaps.vmas_in(start, start + len(m))}, set(m[:]))
            m.close()
            """
        )
        assert out == "{''} {107}"
        assert "never closed" in err

    def test_no_warning_without_regions(self):
        ksmcore.Engine()
        gc.collect()

    def test_no_warning_after_closing(self, private_buffer):
        engine = ksmcore.Engine()
        engine.register(private_buffer(4))
        engine.close()
        del engine
        gc.collect()

    def test_regions_in_order(self, engine, private_buffer):
        made = tuple(engine.register(private_buffer(4)) for _ in range(5))
        assert engine.regions == made
        made[2].close()
        assert engine.regions == made[:2] + made[3:]

    def test_arrays_are_not_among_the_regions(self, engine):
        x = engine.zeros(LEN_BYTES, np.uint8)
        assert engine.regions == ()
        assert engine.stats().regions == 1
        del x

    def test_an_engine_leaves_no_descriptor(self, private_buffer):
        buffer = private_buffer(N_PAGES)
        fill(buffer)
        before = sorted(os.listdir("/proc/self/fd"))
        for _ in range(3):
            with ksmcore.Engine() as engine:
                engine.dedup(buffer)
            del engine
            gc.collect()
        assert sorted(os.listdir("/proc/self/fd")) == before


class TestModuleFunctions:
    """The default engine; other tests do not use it."""

    def test_register_dedup_unregister(self, private_buffer):
        a, b = private_buffer(N_PAGES), private_buffer(N_PAGES)
        fill(a)
        fill(b)
        n_regions = ksmcore.stats().regions
        region = ksmcore.register(a)
        assert ksmcore.dedup(a, b).pages_merged == 2 * N_PAGES
        assert ksmcore.stats().regions == n_regions + 2
        assert ksmcore.scan().pages_merged == 0
        ksmcore.unregister(region)
        ksmcore.unregister(b)
        assert ksmcore.stats().regions == n_regions
        a.close()
        b.close()

    def test_a_region_of_another_engine(self, engine, private_buffer):
        region = engine.register(private_buffer(4))
        ksmcore.unregister(region)
        assert region.closed

    def test_one_default_engine(self):
        assert ksmcore.default_engine() is ksmcore.default_engine()


ADVICE = {
    "dontfork": ("MADV_DONTFORK", "dc"),
    "dontdump": ("MADV_DONTDUMP", "dd"),
    "hugepage": ("MADV_HUGEPAGE", "hg"),
    "nohugepage": ("MADV_NOHUGEPAGE", "nh"),
}


class TestAdvice:
    """What the program has told the kernel about its memory still holds for merged memory."""

    def advise(self, buffer, *names):
        for name in names:
            advice = getattr(mmap, ADVICE[name][0], None)
            if advice is None:
                pytest.skip(f"this Python does not know {ADVICE[name][0]}")
            try:
                buffer.madvise(advice)
            except OSError as error:
                pytest.skip(f"{ADVICE[name][0]}: {error}")

    def flags(self, region):
        """The flags that all mappings of a region have, and those that any has."""
        found = [
            vma.flags & {code for _, code in ADVICE.values()}
            for vma in smaps.vmas_in(region.addr, region.addr + region.nbytes)
        ]
        return frozenset.intersection(*found), frozenset.union(*found)

    @pytest.mark.parametrize(
        "names",
        [(), *((name,) for name in ADVICE), ("dontfork", "dontdump", "hugepage")],
        ids=lambda names: "+".join(names) or "none",
    )
    def test_survives(self, engine, private_buffer, rng, names):
        buffer = private_buffer(64)
        self.advise(buffer, *names)
        wanted = frozenset(ADVICE[name][1] for name in names)
        pages = np.frombuffer(buffer, np.uint8).reshape(64, PAGE)
        pages[:40] = 5
        pages[40:50] = rng.integers(0, 256, (10, PAGE), dtype=np.uint8)
        region = engine.register(buffer)
        assert self.flags(region) == (wanted, wanted)
        engine.dedup()
        assert engine.stats().pages_sharing > 0
        assert self.flags(region) == (wanted, wanted)
        # A page over the store that becomes zero is mapped anew as well.
        pages[10:20] = 0
        engine.dedup()
        assert self.flags(region) == (wanted, wanted)
        region.close()
        assert self.flags(region) == (wanted, wanted)

    def test_privatized(self, engine):
        with mmap.mmap(-1, LEN_BYTES) as buffer:
            self.advise(buffer, "dontfork", "dontdump")
            fill(buffer)
            with engine.register(buffer, privatize=True) as region:
                assert self.flags(region)[0] >= {"dc", "dd"}

    def test_nothing_is_added_to_neighbours(self, engine, private_buffer):
        buffer = private_buffer(64)
        whole = np.frombuffer(buffer, np.uint8)
        fill(whole)
        region = engine.register(whole[16 * PAGE : 48 * PAGE])
        engine.dedup()
        region.close()
        for vma in smaps.vmas_in(address(whole), address(whole) + whole.nbytes):
            assert not vma.flags & {code for _, code in ADVICE.values()}


class TestArraysOfTheEngine:
    """An array made by the engine owns its last page too, full or not."""

    def test_a_last_page_that_is_not_full(self, engine):
        a, b = engine.full(2 * PAGE + 100, 7, np.uint8), engine.full(2 * PAGE + 100, 7, np.uint8)
        assert engine.dedup(a, b).pages_merged == 6
        engine.unregister(a)
        assert engine.stats().regions == 1

    def test_less_than_a_page(self, engine):
        a, b = engine.full(100, 7, np.uint8), engine.full(100, 7, np.uint8)
        assert engine.dedup(a, b).bytes_saved == PAGE
        engine.unregister(a)
        with pytest.raises(ValueError, match="already registered"):
            engine.register(b)
        assert (a == 7).all()
        assert (b == 7).all()

    def test_they_keep_their_engine(self):
        engine = ksmcore.Engine()
        array = engine.full(100 * PAGE, 7, np.uint8)
        kept = weakref.ref(engine)
        del engine
        gc.collect()
        assert kept() is not None
        assert kept().stats().regions == 1
        del array
        gc.collect()
        assert kept() is None


def test_a_part_of_another_buffer_comes_with_it(engine):
    buffer = np.zeros(64 * PAGE, np.uint8)
    engine.dedup(buffer[8 * PAGE : 16 * PAGE], buffer, buffer)
    assert engine.stats().regions == 1
    engine.unregister(buffer)


def test_an_interrupted_registration_restores_what_another_thread_merged(
    engine, rng, monkeypatch, private_buffer
):
    buffer = private_buffer(64)
    source = rng.integers(1, 256, 32 * PAGE, dtype=np.uint8).tobytes()
    buffer[:] = source + source

    def interrupted(*args: object, **kwargs: object) -> None:
        scanner = threading.Thread(target=engine.dedup)
        scanner.start()
        scanner.join()
        assert engine.stats().pages_sharing == 32
        raise KeyboardInterrupt

    monkeypatch.setattr(registrar, "Region", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.register(buffer)
    assert engine.stats().regions == 0
    assert buffer[:] == source + source
