"""What a notebook shows: well-formed pieces that stand alone, with exact numbers, escaped."""

import re
from dataclasses import replace

import numpy as np
import pytest

import ksmcore
from helpers.html_reader import Reader
from helpers.memory import PAGE
from ksmcore._engine.history import Sample
from ksmcore._show.charts import Point, byte_ticks, savings_points, savings_svg, time_ticks

KIB, MIB, GIB = 1024, 1024**2, 1024**3


@pytest.fixture
def region(engine, private_buffer, rng):
    """100 pages: 20 shared, 30 zero, 10 unique, 40 not present."""
    memory = private_buffer(100)
    rows = np.frombuffer(memory, np.uint8).reshape(100, PAGE)
    rows[:20] = np.arange(20, dtype=np.uint8)[:, None] // 4 + 1
    rows[20:50] = 1
    rows[20:50] = 0
    rows[50:60] = rng.integers(0, 256, (10, PAGE), dtype=np.uint8)
    region = engine.register(memory)
    engine.scan()
    engine.scan()
    return region


def test_region(region):
    seen = Reader(region._repr_html_())
    assert f"at {region.addr:#x}, 100 pages, {100 * PAGE // KIB:.1f} KiB" in seen.text
    region.name = "<frames>"
    assert "<frames>, 100 pages" in Reader(region._repr_html_()).text
    assert f"shared 20 {20 * PAGE // KIB:.1f} KiB" in seen.text
    assert f"{100 * PAGE:,} bytes" in seen.titles
    (alt,) = [title for title in seen.titles if title.startswith("Page map of 100 pages")]
    assert alt.endswith(": 20 shared, 30 zero, 10 unique, 40 not present")
    region.close()
    assert "not registered" in Reader(region._repr_html_()).text


def test_engine_and_stats(engine, region):
    saved = 45 * PAGE
    for what in (engine, engine.stats()):
        seen = Reader(what._repr_html_())
        assert f"ksmcore.{type(what).__name__} {saved / KIB:.1f} KiB saved" in seen.text
        assert f"{saved:,} bytes" in seen.titles
        assert any(
            title.startswith(f"shared: 20 pages, {20 * PAGE:,} bytes") for title in seen.titles
        )
    assert "1 region, scanner not running" in Reader(engine._repr_html_()).text
    assert "polygon" in seen.tags or "polygon" in Reader(engine._repr_html_()).tags
    engine.close()
    assert Reader(engine._repr_html_()).text == "ksmcore.Engine closed"


def test_area(engine, region, private_buffer):
    with engine.area() as area:
        memory = private_buffer(10)
        memory.write(b"x" * len(memory))
        made = area.register(memory)
        engine.dedup()
        seen = Reader(area._repr_html_())
        assert "1 region; its share of what is saved" in seen.text
        assert f"{made.addr:#x}" in seen.text
    assert Reader(area._repr_html_()).text == "ksmcore.Area closed"


def test_history(engine, region):
    seen = Reader(engine.history._repr_html_())
    assert "2 samples" in seen.text
    assert f"{45 * PAGE / KIB:.1f} KiB saved" in seen.text
    assert "polygon" in seen.tags
    with ksmcore.Engine() as fresh:
        assert Reader(fresh.history._repr_html_()).text == "ksmcore.History 0 samples"


def test_settings():
    assert "all as by default" in Reader(ksmcore.Settings()._repr_html_()).text
    seen = Reader(ksmcore.Settings(pages_to_scan=77)._repr_html_())
    assert "ksmcore.Settings pages_to_scan 77" in seen.text
    assert "sleep_millisecs20" in seen.text


def test_features():
    found = ksmcore.features()
    n_there = list(found.values()).count(None)
    seen = Reader(found._repr_html_())
    assert f"{n_there} of {len(found)} can be used here" in seen.text
    assert all(name in seen.text for name in found)


def test_region_stats(region):
    seen = Reader(region.stats()._repr_html_())
    assert f"saved: {45 * PAGE / KIB:.1f} KiB of {100 * PAGE / KIB:.1f} KiB" in seen.text
    assert "no record 40" in seen.text
    empty = Reader(ksmcore.RegionStats()._repr_html_())
    assert "saved: 0 B of 0 B" in empty.text


def test_pass_report(engine, region):
    np.frombuffer(region._view(), np.uint8)[:PAGE] = 77
    report = replace(engine.scan(), skipped={"held": 3, "away": 0})
    seen = Reader(report._repr_html_())
    assert report.bytes_saved == -PAGE
    assert f"{PAGE / KIB:.1f} KiB more in use than before" in seen.text
    assert "1 written since they were shared, 3 left out" in seen.text
    assert "held3" in seen.text
    assert "away" not in seen.text


