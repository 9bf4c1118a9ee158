"""The user's program, run as Python itself would run it.

The program becomes the module `__main__` of this process, with its own arguments and path; how it
ends is left to the interpreter, which then prints the traceback, ends by the right status, and runs
the exit handlers as ever. Only the frames that lie above the program are taken off its traceback
first.
"""

from __future__ import annotations

import builtins
import io
import linecache
import os
import pkgutil
import runpy
import signal
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.machinery import BuiltinImporter, SourceFileLoader, SourcelessFileLoader
from types import CodeType, ModuleType, TracebackType
from typing import Any

__all__ = ["CannotStartError", "Program"]


# What is behind `python -m` and `python directory`; pdb and others of the library call it too. Each
# gives a name, a spec and the code, or raises the exception that it is given.
_Details = tuple[str, Any, CodeType]
_details_of_module: Callable[..., _Details] = runpy._get_module_details  # type: ignore[attr-defined]
_details_of_main: Callable[..., _Details] = runpy._get_main_module_details  # type: ignore[attr-defined]


# The module that the interpreter began with. It goes on using that module's names when all is over,
# without holding them, so it must live as long.
_began_with: ModuleType | None = None


class CannotStartError(Exception):
    """There is no such program; the text says why. The status is that of Python itself."""

    def __init__(self, message: str, exit_status: int = 1) -> None:
        super().__init__(message)
        self.exit_status = exit_status


@dataclass(frozen=True)
class Program:
    """A script (or a directory or archive with a `__main__.py`; "-": what comes from stdin), a
    module or some code, and its arguments."""

    target: str
    args: Sequence[str] = ()
    is_module: bool = False
    is_code: bool = False

    @property
    def command(self) -> list[str]:
        """As it would be given to python."""
        option = ["-m"] if self.is_module else ["-c"] if self.is_code else []
        return [*option, self.target, *self.args]

    def run(self, ended: Callable[[int], object]) -> None:
        """Run it to its end.

        `ended` is called with the exit status when its main code is over, and what that holds still
        lives; not if there is no such program.

        Raises:
            CannotStartError: nothing of it was run.
            BaseException: what it raised. The interpreter, where this ends, shows it as the
                program's own.
        """
        try:
            code, main = self._load()
            exec(code, main.__dict__)
        except CannotStartError:
            raise
        except BaseException as error:
            shown = error.__traceback__ = _without_ours(error.__traceback__)
            ended(exit_status(error))
            if not isinstance(error, SystemExit):
                _have_shown(shown)
            raise
        ended(0)

    def _load(self) -> tuple[CodeType, ModuleType]:
        """Its code, and the module that it runs in, which is `__main__` from here on."""
        if self.is_module:
            _set_first_path(os.getcwd())
            sys.argv = ["-m", *self.args]
            _, spec, code = _details_of_module(self.target, CannotStartError)
            sys.argv[0] = spec.origin
            return code, _become_main(spec=spec)
        if self.is_code:
            return self._load_code()
        sys.argv = [self.target, *self.args]
        if self.target == "-":
            return self._load_stdin()
        # Absolute, and else as it was written.
        path = self.target if os.path.isabs(self.target) else f"{os.getcwd()}/{self.target}"
        if pkgutil.get_importer(path) is not None:
            _set_first_path(path, always=True)
            _, spec, code = _details_of_main(CannotStartError)
            return code, _become_main(spec=spec)
        try:
            with open(path, "rb") as stream:
                source = stream.read()  # at once: it may be a pipe
        except OSError as error:
            message = f"can't open file {path!r}: [Errno {error.errno}] {error.strerror}"
            raise CannotStartError(message, 2) from None
        # What was compiled before (a .pyc), else None.
        code = pkgutil.read_code(io.BytesIO(source))
        _set_first_path(os.path.dirname(os.path.realpath(path)))
        loader = SourceFileLoader if code is None else SourcelessFileLoader
        main = _become_main(file=path, loader=loader("__main__", path))
        return code or compile(source, path, "exec", dont_inherit=True), main

    def _load_code(self) -> tuple[CodeType, ModuleType]:
        """As `python -c` has it."""
        sys.argv = ["-c", *self.args]
        _set_first_path("")
        source = textwrap.dedent(self.target) if sys.version_info >= (3, 14) else self.target
        if sys.version_info >= (3, 13):
            _have_lines_shown(source, "<string>")
        main = _become_main(loader=BuiltinImporter)
        return compile(source, "<string>", "exec", dont_inherit=True), main

    def _load_stdin(self) -> tuple[CodeType, ModuleType]:
        """As `python -` has it, where stdin is no terminal; from one it is read to its end too."""
        if sys.stdin is None:
            raise CannotStartError("the program should come from stdin, which is closed", 2)
        try:
            source = sys.stdin.buffer.read()
        except OSError as error:
            raise CannotStartError(f"can't read stdin: {error.strerror}", 2) from None
        _set_first_path("")
        main = _become_main(file="<stdin>", loader=BuiltinImporter)
        return compile(source, "<stdin>", "exec", dont_inherit=True), main


