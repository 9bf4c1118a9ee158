"""Registration: what is taken and refused, what is never touched, and what ends it."""

import array
import ctypes
import mmap
import threading
import warnings

import numpy as np
import pytest

import ksmcore
from helpers.forks import THREADS_RUN, in_child
from helpers.kernels_view import is_plain, store_bytes
from helpers.memory import PAGE, PRIVATE, address, fill, octets, private_memory, random_pages
from ksmcore._engine import registrar

N_PAGES = 24
LEN_BYTES = N_PAGES * PAGE


KINDS = {
    "mmap": lambda: private_memory(N_PAGES),
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
    yield "read-only", mmap.mmap(-1, LEN_BYTES, PRIVATE, mmap.PROT_READ), ValueError
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

    @pytest.mark.filterwarnings(THREADS_RUN)
    @pytest.mark.parametrize("privatize", [False, True])
    def test_what_a_child_writes(self, engine, private_buffer, privatize):
        with mmap.mmap(-1, LEN_BYTES) as buffer:
            fill(buffer, 1)
            if privatize:
                engine.register(buffer, privatize=True)
                engine.dedup()

            def write():
                buffer[:] = b"c" * LEN_BYTES
                assert buffer[:] == b"c" * LEN_BYTES

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


def aligned_view(private_buffer, n_pages, offset=0):
    """An array of n_pages pages that begins `offset` bytes into a page."""
    memory = private_buffer(n_pages + 2)
    return np.frombuffer(memory, np.uint8)[PAGE + offset :][: n_pages * PAGE]


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


def test_a_part_of_another_buffer_comes_with_it(engine):
    buffer = np.zeros(64 * PAGE, np.uint8)
    engine.dedup(buffer[8 * PAGE : 16 * PAGE], buffer, buffer)
    assert engine.stats().regions == 1
    engine.unregister(buffer)


def test_an_interrupted_registration_restores_what_another_thread_merged(
    engine, rng, monkeypatch, private_buffer
):
    buffer = private_buffer(64)
    source = random_pages(rng, 32).tobytes()
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
