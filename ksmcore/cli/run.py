"""`ksmcore run`: a program with its arrays merged while it runs.

The allocator and the scanner of the default engine run beside the program; when it ends its numbers
are taken, while its arrays still live, and told at the exit of the interpreter, after all that the
program has to say.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ksmcore
from ksmcore._engine import all_engines
from ksmcore.cli.companion import Companion
from ksmcore.cli.figures import Source, summary
from ksmcore.cli.output import OutputFile
from ksmcore.cli.program import Program
from ksmcore.cli.serving import Server
from ksmcore.cli.whose_memory import Whose, elsewhere, install

if TYPE_CHECKING:
    from ksmcore.cli.children import Children

__all__ = ["RunOptions", "Session"]


@dataclass(frozen=True)
class RunOptions:
    """What `ksmcore run` was asked for."""

    threshold_bytes: int
    memory: Whose | None = None
    scans: bool = True
    interval_ms: int | None = None
    quiet: bool = False
    report: OutputFile | None = None
    json: OutputFile | None = None
    children: bool = False


class Session(Companion):
    """The allocator, the scanner and the server, and the reports at the end."""

    def __init__(self, program: Program, options: RunOptions) -> None:
        """Raises ValueError for what the engine refuses, an option or a setting of the environment,
        and ImportError for an option that needs something which is not installed."""
        super().__init__("run")
        self._options = options
        self._command = ["python", *program.command]
        if options.report is not None:
            # Now: what is missing shows before hours have gone by, and sys.path is still ours.
            from ksmcore._show.report import html_report

            self._html_report: Callable[..., str] = html_report
        self._engine = ksmcore.default_engine()
        self._server: Server | None = None
        self._whose_memory = install(self._engine, options.threshold_bytes, options.memory)
        self._source = Source(
            self._engine,
            self._command,
            options.threshold_bytes,
            whose_memory=self._whose_memory,
            wants_scans=options.scans,
        )
        self._children: Children | None = None
        self._figures: dict[str, Any] | None = None
        self._start()
        if options.children:
            self._children = self._order_children()

    def _start(self) -> None:
        if self._options.scans:
            interval_ms = self._options.interval_ms
            asked = {} if interval_ms is None else {"sleep_millisecs": interval_ms}
            self._engine.start(**asked)
        try:
            self._server = Server(self._source.snapshot)
        except OSError as error:
            if not self._options.quiet:
                self.messages.say(f"ksmcore: `ksmcore live` will not see this process: {error}")

    def _order_children(self) -> Children:
        from ksmcore.cli.children import Children

        options = self._options
        try:
            return Children(
                options.threshold_bytes, self._whose_memory, options.scans, options.interval_ms
            )
        except OSError as error:
            raise ValueError(f"there is no place for the numbers of children: {error}") from None

    def leave(self) -> None:
        if self._server is not None:
            self._server.stop()
        all_engines.leave_merged(self._engine)
        if self._children is not None:
            self._children.close()

    def conclude(self, exit_status: int) -> list[str]:
        """Takes the numbers and writes the reports; what goes wrong with those is told too."""
        try:
            self._engine._now().passes.tidy(idle_only=False)
            figures = {**self._source.snapshot(), "exit_status": exit_status, "elsewhere": None}
            is_told = not self._options.quiet or self._options.json is not None
            if is_told and not figures["disabled"]:
                figures["elsewhere"] = elsewhere(self._engine, figures["seconds"])
        except Exception as error:
            return [f"ksmcore: no summary: {error!r}"]
        if self._children is None:
            lines = self._tell(figures)
        else:
            lines, self._figures = [], figures  # others go on
        if self._options.report is not None:
            lines += self._write(
                self._options.report,
                lambda: self._html_report(
                    self._engine,
                    title=shlex.join(self._command),
                    command=self._command,
                    exit_status=exit_status,
                ),
            )
        return lines

    def last_words(self) -> list[str]:
        """With the numbers of children: they have been waited for by now, if they are at all."""
        if self._children is None or self._figures is None:
            return []
        return self._tell({**self._figures, "children": self._children.figures()})

    def _tell(self, figures: dict[str, Any]) -> list[str]:
        lines = [] if self._options.quiet else summary(figures)
        if self._options.json is not None:
            lines += self._write(self._options.json, lambda: json.dumps(figures, indent=1) + "\n")
        return lines

    def _write(self, file: OutputFile, make_text: Callable[[], str]) -> list[str]:
        try:
            file.write(make_text())
        except Exception as error:
            return [f"ksmcore: {file.path} was not written: {error}"]
        return [] if self._options.quiet else [f"  Written  {file.path}"]
