"""`ksmcore live`: the numbers of another process, refreshed until it ends."""

from __future__ import annotations

import contextlib
import os
import time

from rich.console import Console, Group, RenderableType
from rich.live import Live

from ksmcore.cli.serving import NotAnsweringError, ask
from ksmcore.cli.view import kernel_view, picture

__all__ = ["follow"]


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
