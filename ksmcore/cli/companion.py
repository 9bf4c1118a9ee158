"""What goes along with a program from before it begins until the interpreter exits.

`run` and `estimate` each have one. It concludes when the program's main code is over, while its
arrays still live, or, if threads of the program go on then, at the exit. What it has to say it says
at the exit, after everything that the program said.
"""

from __future__ import annotations

import atexit
import os
import threading

from ksmcore.cli.output import Messages
from ksmcore.cli.program import CannotStartError, Program

__all__ = ["Companion"]


class Companion:
    """Made before the program begins. In a forked child it does nothing at all."""

    def __init__(self, name: str) -> None:
        self.messages = Messages()
        self._name = name
        self._pid = os.getpid()
        self._lines: list[str] | None = None
        self._is_over = False

    def conclude(self, exit_status: int) -> list[str]:
        """Take the numbers; returns what is to be said."""
        raise NotImplementedError

    def last_words(self) -> list[str]:
        """At the exit; returns what is to be said besides."""
        return []

    def leave(self) -> None:
        """The program is over, or there is none."""

    def accompany(self, program: Program) -> None:
        """Run a program.

        Raises what the program raised (see `Program.run`), and SystemExit if there is none.
        """
        # Before the program can register handlers: so this one comes after all of those.
        atexit.register(self._at_exit)
        try:
            program.run(self._ended)
        except CannotStartError as error:
            self._is_over = True
            self.leave()
            self.messages.say(f"ksmcore {self._name}: {error}")
            raise SystemExit(error.exit_status) from None

    def _ended(self, exit_status: int) -> None:
        if self._pid != os.getpid():
            return
        self._exit_status = exit_status
        main = threading.main_thread()
        if all(thread.daemon or thread is main for thread in threading.enumerate()):
            self._lines = self.conclude(exit_status)

    def _at_exit(self) -> None:
        if self._is_over or self._pid != os.getpid():
            return
        self._is_over = True
        lines = self.conclude(self._exit_status) if self._lines is None else self._lines
        lines = [*lines, *self.last_words()]
        self.leave()
        if lines:
            self.messages.say(*lines)
