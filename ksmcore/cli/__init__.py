"""The command line: `python -m ksmcore` and the script `ksmcore` (extra `cli`).

click reads the arguments; then the program is run, where there is one: nothing of click may be
between that and the interpreter.
"""

from __future__ import annotations

import importlib.util
import sys

__all__ = ["main"]


def main() -> None:
    """Do what the arguments say. Raises SystemExit, or what the program raised that was run."""
    # Both at once, rather than rich when it is first drawn with.
    missing = [name for name in ("click", "rich") if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(
            f"ksmcore: the command line needs {' and '.join(missing)}: pip install 'ksmcore[cli]'"
        )
    import click

    from ksmcore.cli.commands import cli

    try:
        found = cli.main(prog_name="ksmcore", standalone_mode=False)
        if isinstance(found, int):
            sys.exit(found)
    except click.Abort:
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    if found is not None:
        found()
