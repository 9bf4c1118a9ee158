"""The HTML report: complete in itself, with all that it promises, in every state of an engine."""

import re

import numpy as np
import pytest

import ksmcore
from helpers.forks import THREADS_RUN, in_child
from helpers.html_reader import Reader
from helpers.memory import PAGE
from helpers.processes import run_python
from helpers.waiting import wait_until
from ksmcore._engine.counters import COST, NOW, NUMBERS, SKIPPED, WORK
from ksmcore._show.report import MOST_REGIONS


def read(text):
    first, _, rest = text.partition("\n")
    assert first == "<!DOCTYPE html>"
    assert rest.startswith('<html lang="en"><head><meta charset="utf-8">')
    assert "//" not in re.sub(r"base64,[^\"]*", "", text)
    seen = Reader(rest)
    assert seen.tags.count("h1") == seen.tags.count("main") == 1
    return seen


@pytest.fixture
def arrays(engine):
    made = [engine.empty((n, PAGE), np.uint8) for n in range(2, 32)]
    for array in made:
        array[:] = np.arange(len(array), dtype=np.uint8)[:, None] + 1
    engine.dedup()
    return made


def test_headline_and_sections(engine, arrays):
    seen = read(ksmcore.html_report(engine, title="Frames"))
    n_bytes = engine.stats().bytes_saved
    assert n_bytes == (sum(range(2, 32)) - 31) * PAGE
    assert f"{n_bytes:,} bytes" in seen.titles
    for heading in ("Frames", "Memory", "Savings over time", "Page maps", "Left out", "Counters"):
        assert heading in seen.texts
    assert "RSS counts a shared page once for every place that maps it" in seen.text
    assert "polygon" in seen.tags
    assert "time since the engine was made" in seen.texts


def test_most_regions_are_shown_together(engine, arrays):
    seen = read(ksmcore.html_report(engine))
    assert "30 regions, 495 pages, the largest first" in seen.text
    assert f"The {30 - MOST_REGIONS} smallest are shown together at the end" in seen.text
    assert seen.tags.count("img") == MOST_REGIONS + 1
    maps = [title for title in seen.titles if title.startswith("Page map of")]
    assert sum(int(re.search(r"(\d+) page", title)[1]) for title in maps) == 495
    assert maps[0].startswith("Page map of 31 pages")


def test_all_numbers_are_shown_with_their_meaning(engine):
    seen = read(ksmcore.html_report(engine))
    elsewhere = {"skipped", "seconds", "scanner_error", "guard", "dirty", "presence"}
    assert {NOW, WORK, COST} <= set(seen.texts)
    for name in set(engine.stats().as_dict()) - elsewhere:
        assert f"{name}{NUMBERS[name].sentence}" in seen.text


def test_counters_settings_and_environment(engine, arrays):
    engine.configure(max_cpu=12.5)
    seen = read(ksmcore.html_report(engine))
    stats = engine.stats()
    assert "pages_mergedTimes that a page was mapped to a shared page." in seen.text
    assert f"{stats.pages_scanned:,}" in seen.texts
    assert f"{stats.metadata_bytes:,} bytes" in seen.texts
    assert "12.5" in seen.texts
    for name in engine.settings.as_dict():
        assert name in seen.texts
    for name in ksmcore.features():
        assert f"feature {name}" in seen.texts
    assert stats.guard in seen.texts


def test_left_out_with_what_can_be_done(engine, arrays):
    assert (
        "No page that could have been merged was left out."
        in read(ksmcore.html_report(engine)).texts
    )
    with engine.hold(arrays[0]):
        engine.scan()
    seen = read(ksmcore.html_report(engine))
    assert "held" in seen.texts
    assert f"The page {SKIPPED['held'].page}." in seen.texts
    assert SKIPPED["held"].remedy in seen.texts


def test_what_comes_from_outside_is_escaped(engine):
    text = ksmcore.html_report(
        engine, title="<b>&", command=["python", "a b.py", "<script>"], exit_status=3
    )
    seen = read(text)
    assert "<b>&" in seen.texts
    assert "python 'a b.py' '<script>'" in seen.texts
    assert "exit status 3" in seen.texts
    assert "ls -l 'x" in read(ksmcore.html_report(engine, command="ls -l 'x")).texts


def test_an_error_of_the_scanner_is_told(engine, arrays):
    def fail(report):
        raise RuntimeError("<no luck>")

    engine.on_pass = fail
    engine.start(sleep_millisecs=0)
    wait_until(lambda: engine.stats().scanner_error is not None)
    assert "RuntimeError('<no luck>')" in read(ksmcore.html_report(engine)).texts
    with pytest.raises(RuntimeError, match="no luck"):
        engine.stop()


def test_a_fresh_engine_and_a_closed_one(engine, arrays):
    with ksmcore.Engine() as fresh:
        seen = read(ksmcore.html_report(fresh))
    assert "No pass has ended yet." in seen.texts
    assert "Nothing is registered now." in seen.texts
    assert "img" not in seen.tags
    saved = engine.peak_bytes_saved
    engine.close()
    closed = read(ksmcore.html_report(engine))
    assert "Nothing is registered now." in closed.texts
    assert f"{saved:,} bytes" in closed.titles  # at most


@pytest.mark.filterwarnings(THREADS_RUN)
def test_in_a_forked_child(engine, arrays):
    def work():
        assert "No pass has ended yet." in read(ksmcore.html_report(engine)).texts

    assert in_child(work) == 0


def test_no_matplotlib_is_needed():
    code = (
        "import sys, ksmcore\n"
        "sys.modules['matplotlib'] = None\n"
        "a = ksmcore.array([1.0] * 100_000)\n"
        "ksmcore.dedup()\n"
        "print(len(ksmcore.html_report(ksmcore.default_engine())))\n"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 10_000


def test_which_engine():
    assert "Page maps" in read(ksmcore.html_report()).texts  # of the default engine
    with pytest.raises(TypeError, match="not int"):
        ksmcore.html_report(5)


def test_a_command_that_is_no_text_is_written_out(engine):
    page = ksmcore.html_report(engine, title="caf\udce9", command=["python", "caf\udce9.npy"])
    assert "caf\\udce9.npy" in page.encode().decode()