def _have_lines_shown(source: str, name: str) -> None:
    """In tracebacks, as newer releases of Python do."""
    lines = source.splitlines(keepends=True)
    linecache.cache[name] = (len(source), None, lines, name)


def _become_main(*, spec: Any = None, file: str | None = None, loader: Any = None) -> ModuleType:
    """A new module `__main__` with the attributes that the interpreter gives it."""
    global _began_with
    if _began_with is None:
        _began_with = sys.modules["__main__"]
    present = vars(sys.modules["__main__"])
    main = ModuleType("__main__")
    # In the interpreter's order.
    attributes: dict[str, Any] = {
        "__package__": None,
        "__loader__": loader,
        "__spec__": spec,
        "__annotations__": {},
        "__builtins__": builtins,
        "__file__": file,
        "__cached__": None,
    }
    if spec is not None:
        attributes.update(
            __package__=spec.parent,
            __loader__=spec.loader,
            __file__=spec.origin,
            __cached__=spec.cached,
        )
    elif file is None:
        del attributes["__file__"], attributes["__cached__"]
    # Some of them are gone in newer releases of Python.
    vars(main).update((name, value) for name, value in attributes.items() if name in present)
    sys.modules["__main__"] = main
    return main


def _set_first_path(path: str, *, always: bool = False) -> None:
    """Put the program's directory where ours is, unless Python was told to put none there."""
    if not (sys.flags.isolated or getattr(sys.flags, "safe_path", False)):
        sys.path[0] = path
    elif always:
        sys.path.insert(0, path)


# ---- how it ends ---------------------------------------------------------------------------------


def exit_status(error: BaseException) -> int:
    """What the process will end with, if this is not caught."""
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT
    if not isinstance(error, SystemExit):
        return 1
    if error.code is None:
        return 0
    return error.code & 0xFF if isinstance(error.code, int) else 1


def _without_ours(traceback: TracebackType | None) -> TracebackType | None:
    """The traceback from the program's first frame on."""
    while traceback is not None and traceback.tb_frame.f_globals.get("__name__") in (
        __name__,
        "runpy",
    ):
        traceback = traceback.tb_next
    return traceback


def _have_shown(traceback: TracebackType | None) -> None:
    """Have the interpreter hand this traceback to the program's excepthook, without the frames that
    are added until it gets there."""
    hook = getattr(sys, "excepthook", None)
    if hook is None:
        return

    def show(kind: type[BaseException], error: BaseException, _: TracebackType | None) -> None:
        sys.excepthook = hook
        sys.last_traceback = error.__traceback__ = traceback
        try:
            hook(kind, error, traceback)
        except Exception as failure:
            # As the interpreter has it, and without this frame.
            own = failure.__traceback__
            failure.__traceback__ = own and own.tb_next
            print("Error in sys.excepthook:", file=sys.stderr)
            sys.__excepthook__(type(failure), failure, failure.__traceback__)
            print("\nOriginal exception was:", file=sys.stderr)
            sys.__excepthook__(kind, error, traceback)

    sys.excepthook = show
