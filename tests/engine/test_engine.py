"""The life of engines, their arrays, and the one behind the functions of the module."""

import gc
import weakref

import numpy as np
import pytest

import ksmcore
from helpers.kernels_view import descriptors, is_plain
from helpers.memory import PAGE, fill
from helpers.processes import run_python

N_PAGES = 24
LEN_BYTES = N_PAGES * PAGE


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
        done = run_python(
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
        assert (done.returncode, done.stdout) == (0, "{''} {107}\n")
        assert "never closed" in done.stderr

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
        before = descriptors()
        for _ in range(3):
            with ksmcore.Engine() as engine:
                engine.dedup(buffer)
            del engine
            gc.collect()
        assert descriptors() == before


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

    def test_one_default_engine_for_threads_that_ask_at_a_time(self):
        done = run_python(
            """
            import threading
            import ksmcore
            barrier, found = threading.Barrier(8), []

            def ask():
                barrier.wait()
                found.append(ksmcore.default_engine())

            threads = [threading.Thread(target=ask) for _ in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert len(found) == 8 and len(set(map(id, found))) == 1
            from ksmcore._engine import all_engines
            assert [one for one in list(all_engines._open) if not one.closed] == found[:1]
            """
        )
        assert done.returncode == 0, done.stderr

    def test_one_default_engine_for_a_handler_in_the_midst_of_the_first_call(self):
        done = run_python(
            """
            import ksmcore
            from ksmcore._engine import engine as engines
            from ksmcore._engine.settings import Settings
            made, found = Settings.made, []

            def interrupted(**settings):
                engines.Settings.made = made
                found.append(ksmcore.default_engine())
                return made(**settings)

            engines.Settings.made = interrupted
            first = ksmcore.default_engine()
            assert found == [first] and first is ksmcore.default_engine() and not first.closed
            """
        )
        assert done.returncode == 0, done.stderr

    def test_what_outlives_the_names_of_its_module_ends_without_a_word(self, monkeypatch):
        """As the interpreter's end has it, now and then."""
        engine = ksmcore.Engine()
        for name in ("sys", "warnings", "contextlib"):
            monkeypatch.setattr(f"ksmcore._engine.engine.{name}", None)
        engine.__del__(is_finalizing=lambda: True)
        engine.__del__()  # where nothing is registered
        monkeypatch.undo()
        engine.close()


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
