"""Views that refresh: `ksmcore live` of another process, and `ksmcore run --live` of this one.

The first has the terminal for itself. The second shares it with a program that knows nothing of it:
it keeps the last rows of the terminal for itself and lets the program scroll in those above, so
what the program writes goes where it always went, by whatever way it is written.
"""

from __future__ import annotations

import _thread
import contextlib
import io
import os
import threading
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live

from ksmcore.cli.serving import NotAnsweringError, ask
from ksmcore.cli.view import kernel_view, picture

__all__ = ["Footer", "follow"]

STDERR = 2
# A footer takes so many rows at most, and leaves the program so many at least.
FOOTER_ROWS = 8
PROGRAM_ROWS = 6


def follow(pid: int, interval_seconds: float, *, once: bool) -> None:
    """Show a process until it ends, or Ctrl-C is pressed; one picture if there is no terminal.

    Raises, for the first picture:
        ProcessLookupError: there is no such process.
        NotAnsweringError: it serves its numbers, and does not answer.
    """
    console = Console()
    ascii_only = not console.encoding.startswith("utf")

    has_answered = False

    def draw(max_regions: int = 8) -> RenderableType:
        nonlocal has_answered
        answer = ask(pid)
        figures = answer or kernel_view(pid)  # which raises if there is no such process (any more)
        if has_answered and not answer:
            raise NotAnsweringError(f"process {pid} has no numbers any more: it is ending")
        has_answered = bool(answer)
        try:
            return picture(figures, max_regions=max_regions, ascii_only=ascii_only)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise NotAnsweringError(
                f"process {pid} has answered what is no snapshot of this version ({error!r})"
            ) from None

    shown = draw()
    if once or not console.is_terminal:
        console.print(shown)
        return
    with contextlib.suppress(KeyboardInterrupt), Live(console=console, screen=True) as live:
        live.update(shown, refresh=True)
        while True:
            time.sleep(interval_seconds)
            try:
                shown = draw(max(console.height - 10, 0))
            except ProcessLookupError:
                break
            except NotAnsweringError as error:
                live.update(Group(shown, str(error)), refresh=True)
                continue
            live.update(shown, refresh=True)
    console.print(shown)
    if not os.path.exists(f"/proc/{pid}"):
        console.print(f"process {pid} has ended")


class Footer:
    """The last rows of the terminal that stderr is, redrawn by a thread until `stop`.

    All that is written to the terminal goes in one write, which saves the cursor first and puts it
    back last: so nothing of the program's comes in between, and it does not notice.
    """

    def __init__(self, snapshot: Callable[[], dict[str, Any]], interval_seconds: float) -> None:
        self._snapshot = snapshot
        self._interval_seconds = interval_seconds
        self._pid = os.getpid()
        console = Console(stderr=True)
        self._colours = console.color_system
        self._ascii_only = not console.encoding.startswith("utf")
        self._size: os.terminal_size | None = None
        self._n_rows = 0
        self._stop = threading.Event()
        self._ended = threading.Event()
        _thread.start_new_thread(self._run, ())

    @staticmethod
    def why_not() -> str | None:
        """Why there can be none here, or None."""
        if not os.isatty(STDERR):
            return "stderr is no terminal"
        if os.environ.get("TERM", "dumb") in ("dumb", "unknown"):
            return "this terminal (TERM) cannot move its cursor"
        if os.get_terminal_size(STDERR).lines < FOOTER_ROWS + PROGRAM_ROWS:
            return f"the terminal has less than {FOOTER_ROWS + PROGRAM_ROWS} lines"
        return None

    def stop(self) -> None:
        """Give the rows back to the program. Nothing in a forked child, and a second time."""
        if self._stop.is_set() or self._pid != os.getpid():
            return
        self._stop.set()
        self._ended.wait(2.0)
        if self._n_rows and self._size is not None:
            self._write(f"\x1b7\x1b[r\x1b[{self._size.lines - self._n_rows + 1};1H\x1b[J\x1b8")

    def _run(self) -> None:
        while True:
            # Whatever happens here, the program should not notice.
            with contextlib.suppress(Exception):
                self._draw(os.get_terminal_size(STDERR))
            if self._stop.wait(self._interval_seconds):
                break
        self._ended.set()

    def _draw(self, size: os.terminal_size) -> None:
        n_rows = FOOTER_ROWS if size.lines >= FOOTER_ROWS + PROGRAM_ROWS else 0
        begun = ""
        if size != self._size:
            # Make room: what the program has written so far moves up, the cursor with it. On a
            # terminal that has changed its size, the old rows go first.
            if self._n_rows and self._size is not None:
                top = min(self._size.lines - self._n_rows, size.lines - n_rows) + 1
                begun = f"\x1b7\x1b[r\x1b[{max(top, 1)};1H\x1b[J\x1b8"
            if n_rows:
                # Not by new lines, which would also go to the first column.
                begun += "\x1bD" * n_rows + f"\x1b[{n_rows}A"
            self._size, self._n_rows = size, n_rows
        if n_rows == 0:
            self._write(begun)
            return
        first = size.lines - n_rows + 1
        # The program may have set the terminal back meanwhile, so the upper part is set each time.
        drawn = [f"{begun}\x1b7\x1b[1;{first - 1}r"]
        lines = self._lines(size.columns)
        for row in range(n_rows):
            line = lines[row] if row < len(lines) else ""
            drawn.append(f"\x1b[{first + row};1H\x1b[0m{line}\x1b[0m\x1b[K")
        self._write("".join([*drawn, "\x1b8"]))

    def _lines(self, width: int) -> list[str]:
        console = Console(
            file=io.StringIO(),
            width=width - 1,
            force_terminal=True,
            color_system=self._colours,  # type: ignore[arg-type]
            legacy_windows=False,
        )
        with console.capture() as captured:
            console.rule(characters="-" if self._ascii_only else "─", style="bright_black")
            shown = picture(self._snapshot(), max_regions=0, ascii_only=self._ascii_only)
            console.print(shown, crop=True)
        return captured.get().splitlines()

    @staticmethod
    def _write(text: str) -> None:
        data = text.encode()
        with contextlib.suppress(OSError):
            while data:
                data = data[os.write(STDERR, data) :]
