"""The HTML report and what a notebook shows, looked at in a real browser.

KSMCORE_BROWSER names another browser than the first Chromium in PATH. Playwright drives it.
"""

import os
import shutil

import numpy as np
import pytest

import ksmcore
from helpers.memory import PAGE
from helpers.pictures import n_pixels, pixels
from ksmcore import PageState
from ksmcore._show.charts import SAVED_COLOUR, USED_COLOUR
from ksmcore._show.page_maps import LOOKS, rgb

NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome", "chrome")
WIDTHS = (360, 1280)

# Of each visible text: its contrast to the ground behind it, opacity included; WCAG's formula.
CONTRASTS = """
() => {
  const parse = text => {
    const n = text.match(/[\\d.]+/g).map(Number);
    return [n[0], n[1], n[2], n.length > 3 ? n[3] : 1];
  };
  const over = (top, ground) => [0, 1, 2].map(i => top[i] * top[3] + ground[i] * (1 - top[3]));
  const luminance = colour => {
    const [r, g, b] = colour.map(v => v / 255)
      .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode, owner = node.parentElement;
    if (!node.data.trim() || !owner.checkVisibility() || owner.closest("title, desc")) continue;
    const above = [];
    for (let one = owner; one; one = one.parentElement) above.unshift(one);
    let ground = [255, 255, 255], opacity = 1;
    for (const one of above) {
      const style = getComputedStyle(one), colour = parse(style.backgroundColor);
      ground = over(colour, ground);
      opacity *= Number(style.opacity);
    }
    const style = getComputedStyle(owner);
    const ink = parse(owner.closest("svg") ? style.fill : style.color);
    const text = over([ink[0], ink[1], ink[2], ink[3] * opacity], ground);
    const [low, high] = [luminance(text), luminance(ground)].sort((a, b) => a - b);
    found.push([(high + 0.05) / (low + 0.05), node.data.trim()]);
  }
  return found;
}
"""

# What sticks out at the right, elements whose contents are clipped or folded away aside.
STICKING_OUT = """
() => [...document.body.querySelectorAll("*")]
  .filter(one => one.checkVisibility() && getComputedStyle(one).position !== "absolute"
                 && one.getBoundingClientRect().right > window.innerWidth + 0.5)
  .map(one => one.outerHTML.slice(0, 120))
"""


def found_browser():
    asked = os.environ.get("KSMCORE_BROWSER")
    for name in (asked,) if asked else NAMES:
        path = shutil.which(name)
        if path is not None:
            return path
    return None


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="the extra test has playwright")
    path = found_browser()
    if path is None:
        pytest.skip(f"no browser: KSMCORE_BROWSER, or one of {', '.join(NAMES)} in PATH")
    # Chromium's sandbox does not work for root.
    args = ["--no-sandbox"] if os.getuid() == 0 else []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=args)
        yield browser
        browser.close()


@pytest.fixture
def look(browser, tmp_path):
    """Opens HTML in a page; whatever it says on the console or asks the network for is an error."""
    opened, complaints = [], []

    def open_page(text, width=1280, scheme="light"):
        file = tmp_path / "page.html"
        file.write_text(text, encoding="utf-8")
        page = browser.new_page(
            viewport={"width": width, "height": 800}, color_scheme=scheme, java_script_enabled=True
        )
        opened.append(page)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        asked = []
        page.goto(file.as_uri())
        page.wait_for_load_state("networkidle")
        complaints.extend(
            url for url in asked if url != file.as_uri() and not url.startswith("data:")
        )
        return page

    yield open_page
    for page in opened:
        page.close()
    assert complaints == []


@pytest.fixture
def engine(engine, rng):
    """With pages of every state, a few passes, and something left out."""
    a = engine.empty((400, PAGE), np.uint8)
    a[:300] = rng.integers(0, 256, (300, PAGE), dtype=np.uint8)
    b = engine.array(a[:200])
    c = engine.zeros((100, PAGE), np.uint8)
    c[:] = 1
    c[:] = 0
    small = [engine.full((4, PAGE), n, np.uint8) for n in range(20)]
    for _ in range(3):
        engine.scan()
    a[250:280] += 1
    with engine.hold(small[0]):
        engine.scan()
    b[100:150] += 1
    engine.kept = (a, b, c, small)
    states = set(np.concatenate([one.states for one in maps_of(engine)]).tolist())
    if ksmcore.features()["pagemap"] is None:
        assert states == set(PageState)
    return engine


def maps_of(engine):
    from ksmcore._show.page_maps import engine_maps

    return engine_maps(engine, 100)


def report(engine):
    return ksmcore.html_report(
        engine,
        title="A rather long title_" + "without_any_space" * 5,
        command=["python", "/a/very/long/path" * 8 + "/train.py", "--size", "3"],
        exit_status=0,
    )


