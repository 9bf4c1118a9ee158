"""`%%ksmcore` in IPython and Jupyter: a cell with its arrays merged."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from IPython.core.error import UsageError
from IPython.core.magic import Magics, cell_magic, magics_class
from IPython.core.magic_arguments import argument, magic_arguments, parse_argstring
from IPython.display import display

from ksmcore.sizes import parse_bytes

if TYPE_CHECKING:
    from ksmcore._engine.engine import Engine

__all__ = ["register"]


def register(
    shell: Any,
    engine: Callable[[], Engine],
    allocator: Callable[[int], AbstractContextManager[None]],
) -> None:
    """Give a shell the magic. `allocator` takes the least size of arrays, in bytes, and registers
    them with that engine."""

    @magics_class
    class KsmMagics(Magics):  # type: ignore[misc]
        @magic_arguments()  # type: ignore[untyped-decorator]
        @argument(  # type: ignore[untyped-decorator]
            "-t", "--threshold", default="64k", help="Least size of the arrays, such as 16k or 1M."
        )
        @cell_magic  # type: ignore[untyped-decorator]
        def ksmcore(self, line: str, cell: str) -> None:
            """Run a cell under ksmcore's allocator, merge what its arrays hold, and show what that
            saved. They stay registered: what a later cell writes is theirs again."""
            asked = parse_argstring(self.ksmcore, line)
            try:
                here = allocator(parse_bytes(asked.threshold))
            except (TypeError, ValueError) as error:
                raise UsageError(f"--threshold {asked.threshold}: {error}") from None
            before = engine().stats().bytes_saved
            with here:
                # It shows what the cell raises, by itself.
                done = self.shell.run_cell(cell)
            if done.success:
                report = engine().dedup()
                # The scanner may have been there first.
                saved = engine().stats().bytes_saved - before
                display(replace(report, bytes_saved=saved))

    shell.register_magics(KsmMagics)
