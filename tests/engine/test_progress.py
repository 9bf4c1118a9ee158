"""Progress of a pass: a bar, a line, or a callback."""

import builtins
import gc

import numpy as np
import pytest

import ksmcore
from helpers.memory import PAGE
from ksmcore._engine.passes import BATCH_PAGES
from ksmcore._engine.progress import reporting
from ksmcore._testing import hooks

N_PAGES = 3 * BATCH_PAGES + 5


@pytest.fixture(params=["scan", "dedup", "estimate"])
def do(request, engine):
    """One of the three calls over N_PAGES registered pages, in two regions."""
    arrays = [engine.zeros(n * PAGE, np.uint8) for n in (N_PAGES - 100, 100)]
    for array in arrays:
        array[::PAGE] = 1
    call = getattr(engine, request.param)
    if request.param == "estimate":
        return lambda progress: call(*arrays, progress=progress)
    # The arrays live as long as the function.
    return lambda progress, arrays=arrays: call(progress=progress)


@pytest.fixture
def without_tqdm(monkeypatch):
    real_import = builtins.__import__

    def no_tqdm(name, *rest, **more):
        if name.partition(".")[0] == "tqdm":
            raise ImportError(name)
        return real_import(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", no_tqdm)


class TestCallback:
    def test_from_nothing_to_all(self, do):
        told = []
        do(lambda done, n_pages: told.append((done, n_pages)))
        assert told[0] == (0, N_PAGES)
        assert told[-1] == (N_PAGES, N_PAGES)
        assert {n_pages for _, n_pages in told} == {N_PAGES}

    def test_batch_by_batch(self, do):
        told = []
        do(lambda done, n_pages: told.append(done))
        assert told == sorted(told)
        assert len(set(told)) >= 4

    def test_a_callback_may_be_any_callable(self, do):
        class Count:
            n = 0

            def __call__(self, done, n_pages):
                self.n += 1

        count = Count()
        do(count)
        assert count.n >= 4

    @pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
    def test_an_error_ends_the_pass(self, do, engine, error):
        def stop(done, n_pages):
            if done:
                raise error

        with pytest.raises(error):
            do(stop)
        # THEN the engine is as able as before
        engine._core.check()
        assert not hooks.handler_installed()
        do(None)

    def test_it_may_ask_the_engine(self, do, engine):
        seen = []
        do(lambda done, n_pages: seen.append(engine.stats().regions))
        assert set(seen) == {2}

    def test_it_may_make_and_drop_arrays(self, do, engine):
        kept = []

        def churn(done, n_pages):
            kept.append(engine.full(5 * PAGE, 7, np.uint8))
            if len(kept) > 1:
                kept.pop(0)

        do(churn)
        assert (kept[0] == 7).all()

    @pytest.mark.parametrize("call", ["scan", "dedup", "close"])
    def test_it_cannot_begin_or_end_what_is_in_progress(self, engine, call):
        """An error instead of waiting for oneself."""
        array = engine.full(20 * PAGE, 7, np.uint8)
        with pytest.raises(RuntimeError, match="middle of a pass"):
            engine.scan(progress=lambda done, n_pages: getattr(engine, call)())
        assert not engine.closed
        assert engine.dedup(array).pages_merged == 20

    def test_with_nothing_registered(self, engine):
        for call in (engine.scan, engine.dedup, engine.estimate):
            told = []
            call(progress=lambda done, n_pages, told=told: told.append((done, n_pages)))
            assert set(told) == {(0, 0)}

    def test_overlapping_buffers_count_once(self, engine):
        array = engine.full(100 * PAGE, 7, np.uint8)
        told = []
        engine.estimate(array, array[: 50 * PAGE], progress=lambda done, n: told.append((done, n)))
        assert told[0] == (0, 100)
        assert told[-1] == (100, 100)

    def test_module_functions(self):
        array = ksmcore.full(20 * PAGE, 7, np.uint8)
        for call in (ksmcore.scan, ksmcore.dedup):
            told = []
            call(progress=lambda done, n_pages, told=told: told.append(done))
            assert told[-1] >= 20
        told = []
        ksmcore.estimate(array, progress=lambda done, n_pages: told.append(done))
        assert told[-1] == 20
        del array
        gc.collect()


class TestBar:
    def test_tqdm(self, do, capsys):
        pytest.importorskip("tqdm")
        do(True)
        out, err = capsys.readouterr()
        assert out == ""
        assert "ksmcore" in err
        assert "100%" in err

    def test_a_line_without_tqdm(self, do, capsys, without_tqdm):
        do(True)
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("ksmcore ")
        assert err.endswith(f"{N_PAGES:,} pages done\n")
        assert err.count("\n") == 1

    def test_no_line_after_an_error(self, capsys, without_tqdm):
        with pytest.raises(KeyError), reporting(True, "test", 10):
            raise KeyError
        assert capsys.readouterr().err == ""


@pytest.mark.parametrize("progress", [None, False])
def test_silent(do, capsys, progress):
    do(progress)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("progress", [1, 0, "bar", [], 0.5])
def test_wrong_type(do, engine, progress):
    with pytest.raises(TypeError, match="progress must be"):
        do(progress)
    assert engine.stats().pages_scanned == 0
    assert not hooks.handler_installed()
    do(None)