def is_drawn(locator):
    box = locator.bounding_box()
    return locator.is_visible() and box is not None and box["width"] > 4 and box["height"] > 4


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_report(engine, look, width, scheme):
    page = look(report(engine), width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(STICKING_OUT) == []
    for text in (
        "Saved now",
        "PSS",
        "Savings over time",
        "Page maps",
        "time since the engine was made",
        "Leave hold() as soon as the system call has returned.",
        "pages_sharing",
        "max_cpu",
    ):
        assert is_drawn(page.get_by_text(text, exact=True).first), text
    contrasts = page.evaluate(CONTRASTS)
    assert len(contrasts) > 150
    assert min(contrasts)[0] >= 4.5, min(contrasts)
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(int(part) for part in ground.strip("rgb()").split(","))
    assert (brightness < 150) == (scheme == "dark")


@pytest.mark.parametrize("width", WIDTHS)
def test_pictures_of_the_report(engine, look, width):
    page = look(report(engine), width)
    chart = pixels(page.locator("svg.ksm-chart").screenshot())
    area = chart.shape[0] * chart.shape[1]
    for colour in (USED_COLOUR, SAVED_COLOUR):
        assert n_pixels(chart, colour) > area / 50
    # Saved memory lies on top of what is in use.
    rows_of = [
        np.flatnonzero((chart == rgb(c)).all(axis=2).any(axis=1))
        for c in (SAVED_COLOUR, USED_COLOUR)
    ]
    assert rows_of[0].min() < rows_of[1].min()
    for image in page.locator("img").all():
        assert image.evaluate("image => image.complete && image.naturalWidth > 0")
        assert is_drawn(image)
        assert image.get_attribute("alt").startswith("Page map of ")
    maps = pixels(page.locator(".maps").screenshot())
    for state in set(PageState) - {PageState.NOT_PRESENT}:
        assert n_pixels(maps, LOOKS[state].colour) > 500


def test_cells_are_sharp(engine, look, private_buffer):
    """One image pixel becomes a square of one colour, without a blur between states."""
    region = engine.register(private_buffer(64))
    np.frombuffer(region._view(), np.uint8)[: 32 * PAGE] = 3
    engine.dedup()
    page = look(f"<body style='background:#fff'>{region._repr_html_()}")
    seen = pixels(page.locator("img").screenshot())
    shared = n_pixels(seen, LOOKS[PageState.SHARED].colour)
    colours = np.unique(seen.reshape(-1, 3), axis=0)
    assert len(colours) <= 3
    assert shared / seen[:, :, 0].size == pytest.approx(32 / 64, abs=0.15)


def test_report_of_nothing(look):
    with ksmcore.Engine() as engine:
        page = look(ksmcore.html_report(engine), 360)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert is_drawn(page.get_by_text("No pass has ended yet."))
    assert is_drawn(page.get_by_text("Nothing is registered now."))


def test_report_on_paper(engine, look):
    """Printed it is black on white, from a dark screen too, and the colours are kept."""
    page = look(report(engine), 800, "dark")
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert min(page.evaluate(CONTRASTS))[0] >= 4.5
    assert page.evaluate(STICKING_OUT) == []
    assert page.pdf(format="A4", print_background=False).startswith(b"%PDF")


@pytest.mark.parametrize("colours", ["background:#fff;color:#000", "background:#111;color:#e8e8e8"])
def test_what_a_notebook_shows(engine, look, private_buffer, colours):
    region = engine.register(private_buffer(300))
    np.frombuffer(region._view(), np.uint8)[: 100 * PAGE] = 9
    area = engine.area()
    area.register(bytearray(20 * PAGE))
    report = engine.dedup()
    shown = [
        what._repr_html_()
        for what in (
            engine,
            engine.stats(),
            region,
            region.stats(),
            report,
            engine.estimate(),
            ksmcore.memory_info(),
            area,
            engine.history,
            engine.settings,
            ksmcore.Settings(guard="mprotect", max_cpu=5),
            ksmcore.features(),
        )
    ]
    text = (
        f"<!DOCTYPE html><meta charset=utf-8><body style='{colours};width:700px'>{''.join(shown)}"
    )
    page = look(text, 800)
    assert page.evaluate(STICKING_OUT) == []
    assert min(page.evaluate(CONTRASTS))[0] >= 4.5
    for name in (
        "Engine",
        "Stats",
        "Region",
        "RegionStats",
        "PassReport",
        "Estimate",
        "MemoryInfo",
    ):
        assert is_drawn(page.get_by_text(f"ksmcore.{name}", exact=True))
    summary = page.get_by_text("all numbers").first
    hidden = page.get_by_text("page_compares", exact=True)
    assert not hidden.is_visible()
    summary.click()
    assert is_drawn(hidden)
    seen = pixels(page.locator("body").screenshot())
    for state in (PageState.SHARED, PageState.ZERO, PageState.UNIQUE):
        assert n_pixels(seen, LOOKS[state].colour) > 500
