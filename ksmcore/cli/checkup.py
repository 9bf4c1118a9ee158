"""`ksmcore doctor`: a diagnosis as text for a terminal."""

from __future__ import annotations

import shutil
import textwrap

import click

from ksmcore.doctor import Check, Diagnosis, Level

__all__ = ["show"]

MARKS: dict[Level, tuple[str, str]] = {
    "good": ("ok", "green"),
    "advice": ("ok, but", "cyan"),
    "weak": ("WEAK", "yellow"),
    "broken": ("BROKEN", "red"),
}
VERDICTS = {
    "healthy": "Healthy: ksmcore works here.",
    "weak": "Weak: ksmcore works here, and not as it should.",
    "broken": "Broken: ksmcore cannot merge anything here.",
}
NAME_WIDTH = 13
MARK_WIDTH = 8


def show(diagnosis: Diagnosis) -> None:
    """Print it; the remedy below each check that has one."""
    width = min(max(shutil.get_terminal_size((100, 24)).columns, 60), 110)
    for check in diagnosis.checks:
        _show(check, width)
    n_remedies = sum(check.remedy is not None for check in diagnosis.checks)
    verdict = VERDICTS[diagnosis.health]
    if n_remedies:
        verdict += f" {n_remedies} {'thing' if n_remedies == 1 else 'things'} could be better."
    colour = {"healthy": "green", "weak": "yellow", "broken": "red"}[diagnosis.health]
    click.secho(f"\n{verdict}", fg=colour, bold=True)


def _show(check: Check, width: int) -> None:
    mark, colour = MARKS[check.level]
    indent = " " * (NAME_WIDTH + MARK_WIDTH + 1)
    lines = textwrap.wrap(check.text, width - len(indent)) or [""]
    click.echo(f"{check.name:{NAME_WIDTH}}", nl=False)
    click.secho(f"{mark:{MARK_WIDTH}} ", fg=colour, nl=False)
    click.echo(lines[0])
    for line in lines[1:]:
        click.echo(indent + line)
    if check.remedy is not None:
        # Commands in it must survive being copied.
        wrapped = textwrap.wrap(
            f"-> {check.remedy}",
            width - len(indent),
            subsequent_indent="   ",
            break_long_words=False,
            break_on_hyphens=False,
        )
        for line in wrapped:
            click.secho(indent + line, bold=True)
