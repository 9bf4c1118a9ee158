"""`ksmcore report`: what was written as JSON, told again for a person."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from rich.console import Console

from ksmcore.cli.estimate import estimate_text, whole_text
from ksmcore.cli.figures import SCHEMA, elsewhere_lines, summary
from ksmcore.cli.inventory import inventory_text
from ksmcore.cli.view import picture

__all__ = ["NotOursError", "tell"]


class NotOursError(Exception):
    """The file holds something else; the text says what is wrong."""


def tell(path: str) -> None:
    """Print it.

    Raises:
        OSError: the file cannot be read.
        NotOursError
    """
    with open(path, "rb") as file:
        text = file.read()
    try:
        figures = json.loads(text)
    except ValueError as error:  # also what is no text
        raise NotOursError(f"{path} is no JSON: {error}") from None
    if not isinstance(figures, dict) or "ksmcore" not in figures:
        raise NotOursError(f"{path} was not written by `ksmcore run --json` or `estimate --json`")
    if figures.get("schema") != SCHEMA:
        raise NotOursError(
            f"{path} has schema {figures.get('schema')}, and this version reads {SCHEMA}: it was "
            f"written by ksmcore {figures['ksmcore']}"
        )
    console = Console(soft_wrap=True)
    try:
        _tell(figures, console)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise NotOursError(f"{path} is incomplete: {error!r}") from None


def _tell(figures: Mapping[str, Any], console: Console) -> None:
    lines: list[str] = []
    if "stats" in figures:
        lines = summary({"wants_scans": True, **figures})
        # First, so that nothing of a file that is incomplete is shown.
        shown = picture(figures, ascii_only=not console.encoding.startswith("utf"))
        console.print(shown, soft_wrap=False)
    elif "inventory" in figures:
        lines = inventory_text(figures["inventory"])
    else:
        best, end = figures["best"], figures["end"]
        make = whole_text if "processes" in best else estimate_text
        lines = make(best, best["seconds"], end, end["seconds"], figures["looks"])
        lines += elsewhere_lines(figures)
    if "exit_status" in figures:
        lines.append(f"  Exit     status {figures['exit_status']}")
    for line in lines:
        console.print(line, markup=False, highlight=False)
