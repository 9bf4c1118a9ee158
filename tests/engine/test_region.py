"""Regions: their buffer cannot vanish, keeps its advice, and is plain memory in the end."""

import gc
import mmap
import os

import numpy as np
import pytest

import ksmcore
from helpers.kernels_view import is_plain, store_bytes
from helpers.memory import PAGE, address, fill
from helpers.processes import run_python
from ksmcore._kernel import smaps

N_PAGES = 24
LEN_BYTES = N_PAGES * PAGE


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
        done = run_python(
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
        assert (done.returncode, done.stdout, done.stderr) == (
            0,
            "True {''} 0 True {107} 128\n",
            "",
        )

    def test_at_exit_of_the_default_engine(self):
        done = run_python(
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
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == "{''}\n"


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
