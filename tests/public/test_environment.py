"""KSMCORE_...: defaults of settings, and KSMCORE_DISABLE, which leaves all memory alone."""

import mmap

import numpy as np
import pytest

import ksmcore
from helpers.kernels_view import store_mappings
from ksmcore import Settings


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("pages_to_scan", "123", 123),
        ("sleep_millisecs", " 5 ", 5),
        ("use_zero_pages", "0", False),
        ("use_zero_pages", "Yes", True),
        ("smart_scan", "true", True),
        ("max_shared_pages", "none", None),
        ("max_shared_pages", "77", 77),
        ("max_page_sharing", "auto", "auto"),
        ("max_page_sharing", "256", 256),
        ("target_scan_time", "1.5", 1.5),
        ("target_scan_time", "None", None),
        ("max_cpu", "10", 10.0),
        ("order", "content", "content"),
        ("dirty", "checksum", "checksum"),
    ],
)
def test_defaults(monkeypatch, name, text, value):
    monkeypatch.setenv(f"KSMCORE_{name.upper()}", text)
    with ksmcore.Engine() as engine:
        assert getattr(engine.settings, name) == value
        assert type(getattr(engine.settings, name)) is type(value)


def test_what_is_given_goes_first(monkeypatch):
    monkeypatch.setenv("KSMCORE_PAGES_TO_SCAN", "1")
    with ksmcore.Engine(pages_to_scan=2) as engine:
        assert engine.settings.pages_to_scan == 2
    assert Settings().pages_to_scan == 4096  # only engines look there


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("pages_to_scan", "many"),
        ("pages_to_scan", "0"),
        ("smart_scan", "maybe"),
        ("use_zero_pages", "2"),
        ("max_cpu", "none"),
        ("run", "3"),
        ("order", "bytes"),
    ],
)
def test_a_wrong_value_names_the_variable(monkeypatch, name, text):
    monkeypatch.setenv(f"KSMCORE_{name.upper()}", text)
    with pytest.raises(ValueError, match=f"KSMCORE_{name.upper()}='{text}': {name}"):
        ksmcore.Engine()


def test_empty_means_not_set(monkeypatch):
    monkeypatch.setenv("KSMCORE_PAGES_TO_SCAN", "")
    with ksmcore.Engine() as engine:
        assert engine.settings.pages_to_scan == 4096


def test_run_starts_the_scanner(monkeypatch):
    monkeypatch.setenv("KSMCORE_RUN", "1")
    with ksmcore.Engine() as engine:
        assert engine.scanning


def test_disabled(monkeypatch, private_buffer):
    monkeypatch.setenv("KSMCORE_DISABLE", "1")
    before = len(store_mappings())
    with ksmcore.Engine() as engine:
        buffers = [private_buffer(8), private_buffer(8), mmap.mmap(-1, 8 * mmap.PAGESIZE)]
        for buffer in buffers:
            np.frombuffer(buffer, np.uint8)[:] = 7
        regions = [engine.register(buffer) for buffer in buffers[:2]]
        regions.append(engine.register(buffers[2], privatize=True))
        array = engine.full((8, mmap.PAGESIZE), 7, np.uint8)
        assert engine.dedup(*buffers, array).bytes_saved == 0
        with engine.start(sleep_millisecs=0):
            assert engine.scan().pages_scanned == 0
        with engine.hold(buffers[0]), regions[1].hold():
            assert engine.stats().regions == 0
        engine.unregister(buffers[0])
        assert regions[0].closed
        assert not regions[1].closed
        engine.unregister(regions[1])
        engine.unregister(array)
        assert len(store_mappings()) == before
        assert (array == 7).all()
        with engine.area() as area:
            area.register(buffers[0])
        assert engine.regions == (regions[2],)
        # Still errors of the caller.
        with pytest.raises(TypeError):
            engine.register(object())
    assert regions[2].closed
