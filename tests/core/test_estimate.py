"""estimate: what dedup then really saves, and not a trace left behind."""

import contextlib
import mmap
import threading

import numpy as np
import pytest

import ksmcore
from helpers.memory import PAGE, random_pages
from ksmcore._kernel import smaps
from ksmcore._testing import hooks, pagemap


def mixture(rng, n_pages, n_contents, zero_every=0, unique_every=0):
    """Pages drawn from a pool, some of them zero, some like no other."""
    pages = rng.integers(0, 256, (n_contents, PAGE), dtype=np.uint8)[
        rng.integers(0, n_contents, n_pages)
    ]
    if zero_every:
        pages[::zero_every] = 0
    if unique_every:
        own = pages[1::unique_every]
        own[:] = rng.integers(0, 256, own.shape, dtype=np.uint8)
    return pages.reshape(-1)


MIXTURES = {
    "few contents": (400, 5),
    "some contents": (400, 150),
    "many contents": (400, 10_000),
    "with zeros": (400, 50, 3),
    "with unique pages": (400, 50, 0, 3),
    "all kinds": (400, 80, 5, 4),
    "zeros only": (400, 1, 1),
    "one page": (1, 1),
}


def counted(pages):
    """The same figures from Python's own means."""
    contents = [page.tobytes() for page in pages.reshape(-1, PAGE)]
    n_zero = contents.count(bytes(PAGE))
    return len(contents), n_zero, len(set(contents) - {bytes(PAGE)})


