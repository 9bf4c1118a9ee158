"""What Python imports at its start in processes below `ksmcore run --children`, before anything of
the program.

It only arranges that ksmcore comes when NumPy does, so a process without arrays pays next to
nothing; the sitecustomize that this one hides is imported after it. Nothing but the standard
library is needed: it may be another Python, which has no ksmcore. In the process of `run` itself
`ksmcore.cli.children` uses `Watcher`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

VARIABLE = "_KSMCORE_RUN"
"""Of the environment: what children are to do, as JSON."""


class Watcher:
    """On `sys.meta_path`: calls a function each time that one of some modules has been imported."""

    def __init__(self, function_of: Mapping[str, Callable[[], object]]) -> None:
        self._function_of = function_of

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        function = self._function_of.get(name)
        spec = None if function is None else PathFinder.find_spec(name, path, target)
        if function is None or spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            function()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def begin() -> None:
    """Be under ksmcore from here on. Whatever comes of it, the program does not notice."""
    if VARIABLE not in os.environ:
        return
    try:
        from ksmcore.cli import child

        child.begin(os.environ[VARIABLE])
    except Exception as error:
        try:
            directory = json.loads(os.environ[VARIABLE])["directory"]
            with open(os.path.join(directory, f"{os.getpid()}.failed"), "w") as file:
                file.write(f"{type(error).__name__}: {error}")
        except Exception:
            pass


def begin_after_forks() -> None:
    """Have the processes that multiprocessing forks begin, those of a forkserver too."""
    from multiprocessing import util

    util.register_after_fork(begin_after_forks, lambda _: begin_if_due())


def begin_if_due() -> None:
    if "numpy" in sys.modules:
        begin()


def _chain() -> None:
    """Import what is hidden behind this file, as if this were not there."""
    own = sys.modules.pop(__name__)
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [path for path in sys.path if os.path.abspath(path) != here]
    try:
        __import__(__name__)
    except ImportError as error:
        if error.name != __name__:
            raise
    finally:
        sys.modules.setdefault(__name__, own)


if __name__ == "sitecustomize":
    if VARIABLE in os.environ:
        watched = {"numpy": begin, "multiprocessing.util": begin_after_forks}
        sys.meta_path.insert(0, Watcher(watched))
    _chain()
