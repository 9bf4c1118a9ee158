"""Which regions a tracker watches."""

import contextlib
from collections.abc import Iterator

from ksmcore._testing import hooks


@contextlib.contextmanager
def watched_from(n_pages: int) -> Iterator[None]:
    """Within the block regions of so many pages and more are watched, under any engine."""
    before = hooks.watch_from(n_pages)
    try:
        yield
    finally:
        hooks.watch_from(before)
