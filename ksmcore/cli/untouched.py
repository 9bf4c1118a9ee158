"""What goes along with a program whose memory is to be left alone: nothing of ksmcore is loaded for
it, so that the program costs what it costs without."""

from __future__ import annotations

from ksmcore.cli.companion import Companion

__all__ = ["DISABLED", "Untouched"]

DISABLED = "KSMCORE_DISABLE is set, so no memory was touched"


class Untouched(Companion):
    def __init__(self, quiet: bool) -> None:
        super().__init__("run")
        self._quiet = quiet

    def conclude(self, exit_status: int) -> list[str]:
        return [] if self._quiet else [f"ksmcore: Nothing was saved: {DISABLED}."]