def test_estimate(engine, private_buffer):
    memory = private_buffer(10)
    np.frombuffer(memory, np.uint8).reshape(10, PAGE)[:6] = 5
    seen = Reader(engine.estimate(memory)._repr_html_())
    assert f"{5 * PAGE / KIB:.1f} KiB of {6 * PAGE / KIB:.1f} KiB could be saved" in seen.text
    assert "duplicate 5" in seen.text
    assert "not present 4" in seen.text


def test_memory_info():
    seen = Reader(ksmcore.MemoryInfo(rss=3 * MIB, pss=2 * MIB, saved=5 * MIB)._repr_html_())
    assert "PSS 2.0 MiB, RSS 3.0 MiB, saved 5.0 MiB" in seen.text
    assert "merging lowers PSS, not RSS" in seen.text
    negative = Reader(ksmcore.MemoryInfo(rss=3, pss=2, saved=-4096)._repr_html_())
    assert "saved -4.0 KiB" in negative.text


def test_what_comes_from_outside_is_escaped(engine):
    stats = replace(engine.stats(), scanner_error="RuntimeError('<script>alert(1)</script>')")
    assert "<script>alert(1)</script>" in Reader(stats._repr_html_()).text


# ---- the chart ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("most", "expected"),
    [
        (1, ["0", "1 B"]),
        (900, ["0", "500 B"]),
        (4 * KIB, ["0", "1 KiB", "2 KiB", "3 KiB", "4 KiB"]),
        (138 * MIB, ["0", "50 MiB", "100 MiB"]),
        (1023 * MIB, ["0", "500 MiB", "1,000 MiB"]),
        (10 * GIB, ["0", "5 GiB", "10 GiB"]),
        (5000 * 1024 * GIB, ["0", "2,000 TiB", "4,000 TiB"]),
    ],
)
def test_byte_ticks(most, expected):
    ticks = byte_ticks(most)
    assert [text for _, text in ticks] == expected
    assert all(0 <= value <= most for value, _ in ticks)


@pytest.mark.parametrize(
    ("most", "expected"),
    [
        (0.0007, ["0", "0.2 ms", "0.4 ms", "0.6 ms"]),
        (0.5, ["0", "100 ms", "200 ms", "300 ms", "400 ms", "500 ms"]),
        (1.8, ["0", "0.5 s", "1 s", "1.5 s"]),
        (70, ["0", "15 s", "30 s", "45 s", "60 s"]),
        (1000, ["0", "5 min", "10 min", "15 min"]),
        (4 * 3600, ["0", "1 h", "2 h", "3 h", "4 h"]),
        (40 * 86400, ["0", "10 d", "20 d", "30 d", "40 d"]),
    ],
)
def test_time_ticks(most, expected):
    ticks = time_ticks(most)
    assert [text for _, text in ticks] == expected
    assert all(0 <= value <= most for value, _ in ticks)


def test_chart(engine):
    points = [Point(0.0, 4 * MIB, 0), Point(2.0, MIB, 3 * MIB), Point(4.0, MIB, 3 * MIB)]
    text = savings_svg(points)
    seen = Reader(text)
    for label in ("2 MiB", "4 MiB", "1 s", "4 s", "time since the engine was made"):
        assert label in seen.texts
    assert "3.0 MiB saved and 1.0 MiB in use at the end" in seen.text
    corners = [
        [tuple(map(float, corner.split(","))) for corner in listed.split()]
        for listed in re.findall(r'points="([^"]+)"', text)
    ]
    used, saved = corners
    assert used[0] == saved[0] == (0.0, pytest.approx(1000 - 1000 / 1.04, abs=0.1))
    assert used[2] == (1000.0, pytest.approx(1000 - 250 / 1.04, abs=0.1))
    assert saved[2] == (1000.0, pytest.approx(1000 - 1000 / 1.04, abs=0.1))


def test_one_moment_is_seen_too():
    assert savings_svg([Point(3.0, MIB, MIB)]).count('stroke-width="8"') == 2
    Reader(savings_svg([Point(0.0, 0, 0)]))


def test_of_a_long_history_the_extremes_are_drawn(engine):
    engine._parts.passes._made_at -= 4
    for n in range(3000):
        engine.history.add(Sample(n * 0.001, n * PAGE, 1, 10_000 if n == 1717 else n % 5, 1, 1, 0))
    points = savings_points(engine)
    assert len(points) <= 4 * 400 + 4
    assert max(point.saved_bytes for point in points) == 10_000 * PAGE
    assert points == sorted(points)
    assert points[0].seconds == 0
    assert points[-1].saved_bytes == 0  # this moment
