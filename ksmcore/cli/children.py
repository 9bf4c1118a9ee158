"""`ksmcore run --children`: the processes that the program starts come under ksmcore too.

What they are to do, and where to put their numbers, stands in the environment. There PYTHONPATH
begins with a directory whose `sitecustomize` begins with it, in each Python below (see `child`).
The process that started all adds the numbers up.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from ksmcore.cli import startup
from ksmcore.cli.child import Order
from ksmcore.cli.figures import SCHEMA
from ksmcore.cli.startup.sitecustomize import VARIABLE, Watcher, begin_after_forks
from ksmcore.cli.whose_memory import Whose

__all__ = ["Children"]


class Children:
    """For the process that `run` runs: from here on those below it begin by themselves."""

    def __init__(
        self,
        threshold_bytes: int,
        memory: Whose,
        scans: bool,
        interval_ms: int | None,
    ) -> None:
        """Raises OSError where there is no place for their numbers."""
        self._directory = Path(tempfile.mkdtemp(prefix="ksmcore-children-"))
        order = Order(str(self._directory), threshold_bytes, memory, scans, interval_ms)
        os.environ[VARIABLE] = json.dumps(dataclasses.asdict(order))
        others = [path for path in [os.environ.get("PYTHONPATH")] if path]
        os.environ["PYTHONPATH"] = os.pathsep.join([os.path.dirname(startup.__file__), *others])
        if "multiprocessing.util" in sys.modules:
            begin_after_forks()
        else:
            sys.meta_path.insert(0, Watcher({"multiprocessing.util": begin_after_forks}))

    def figures(self) -> list[dict[str, Any]]:
        """The last numbers of each; {"failed": why} of one that could not begin."""
        found = []
        for path in sorted(self._directory.glob("*.failed")):
            with contextlib.suppress(OSError):
                found.append({"failed": path.read_text()})
        for path in sorted(self._directory.glob("*.json")):
            with contextlib.suppress(OSError, ValueError):
                figures = json.loads(path.read_bytes())
                if figures["schema"] == SCHEMA:
                    found.append(figures)
        return found

    def close(self) -> None:
        """Those that still run find no place for their numbers any more."""
        shutil.rmtree(self._directory, ignore_errors=True)
