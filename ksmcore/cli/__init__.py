"""The command line: `python -m ksmcore` and the script `ksmcore`.

click reads the arguments; then the program is run, where there is one: nothing of click may be
between that and the interpreter.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from typing import NoReturn

__all__ = ["main"]

# As sysexits.h has it; 1 and 2 have a meaning of their own for `ksmcore doctor`.
OUTPUT_FAILED = os.EX_IOERR


def main() -> None:
    """Do what the arguments say. Raises SystemExit, or what the program raised that was run."""
    # Where ksmcore was installed without what it depends on. Both at once, rather than rich when it
    # is first drawn with.
    missing = [name for name in ("click", "rich") if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(
            f"ksmcore: the command line needs {' and '.join(missing)}: "
            f"pip install {' '.join(missing)}"
        )
    import click

    from ksmcore.cli.commands import cli

    try:
        found = cli.main(prog_name="ksmcore", standalone_mode=False)
        if not callable(found) and sys.stdout is not None:
            sys.stdout.flush()  # while there is somebody to tell that it fails
    except click.Abort:
        sys.exit(130)
    except click.ClickException as error:
        with contextlib.suppress(OSError):
            error.show()
        sys.exit(error.exit_code)
    except OSError as error:
        # What cannot be written has no other file's name, and nobody's words but the kernel's.
        if error.filename is not None or error.strerror != os.strerror(error.errno or 0):
            raise
        _give_up_output(error)
    if isinstance(found, int):
        sys.exit(found)
    if found is not None:
        found()


def _give_up_output(error: OSError) -> NoReturn:
    """Say that nothing more can be written, and end."""
    with contextlib.suppress(OSError):
        print(f"ksmcore: the output cannot be written: {error.strerror}", file=sys.stderr)
    with contextlib.suppress(OSError, ValueError):
        # The interpreter would try again at its exit, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(OUTPUT_FAILED)
