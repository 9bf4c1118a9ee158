"""`ksmcore estimate --pid`: equal pages of running processes, as text and JSON."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import click

import ksmcore
from ksmcore._engine.inventory import take_inventory
from ksmcore.cli.figures import SCHEMA
from ksmcore.cli.output import OutputFile
from ksmcore.sizes import counted, human_bytes

__all__ = ["inventory_text", "look_at", "place_lines"]

# Places of a process that are named; the rest are added up.
MOST_PLACES = 12
# Width of a column of sizes.
SIZE = 10


def look_at(pids: Sequence[int], output: OutputFile | None) -> int:
    """Look at processes and tell what is equal; the exit status, which is 1 if one of them could
    not be looked at."""
    inventory = asdict(take_inventory(pids))
    for line in inventory_text(inventory):
        click.echo(line)
    for why in inventory["failures"].values():
        click.echo(f"ksmcore: {why}", err=True)
    if output is not None:
        found = {"schema": SCHEMA, "ksmcore": ksmcore.__version__, "inventory": inventory}
        try:
            output.write(json.dumps(found, indent=1) + "\n")
        except OSError as error:
            click.echo(f"ksmcore: {output.path} was not written: {error}", err=True)
            return 1
    return 1 if inventory["failures"] else 0


def inventory_text(inventory: Mapping[str, Any]) -> list[str]:
    """In lines for a person."""
    lines = []
    processes = inventory["processes"]
    for process in processes:
        # The command is the process's: control characters in it are none of the terminal's.
        command = shlex.join(process["command"]).encode("unicode_escape").decode()
        lines += [
            f"Process {process['pid']}  {_cut(command, 80)}",
            f"  {human_bytes(process['saveable_bytes'])} of {human_bytes(process['bytes'])} of its "
            "own memory could be saved",
            *place_lines(process, with_across=len(processes) > 1),
            *_remarks(process),
            "",
        ]
    if len(processes) > 1:
        lines += [
            f"All {len(processes)}  {human_bytes(inventory['saveable_bytes'])} of "
            f"{human_bytes(inventory['bytes'])} are equal within and across them; merging inside "
            f"each process saves {human_bytes(inventory['within_bytes'])} of that",
            "",
        ]
    return lines[:-1]


def place_lines(process: Mapping[str, Any], *, with_across: bool = False) -> list[str]:
    """A table of where it has its equal pages."""
    places = process["places"]
    if not places:
        return []
    told = [place for place in places if place["equal_bytes"] + place["across_bytes"] > 0]
    shown = told[:MOST_PLACES]
    columns = ["bytes", "equal_bytes", "zero_bytes", *(["across_bytes"] if with_across else [])]
    heads = ["own", "equal", "zeros", *(["elsewhere"] if with_across else [])]
    lines = [_row(heads, "where")] if shown else []
    for place in shown:
        sizes = [human_bytes(place[column]) for column in columns]
        lines.append(_row(sizes, place["name"].encode("unicode_escape").decode()))
    rest = [place for place in places if place not in shown]
    if rest:
        sizes = [human_bytes(sum(place[column] for place in rest)) for column in columns]
        lines.append(_row(sizes, f"in {counted(len(rest), 'other place')}"))
    return lines


def _row(sizes: Sequence[str], name: str) -> str:
    return "  " + " ".join(f"{size:>{SIZE}}" for size in sizes) + f"  {name}"


def _remarks(process: Mapping[str, Any]) -> list[str]:
    lines = []
    if process["elsewhere_bytes"]:
        lines.append(
            f"  Not looked at: {human_bytes(process['elsewhere_bytes'])} of files and of shared "
            "memory, which the kernel keeps once"
        )
    if process["n_gone"]:
        lines.append(f"  {counted(process['n_gone'], 'page')} were gone before they were read")
    if process["ended"]:
        lines.append("  It ended, or became another program, meanwhile: this is a part of it")
    return lines


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."
