"""How far a pass is, shown to a person or told to a callback.

A callback gets (pages done, pages in all), first with 0 and last with all.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

Progress = bool | Callable[[int, int], object] | None


@contextmanager
def reporting(progress: Progress, what: str, n_pages: int) -> Iterator[Callable[[int], object]]:
    """Give a function that takes the pages done so far.

    `progress`: True for a bar (tqdm if it is installed, else a line on stderr at the end), a
    callback, or None. Raises TypeError for anything else.
    """
    if progress is None or progress is False:
        yield lambda done: None
    elif callable(progress):
        progress(0, n_pages)
        yield lambda done: progress(done, n_pages)
    elif progress is True:
        with _bar(what, n_pages) as show:
            yield show
    else:
        raise TypeError(f"progress must be True, False, None or a callback, not {progress!r}")


def load_bars() -> None:
    """Have what draws bars loaded: some megabytes, for whoever measures memory."""
    with suppress(ImportError):
        import tqdm.auto  # noqa: F401


@contextmanager
def _bar(what: str, n_pages: int) -> Iterator[Callable[[int], object]]:
    try:
        from tqdm.auto import tqdm  # in a notebook, where ipywidgets is there, a bar of its own
    except ImportError:
        yield lambda done: None
        print(f"{what}: {n_pages:,} pages done", file=sys.stderr)
        return
    bar: Any
    with tqdm(total=n_pages, desc=what, unit="page", unit_scale=True) as bar:
        yield lambda done: bar.update(done - bar.n)
