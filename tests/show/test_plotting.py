"""ksmcore.plot: what is drawn, and that nothing else of matplotlib is touched."""

import io
import sys

import numpy as np
import pytest

import ksmcore
from helpers.memory import PAGE
from helpers.pictures import n_pixels, pixels
from helpers.processes import run_python
from ksmcore import PageState
from ksmcore._show.page_maps import LOOKS

pytest.importorskip("matplotlib")


@pytest.fixture
def arrays(engine):
    made = [engine.empty((n, PAGE), np.uint8) for n in (12, 10, 8, 6, 4)]
    for array in made:
        array[:] = np.arange(len(array), dtype=np.uint8)[:, None] // 2 + 1
    engine.dedup()
    return made


def drawing(figure):
    """As a file, pixel by pixel."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=80)
    return pixels(file.getvalue())


def titles(figure):
    return [axes.get_title("left") for axes in figure.axes]


def test_a_region(engine, private_buffer, rng):
    memory = private_buffer(100)
    rows = np.frombuffer(memory, np.uint8).reshape(100, PAGE)
    rows[:40] = 7
    rows[40:70] = rng.integers(0, 256, (30, PAGE), dtype=np.uint8)
    region = engine.register(memory)
    engine.scan()
    engine.scan()
    figure = ksmcore.plot(region)
    (axes,) = figure.axes
    (image,) = axes.images
    drawn = np.asarray(image.get_array()).ravel()
    assert np.array_equal(drawn[:100], region.page_map())
    assert axes.get_xlabel().startswith(f"one cell is one page ({PAGE / 1024:.1f} KiB); ")
    assert "100 pages" in axes.get_title("left")
    (legend,) = figure.legends
    texts = [text.get_text() for text in legend.get_texts()]
    assert texts[:3] == ["shared 40", "zero 0", "unique 30"]
    shown = drawing(figure)
    shared, unique = (
        n_pixels(shown, LOOKS[s].colour) for s in (PageState.SHARED, PageState.UNIQUE)
    )
    assert unique > 1000
    assert shared / unique == pytest.approx(40 / 30, rel=0.1)


def test_an_engine(engine, arrays):
    figure = ksmcore.plot(engine, most_regions=2)
    savings, *maps = figure.axes
    assert "in 5 regions" in figure.get_suptitle()
    assert [title.partition(", ")[2].partition(" pages")[0] for title in titles(figure)[1:]] == [
        "12",
        "10",
        "end to end, 18",
    ]
    assert sum((np.asarray(axes.images[0].get_array()) < 6).sum() for axes in maps) == 40
    assert savings.collections[0].get_label() == "in use"
    shown = drawing(figure)
    top = shown[: len(shown) // 3]
    assert n_pixels(top, "#0f69b5") > 100  # one moment, and still it is seen
    assert len(ksmcore.plot(engine).axes) == 6


def test_savings_over_time(engine, arrays):
    for array in arrays:
        array[:] = 1
        engine.dedup()
    (savings, *_) = ksmcore.plot(engine).axes
    used, saved = (band.get_paths()[0].vertices for band in savings.collections)
    history = engine.history
    assert used[:, 1].max() == max(one.pages_used for one in history) * PAGE
    assert saved[:, 1].max() == max(one.pages_used + one.pages_saved for one in history) * PAGE
    assert savings.get_xlim()[1] >= history[-1].seconds
    assert savings.yaxis.get_major_formatter().seq[-1].endswith("KiB")


def test_before_the_first_pass_and_with_nothing_registered(engine):
    figure = ksmcore.plot(engine)
    (savings,) = figure.axes
    assert [text.get_text() for text in savings.texts] == ["no pass has ended yet"]
    drawing(figure)
    engine.scan()
    drawing(ksmcore.plot(engine))


def test_a_notebook_shows_it(engine, arrays):
    assert ksmcore.plot(engine)._repr_png_().startswith(b"\x89PNG")


def test_wrong_calls(engine):
    with pytest.raises(TypeError, match="integer"):
        ksmcore.plot(engine, most_regions="a")
    with pytest.raises(TypeError, match="not int"):
        ksmcore.plot(3)
    with pytest.raises(ValueError, match="most_regions"):
        ksmcore.plot(engine, most_regions=-1)
    engine.close()
    with pytest.raises(ValueError, match="closed"):
        ksmcore.plot(engine)


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(sys.modules, "ksmcore._show.plotting", raising=False)
    monkeypatch.delattr(ksmcore._show, "plotting", raising=False)
    with pytest.raises(ImportError, match=r"pip install 'ksmcore\[plot\]'"):
        ksmcore.plot()


def test_the_rest_of_matplotlib_is_left_alone(tmp_path):
    code = (
        "import sys, matplotlib, ksmcore\n"
        # As it is stored: asking for the backend would choose one.
        "before = dict(dict.items(matplotlib.rcParams))\n"
        "ksmcore.array([1.0] * 100_000)\n"
        "ksmcore.dedup()\n"
        "ksmcore.plot().savefig(sys.argv[1])\n"
        "after = dict(dict.items(matplotlib.rcParams))\n"
        "assert after == before\n"
        "assert after['backend'] is before['backend']\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    file = tmp_path / "plot.png"
    done = run_python(code, flags=(), arguments=[file])
    assert done.returncode == 0, done.stderr
    assert file.read_bytes().startswith(b"\x89PNG")
