"""The undo history of an image editor: the whole picture is copied before every step, at the price
of the pixels that the step changes.

Editors keep what changed, tile by tile, or undo by commands that know their opposite. The plain way
is to copy the picture before each step. With `ksmcore.copy` such a copy shares its pages with the
picture, and memory is only taken where a step draws.

    python examples/undo_history.py [--size small|full]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from statistics import median

import numpy as np
from common import SEED, check, digest, mib, pss, run, say, say_saved, timed
from numpy.typing import NDArray

import ksmcore

Picture = NDArray[np.uint8]  # rows, columns, red green blue alpha
Step = Callable[[Picture], None]


# ---- what an editor does -------------------------------------------------------------------------


def brush(rng: np.random.Generator, height: int, width: int) -> Step:
    """A stroke of a round, soft brush between two places."""
    (y0, x0), (y1, x1) = rng.random((2, 2)) * (height, width)
    length, radius = height // 8, max(height // 100, 3)
    y1, x1 = y0 + np.clip(y1 - y0, -length, length), x0 + np.clip(x1 - x0, -length, length)
    colour = rng.integers(0, 256, 3)

    def step(picture: Picture) -> None:
        top, left = int(max(min(y0, y1) - radius, 0)), int(max(min(x0, x1) - radius, 0))
        area = picture[top : int(max(y0, y1)) + radius, left : int(max(x0, x1)) + radius]
        y, x = np.ogrid[top : top + area.shape[0], left : left + area.shape[1]]
        along = (y - y0) * (y1 - y0) + (x - x0) * (x1 - x0)
        along = np.clip(along / max((y1 - y0) ** 2 + (x1 - x0) ** 2, 1), 0, 1)
        away = np.hypot(y - y0 - along * (y1 - y0), x - x0 - along * (x1 - x0))
        cover = np.clip(1 - away / radius, 0, 1)[..., None]
        area[..., :3] = area[..., :3] * (1 - cover) + colour * cover

    return step


def fill(rng: np.random.Generator, height: int, width: int) -> Step:
    """A rectangle of one colour."""
    top, left = int(rng.integers(height * 9 // 10)), int(rng.integers(width * 9 // 10))
    colour = rng.integers(0, 256, 3)

    def step(picture: Picture) -> None:
        picture[top : top + height // 10, left : left + width // 10, :3] = colour

    return step


def blur(rng: np.random.Generator, height: int, width: int) -> Step:
    """The mean of five pixels up and down, in a rectangle."""
    top, left = int(rng.integers(2, height * 4 // 5)), int(rng.integers(width * 4 // 5))

    def step(picture: Picture) -> None:
        rows, columns = slice(top, top + height // 8), slice(left, left + width // 6)
        shifted = [
            picture[top + by : top + by + height // 8, columns].astype(np.uint16)
            for by in (-2, -1, 0, 1, 2)
        ]
        picture[rows, columns] = sum(shifted) // 5

    return step


def brighten(picture: Picture) -> None:
    """A filter of the whole picture."""
    picture[..., :3] = np.minimum(picture[..., :3].astype(np.uint16) + 3, 255)


# ---- the editor ----------------------------------------------------------------------------------


class Editor:
    """A picture, and a whole copy of it for every step back and forth."""

    def __init__(self, picture: Picture) -> None:
        self.picture = ksmcore.array(picture)
        self.undone: list[Picture] = []
        self.done: list[Picture] = []
        self.copy_seconds: list[float] = []

    def do(self, step: Step) -> None:
        started = time.perf_counter()
        self.done.append(ksmcore.copy(self.picture))
        self.copy_seconds.append(time.perf_counter() - started)
        self.undone.clear()
        step(self.picture)

    def undo(self) -> None:
        self.undone.append(self.picture)
        self.picture = self.done.pop()

    def redo(self) -> None:
        self.done.append(self.picture)
        self.picture = self.undone.pop()


def painted(height: int, width: int) -> Picture:
    """A picture to begin with: a sky, hills, and the grain of a photograph."""
    rng = np.random.default_rng(SEED)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    hills = (np.sin(x / width * 9) * 0.1 + np.sin(x / width * 23) * 0.05 + 0.6) * height
    picture = np.empty((height, width, 4), np.uint8)
    for channel, (above, below) in enumerate(((120, 40), (170, 120), (230, 50))):
        shade = np.where(y < hills, above + 25 * y / height, below + 60 * (1 - y / height))
        picture[..., channel] = np.clip(shade + rng.normal(0, 4, shade.shape), 0, 255)
    picture[..., 3] = 255
    return picture


def draw_plainly(picture: Picture, steps: list[Step]) -> tuple[list[bytes], float]:
    """Without ksmcore: digests of all states, and what `numpy.copy` takes, in seconds (median)."""
    picture = picture.copy()
    states, seconds = [digest(picture)], []
    for step in steps:
        started = time.perf_counter()
        np.copy(picture)
        seconds.append(time.perf_counter() - started)
        step(picture)
        states.append(digest(picture))
    return states, median(seconds)


def example(full: bool) -> None:
    # A row of 1024 pixels is a page: what a step draws is one stretch of pages, see "Not so" below.
    height, width = (2048, 1024) if full else (512, 1024)
    n_steps = 150 if full else 20
    picture = painted(height, width)
    say("Picture", f"{height} x {width} pixels, {mib(picture.nbytes)}; {n_steps} steps")

    rng = np.random.default_rng(SEED)
    makers = [brush, brush, brush, fill, blur]
    steps = [makers[int(rng.integers(len(makers)))](rng, height, width) for _ in range(n_steps)]
    wanted, numpys_seconds = draw_plainly(picture, steps)

    before = pss()
    editor = Editor(picture)
    with timed(f"{n_steps} steps, each with a copy kept"):
        for step in steps:
            editor.do(step)
    states = [*editor.done, editor.picture]
    check([digest(state) for state in states] == wanted, "a state is not what was drawn")
    whole = len(states) * picture.nbytes
    say("Copies", f"{mib(whole)} of pictures, and PSS grew by {mib(pss() - before)}")
    say("Memory", "as it would be with plain copies, and as it is:")
    say_saved(before + whole, pss(), at_least=whole // 2)
    ours = median(editor.copy_seconds[1:])
    say("Time", f"a copy {ours * 1e3:.2f} ms (median), numpy.copy {numpys_seconds * 1e3:.2f} ms")
    del states

    for back in range(1, n_steps + 1):
        editor.undo()
        check(digest(editor.picture) == wanted[-1 - back], f"undo {back} shows another picture")
    for forth in range(1, n_steps + 1):
        editor.redo()
        check(digest(editor.picture) == wanted[forth], f"redo {forth} shows another picture")
    say("Check", f"{n_steps} times undo, {n_steps} times redo: every picture as it was drawn")

    # What a program has to draw anew after an undo.
    drawn, before_it = editor.picture, editor.done[-1]
    started = time.perf_counter()
    changes = ksmcore.changed(drawn, since=before_it)
    seconds = time.perf_counter() - started
    rows = np.flatnonzero((drawn != before_it).any(axis=(1, 2)))
    check(changes.rows.tolist() == rows.tolist(), "other rows differ than are told")
    say(
        "Changed",
        f"the last step, {len(rows)} of {height} rows, {changes.pages_read} of "
        f"{changes.pages_total} pages read in {seconds * 1e3:.2f} ms",
    )

    filtered = [ksmcore.copy(editor.picture) for _ in range(3)]
    for times, state in enumerate(filtered):
        for _ in range(times):
            brighten(state)
    estimate = ksmcore.estimate(*filtered)
    text = f"{mib(estimate.bytes_saved)} of {mib(3 * picture.nbytes)} can be shared"
    say("Not so", f"a filter changes every pixel of the picture, step after step: {text}")
    say("Not so", "a row of pixels inserted at the top moves all the others to other pages")
    say("Not so", "wide pictures: a step then changes a page here and there, each its own mapping;")
    say("", "keep them as tiles, (rows, columns, 64, 64, 4), which are stretches of pages again")


if __name__ == "__main__":
    sys.exit(run(example, __doc__))
