"""A C signal handler on every thread (native/handlers.c), which writes into memory of the test."""

from __future__ import annotations

import contextlib
import ctypes
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np

SOURCE = Path(__file__).resolve().parents[1] / "native" / "handlers.c"
# Nobody else here uses it.
SIGNAL = signal.SIGUSR2
# Words at the end of each page that belong to the handler.
N_WORDS = 64


class Handlers:
    """While it is entered, all threads get the signal again and again."""

    def __init__(
        self, library: ctypes.CDLL, pages: np.ndarray, n_each: int = 4, pause_us: int = 200
    ) -> None:
        """`pages`: words, page by page; the last of each are the handler's, and zeros."""
        assert pages.dtype == np.uint64
        self._library = library
        self._pages = pages
        self._n_each = n_each
        self._pause_us = pause_us
        self.n_sent = 0
        self.n_wrong = -1

    def n_runs(self, tid: int = 0) -> int:
        """How often the handler ran on this thread; 0: on any."""
        return int(self._library.handlers_runs(tid))

    @contextlib.contextmanager
    def running(self) -> Iterator[Handlers]:
        n_pages, page_words = self._pages.shape
        addr = self._pages.__array_interface__["data"][0]
        before = signal.getsignal(SIGNAL)
        library = self._library
        assert not library.handlers_begin(
            int(SIGNAL), *(ctypes.c_long(n) for n in (addr, n_pages, page_words, self._n_each))
        )
        sender = threading.Thread(target=self._send)
        sender.start()
        try:
            yield self
        finally:
            library.handlers_stop()
            sender.join()
            self.n_wrong = int(library.handlers_end(int(SIGNAL)))
            # Here the last signals have been handled, or ignored.
            signal.signal(SIGNAL, before)

    def _send(self) -> None:
        self.n_sent = self._library.handlers_send(int(SIGNAL), ctypes.c_long(self._pause_us))