@pytest.fixture
def anonymous(private_buffer):
    """A copy of an array in plain private memory that begins on a page."""

    def copy(source):
        memory = np.frombuffer(private_buffer(source.nbytes // PAGE), np.uint8)
        memory[:] = source
        return memory

    return copy


class TestEqualsDedup:
    @pytest.mark.parametrize("kind", MIXTURES)
    @pytest.mark.parametrize("settings", [{}, {"checksum": "mmh3"}, {"order": "content"}], ids=str)
    def test_of_plain_memory(self, rng, anonymous, kind, settings):
        with ksmcore.Engine(**settings) as engine:
            source = mixture(rng, *MIXTURES[kind])
            a, b = anonymous(source), anonymous(source[::-1].copy())
            estimate = engine.estimate(a, b)
            report = engine.dedup(a, b)
            assert report.bytes_saved == estimate.bytes_saved
            assert report.pages_zeroed == estimate.pages_zero
            stats = engine.stats()
            assert stats.pages_sharing == estimate.pages_duplicate
            assert stats.pages_shared + stats.pages_unshared == estimate.pages_distinct

    @pytest.mark.parametrize("kind", MIXTURES)
    def test_of_arrays(self, engine, rng, kind):
        arrays = [engine.array(mixture(rng, *MIXTURES[kind])) for _ in range(2)]
        estimate = engine.estimate(*arrays)
        assert engine.dedup().bytes_saved == estimate.bytes_saved

    @pytest.mark.parametrize("kind", MIXTURES)
    def test_equals_a_count_in_python(self, engine, rng, anonymous, kind):
        source = mixture(rng, *MIXTURES[kind])
        estimate = engine.estimate(anonymous(source))
        assert (estimate.pages, estimate.pages_zero, estimate.pages_distinct) == counted(source)
        assert estimate.pages_present == estimate.pages

    def test_a_stretch_costs_a_small_block_of_copies(self, engine, anonymous):
        memory = anonymous(np.full(1600 * PAGE, 7, np.uint8))
        estimate = engine.estimate(memory)
        assert estimate.pages_duplicate == 1599
        report = engine.dedup(memory)
        assert 0.98 * estimate.bytes_saved <= report.bytes_saved <= estimate.bytes_saved

    def test_pages_that_differ_in_the_last_byte(self, engine, anonymous):
        pages = np.full((100, PAGE), 7, np.uint8)
        pages[:, -1] = np.arange(100) // 2
        estimate = engine.estimate(anonymous(pages.reshape(-1)))
        assert estimate.pages_distinct == 50

    def test_after_merging_it_counts_the_same(self, engine, rng, anonymous):
        memory = anonymous(mixture(rng, 400, 80, 0, 4))
        before = engine.estimate(memory)
        engine.dedup(memory)
        assert int(memory[::PAGE].sum(dtype=np.uint64))  # makes all pages present
        assert engine.estimate(memory) == before


class TestChangesNothing:
    def traces(self, engine, arrays):
        found = []
        for array in arrays:
            start, end = array.ctypes.data, array.ctypes.data + array.nbytes
            mappings = [(v.path, v.flags, v.writable, v.shared) for v in smaps.vmas_in(start, end)]
            found.append((mappings, pagemap.query(start, array.nbytes // PAGE), end))
        return found, engine.stats(), engine.regions

    def test_plain_memory(self, engine, rng, anonymous):
        arrays = [anonymous(mixture(rng, 200, 50, 5, 5)) for _ in range(2)]
        before = self.traces(engine, arrays)
        engine.estimate(*arrays)
        assert self.traces(engine, arrays) == before
        assert engine.stats().regions == 0

    def test_registered_and_merged(self, engine, rng):
        arrays = [engine.array(mixture(rng, 200, 50, 5, 5)) for _ in range(2)]
        engine.dedup(arrays[0])
        before = self.traces(engine, arrays)
        engine.estimate(*arrays)
        assert self.traces(engine, arrays) == before

    def test_the_buffer_is_let_go(self, engine, private_buffer):
        buffer = private_buffer(10)
        engine.estimate(buffer)
        buffer.close()
        growing = bytearray(10 * PAGE)
        engine.estimate(growing)
        growing.append(0)

    def test_no_handler_and_no_store(self, engine, anonymous):
        memory = anonymous(np.full(100 * PAGE, 7, np.uint8))
        engine.estimate(memory)
        assert engine._core.store_fd == -1
        assert not hooks.handler_installed()


def test_buffers_that_are_closed_meanwhile(engine, private_buffer):
    """Whoever closes a region meanwhile unmaps nothing under the reader."""
    for _ in range(5):
        buffer = private_buffer(5000)
        np.frombuffer(buffer, np.uint8)[::PAGE] = 1
        region = engine.register(buffer)
        reading = threading.Event()
        errors = []

        def estimate(reading=reading, errors=errors):
            try:
                engine.estimate(progress=lambda done, n_pages: reading.set())
            except ValueError:
                pass  # it was closed before it could be held
            except BaseException as error:
                errors.append(error)
            finally:
                reading.set()

        thread = threading.Thread(target=estimate)
        thread.start()
        reading.wait()
        region.close()
        del region
        with contextlib.suppress(BufferError):
            buffer.close()
        thread.join()
        assert errors == []


class TestUntouched:
    def test_nothing_is_faulted_in(self, engine, private_buffer):
        memory = np.frombuffer(private_buffer(200), np.uint8)
        memory[50 * PAGE : 60 * PAGE] = 7
        present = pagemap.query(memory.ctypes.data, 200)
        estimate = engine.estimate(memory)
        assert (estimate.pages, estimate.pages_distinct) == (200, 1)
        assert estimate.pages_present >= 10
        assert pagemap.query(memory.ctypes.data, 200) == present

    def test_an_empty_array(self, engine):
        array = engine.empty(500 * PAGE, np.uint8)
        estimate = engine.estimate(array)
        assert (estimate.pages, estimate.pages_present, estimate.bytes_saved) == (500, 0, 0)
        assert not any(pagemap.query(array.ctypes.data, 500))

    def test_pages_that_were_only_read(self, engine, private_buffer):
        """They are the kernel's own zero page, which takes no memory."""
        if ksmcore.features()["pagemap"] is not None:
            pytest.skip("the kernel does not tell")
        buffer = private_buffer(200)
        buffer.madvise(getattr(mmap, "MADV_NOHUGEPAGE", 15))
        assert not np.frombuffer(buffer, np.uint8).any()
        assert engine.estimate(buffer).bytes_saved == 0


class TestBuffers:
    def test_overlapping_ones_count_once(self, engine, rng, anonymous):
        memory = anonymous(mixture(rng, 100, 20))
        alone = engine.estimate(memory)
        assert engine.estimate(memory, memory) == alone
        assert engine.estimate(memory, memory[10 * PAGE : 20 * PAGE]) == alone
        assert engine.estimate(memory[: 60 * PAGE], memory[40 * PAGE :]) == alone
        assert engine.estimate(memory[40 * PAGE :], memory[: 60 * PAGE], memory) == alone

    def test_overlapping_registered_ones(self, engine, rng, anonymous):
        memory = anonymous(mixture(rng, 100, 20))
        alone = engine.estimate(memory)
        region = engine.register(memory)
        assert engine.estimate(memory, region, memory[10 * PAGE :]) == alone

    def test_a_region(self, engine, rng, anonymous):
        region = engine.register(anonymous(mixture(rng, 100, 20)))
        estimate = engine.estimate(region)
        assert estimate.pages == 100
        assert engine.dedup(region).bytes_saved == estimate.bytes_saved

    def test_a_region_and_a_stranger(self, engine, rng, anonymous):
        source = random_pages(rng, 100)
        region, stranger = engine.register(anonymous(source)), anonymous(source)
        assert engine.estimate(region, stranger).pages_duplicate == 100
        assert engine.stats().regions == 1

    def test_a_region_of_another_engine(self, engine, rng, anonymous):
        with ksmcore.Engine() as other:
            region = other.register(anonymous(mixture(rng, 100, 20)))
            with pytest.raises(ValueError, match="another engine"):
                engine.estimate(region)

    def test_only_whole_pages(self, engine, anonymous):
        memory = anonymous(np.full(20 * PAGE, 7, np.uint8))
        assert engine.estimate(memory[1:]).pages == 19
        assert engine.estimate(memory[1:-1]).pages == 18
        with pytest.raises(ValueError, match="no whole page"):
            engine.estimate(memory[1:PAGE])

    def test_of_all_regions(self, engine, rng, anonymous):
        for _ in range(3):
            engine.register(anonymous(mixture(rng, 100, 20)))
        estimate = engine.estimate()
        assert estimate.pages == 300
        assert engine.dedup().bytes_saved == estimate.bytes_saved

    def test_of_all_arrays(self, engine, rng):
        arrays = [engine.array(mixture(rng, 100, 20)) for _ in range(3)]
        assert engine.estimate().pages == 300
        del arrays

    def test_of_nothing(self, engine):
        estimate = engine.estimate()
        assert (estimate.pages, estimate.bytes_saved) == (0, 0)

    def test_more_than_a_batch(self, engine):
        array = engine.zeros((10_000, PAGE), np.uint8)
        array[:, 0] = 1
        estimate = engine.estimate(array)
        assert (estimate.pages_present, estimate.pages_distinct) == (10_000, 1)

    def test_arithmetic(self, engine, rng):
        estimate = engine.estimate(engine.array(mixture(rng, 300, 40, 5, 6)))
        assert estimate.page_bytes == PAGE
        assert estimate.pages_duplicate == (
            estimate.pages_present - estimate.pages_zero - estimate.pages_distinct
        )
        assert estimate.bytes_saved == (estimate.pages_duplicate + estimate.pages_zero) * PAGE

    def test_module_function(self, anonymous):
        assert ksmcore.estimate(anonymous(np.full(20 * PAGE, 7, np.uint8))).pages_duplicate == 19
