"""The commands of `ksmcore`, their options and help; the work is done elsewhere.

The commands that run a program only say how: it is run when click is done, so that nothing of click
is between the program and the interpreter.
"""

from __future__ import annotations

import functools
import io
import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

import ksmcore
from ksmcore._platform import is_disabled
from ksmcore.cli.companion import Companion
from ksmcore.cli.output import OutputFile
from ksmcore.cli.program import Program
from ksmcore.sizes import parse_bytes

__all__ = ["Runner", "cli"]

Runner = Callable[[], None]
"""Runs a program, and raises what that raised."""

if TYPE_CHECKING:
    from ksmcore.cli.whose_memory import Whose

    SizeBase = click.ParamType[int]
else:
    SizeBase = click.ParamType  # which has no type arguments in older releases


class Size(SizeBase):
    """Bytes: 65536, 64k or 64KiB (of 1,024 bytes), 64kB (of 1,000)."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            n_bytes = parse_bytes(value)
        except ValueError:
            self.fail(f"{value!r} is no size: write 65536, 64k or 1.5M", param, ctx)
        if not 1 <= n_bytes < 2**63:
            self.fail(f"{value!r} is not between 1 byte and 8 EiB", param, ctx)
        return n_bytes


if TYPE_CHECKING:
    OutputBase = click.ParamType[OutputFile]
else:
    OutputBase = click.ParamType


class Output(OutputBase):
    """A file for what is to be told at the end."""

    name = "file"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> OutputFile:
        try:
            return OutputFile(value)
        except (OSError, ValueError) as error:
            self.fail(str(error), param, ctx)


Command = TypeVar("Command", bound=Callable[..., Any])


def _program_arguments(*, required: bool) -> Callable[[Command], Command]:
    """-m, -c, the script, module or code, and its arguments, which are none of ours."""

    def decorated(command: Command) -> Command:
        for decorate in (
            click.argument("args", nargs=-1, type=click.UNPROCESSED),
            click.argument("script", required=required),
            click.option("-c", "is_code", is_flag=True, help="SCRIPT is the program's text."),
            click.option("-m", "is_module", is_flag=True, help="SCRIPT is the name of a module."),
        ):
            command = decorate(command)
        return command

    return decorated


def _program(script: str, args: tuple[str, ...], is_module: bool, is_code: bool) -> Program:
    if is_module and is_code:
        raise click.UsageError("-m and -c exclude each other")
    return Program(script, args, is_module, is_code)


def _accompanying(make: Callable[[], Companion], program: Program) -> Runner:
    """What runs the program; everything that goes along with it is there from here on."""
    try:
        companion = make()
    except (ImportError, TypeError, ValueError) as error:
        raise click.ClickException(str(error)) from None
    return functools.partial(companion.accompany, program)


def _print_anything() -> None:
    """What stdout has no letters for is written out: values of variables, other processes' texts.
    Not for commands that run a program, whose stdout it is."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


threshold = click.option(
    "--threshold",
    type=Size(),
    default="64k",
    show_default=True,
    metavar="SIZE",
    help="Least size of the arrays and blocks that are merged, such as 16k or 1M.",
)
whose_memory = click.option(
    "--memory",
    type=click.Choice(["numpy", "all"]),
    help="Whose memory: NumPy's arrays, or what any library asks of malloc (default: all, where "
    "malloc can be redirected).",
)
# Options of the program are not ours, wherever they look alike.
PROGRAM_SETTINGS = {"allow_interspersed_args": False}


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="`ksmcore COMMAND --help` tells more of each.",
)
@click.version_option(ksmcore.__version__, package_name="ksmcore", message="ksmcore %(version)s")
def cli() -> None:
    """Kernel Samepage Merging inside one Python process: equal memory pages of NumPy arrays are
    found, kept once, and mapped copy-on-write.

    \b
      ksmcore doctor               does it work here, and how well?
      ksmcore estimate train.py    what would my program save?
      ksmcore run train.py         save it
      ksmcore estimate --pid PID   and what runs already?
    """


@cli.command(
    context_settings=PROGRAM_SETTINGS,
    short_help="Run a program, with its equal pages merged.",
)
@_program_arguments(required=True)
@click.option(
    "--report",
    type=Output(),
    metavar="FILE",
    help="Write a report with pictures (HTML) at the end.",
)
@click.option("--json", type=Output(), metavar="FILE", help="Write all numbers (JSON) at the end.")
@click.option("--no-scan", is_flag=True, help="Do not scan: the program calls ksmcore itself.")
@click.option(
    "--interval",
    type=click.IntRange(min=0),
    metavar="MS",
    help="Rest of the scanner between two batches, in milliseconds (default 20).",
)
@threshold
@whose_memory
@click.option(
    "--children",
    is_flag=True,
    envvar="KSMCORE_CHILDREN",
    show_envvar=True,
    help="Have Python processes that it starts come under ksmcore too.",
)
@click.option("--quiet", is_flag=True, help="No summary at the end.")
def run(
    script: str,
    args: tuple[str, ...],
    is_module: bool,
    is_code: bool,
    report: OutputFile | None,
    json: OutputFile | None,
    no_scan: bool,
    interval: int | None,
    threshold: int,
    memory: Whose | None,
    children: bool,
    quiet: bool,
) -> Runner:
    """Run a Python program, unchanged, with the equal pages of its memory merged meanwhile: of
    NumPy arrays, tensors, frames, models, bytes, of all that is made of large blocks.

    \b
      ksmcore run train.py --epochs 3
      ksmcore run --report out.html -m package.module --epochs 3
      ksmcore run -c "import train; train.main()"
      generate | ksmcore run - --epochs 3

    Options of ksmcore go before SCRIPT; what follows it is the program's. Its input, output, exit
    status and tracebacks are its own. A summary of what was saved is written to stderr at the end;
    there is none when the program is killed by a signal, or leaves by os._exit. Meanwhile `ksmcore
    live PID` shows the numbers; what --json wrote `ksmcore report FILE` shows afterwards. Processes
    that it starts run without ksmcore. Those that it forks go on with the allocator and have no
    scanner: nothing is merged in them unless they call ksmcore.start(). Options of Python go
    before: python -W error -m ksmcore run ...

    What libraries ask of malloc and its kin is reached by redirecting these functions, where the C
    library is GNU's; elsewhere, and with --memory numpy, only NumPy's arrays are. pyarrow is told
    to use malloc (ARROW_DEFAULT_MEMORY_POOL=system), unless that variable is set. Libraries with an
    allocator of their own (polars) are not reached; the summary tells how much memory was not, and
    is equal.

    With --children those that import NumPy have both, each for its own memory: programs of Python
    that it starts, and workers of multiprocessing and concurrent.futures, however they are started.
    The summary adds them up. They learn of it by PYTHONPATH, so not where that is ignored (python
    -I, -E, -S).

    Calls that read into an array, such as readinto(), never meet the moment in which it is merged.
    Where `ksmcore doctor` names another guard than userfaultfd, that takes the GNU C library, and
    what goes past it (io_uring, say) may fail with EFAULT then.
    """
    if report is not None and json is not None and report.is_same_file(json):
        raise click.UsageError("--report and --json name the same file")
    program = _program(script, args, is_module, is_code)
    if is_disabled() and report is None and json is None:
        from ksmcore.cli.untouched import Untouched

        return _accompanying(lambda: Untouched(quiet), program)
    from ksmcore.cli.run import RunOptions, Session

    options = RunOptions(
        threshold_bytes=threshold,
        memory=memory,
        scans=not no_scan,
        interval_ms=interval,
        quiet=quiet,
        report=report,
        json=json,
        children=children,
    )
    return _accompanying(lambda: Session(program, options), program)


@cli.command(
    context_settings=PROGRAM_SETTINGS,
    short_help="What could merging save, in a program or in running processes?",
)
@_program_arguments(required=False)
@click.option(
    "--pid",
    "pids",
    type=click.IntRange(min=1),
    multiple=True,
    help="Look at this running process instead; again for more.",
)
@click.option(
    "--whole", is_flag=True, help="Look at all memory of the program, not only at its arrays."
)
@threshold
@whose_memory
@click.option(
    "--json", type=Output(), metavar="FILE", help="Write what was found (JSON) at the end."
)
def estimate(
    script: str | None,
    args: tuple[str, ...],
    is_module: bool,
    is_code: bool,
    pids: tuple[int, ...],
    whole: bool,
    threshold: int,
    memory: Whose | None,
    json: OutputFile | None,
) -> Runner | int:
    """Run a Python program and count what `ksmcore run` could save. Nothing is merged.

    \b
      ksmcore estimate train.py --epochs 3    what `run` would reach
      ksmcore estimate --whole train.py       all its memory, by mapping and library
      ksmcore estimate --pid 4711 --pid 4712  any processes, as they are now

    The program is looked at now and then, for a twentieth of the time, and once at the end. What is
    found is written to stderr. Pages that a real run would find changing all the time are counted
    too, so a real run may save less.

    With --pid nothing is run: processes of any kind are looked at from outside, which needs the
    rights of a debugger. What is equal inside each, and across them, is written to stdout. They go
    on meanwhile. `ksmcore run` merges inside a process only, and not all that is counted here. What
    the kernel keeps once anyway is not looked at: files as they are on the disk, and shared memory.
    The exit status is 1 if one of them could not be looked at.
    """
    if pids:
        if script is not None or is_module or is_code or whole:
            raise click.UsageError("--pid looks at processes that run: no program can be run too")
        from ksmcore.cli.inventory import look_at

        _print_anything()
        return look_at(pids, json)
    if script is None:
        raise click.UsageError("what shall be looked at? Name a SCRIPT, or a process with --pid")
    from ksmcore.cli.estimate import Watch, WholeWatch

    program = _program(script, args, is_module, is_code)
    watch = WholeWatch if whole else Watch
    return _accompanying(lambda: watch(program, threshold, memory, json), program)


@cli.command(short_help="Show again what was written by --json.")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, readable=True))
def report(file: str) -> None:
    """Show the numbers that `ksmcore run --json FILE` or `ksmcore estimate --json FILE` wrote, as a
    summary."""
    from ksmcore.cli.afterwards import NotOursError, tell

    _print_anything()
    try:
        tell(file)
    except (NotOursError, OSError) as error:
        raise click.ClickException(str(error)) from None


@cli.command(short_help="Does it work here, how well, and what would help?")
@click.option("--json", "as_json", is_flag=True, help="Write it as JSON.")
@click.pass_context
def doctor(ctx: click.Context, as_json: bool) -> None:
    """Look at the kernel, the limits and the settings here, merge a few pages, and tell what would
    make it better.

    Each line is "ok", "ok, but" (works, and could be better), WEAK (does not work as it should) or
    BROKEN (nothing can be merged). The exit status is 0 if the worst of them is ok, with advice or
    without, 1 if it is WEAK and 2 if it is BROKEN.

    \b
    JSON: {"schema": 1, "ksmcore": version, "health": "healthy" | "weak" | "broken",
      "exit_status": 0 | 1 | 2,
      "checks": [{"name", "level": "good" | "advice" | "weak" | "broken", "text",
                  "remedy": text or null, "facts": {...}}, ...]}
    Names, levels and facts keep their meaning while "schema" is 1; more may be added.
    """
    from ksmcore.cli.checkup import show
    from ksmcore.doctor import examine

    _print_anything()
    diagnosis = examine()
    if as_json:
        click.echo(json.dumps(diagnosis.as_dict(), indent=1))
    else:
        show(diagnosis)
    ctx.exit(diagnosis.exit_status)


@cli.command(short_help="Watch a running process.")
@click.argument("pid", type=click.IntRange(min=1))
@click.option("--once", is_flag=True, help="Show one picture and end.")
@click.option(
    "--interval",
    type=click.FloatRange(min=0.1),
    default=1.0,
    show_default=True,
    metavar="SECONDS",
    help="Time between two pictures.",
)
def live(pid: int, once: bool, interval: float) -> None:
    """Watch a process that was started by `ksmcore run`: its memory, counters, regions and scanner.

    Of any other process it shows what the kernel tells of its memory. Ctrl-C ends it. Where stdout
    is no terminal there is one picture, as with --once.
    """
    from ksmcore.cli.live import follow
    from ksmcore.cli.serving import NotAnsweringError

    _print_anything()
    try:
        follow(pid, interval, once=once)
    except (ProcessLookupError, NotAnsweringError) as error:
        raise click.ClickException(str(error)) from None


@cli.command(short_help="See it work.")
@click.option("--scale", type=float, default=1.0, show_default=True, help="Size of the work.")
@click.option("--no-progress", is_flag=True, help="Show no progress bar.")
@click.pass_context
def demo(ctx: click.Context, scale: float, no_progress: bool) -> None:
    """See it work: the history of a simulation and a family of models, some hundred megabytes,
    merged, written to, and verified to the last byte."""
    from ksmcore.cli.demo import MOST_SCALE, demonstrate

    if not 0 < scale <= MOST_SCALE:
        raise click.BadParameter(f"must be above 0 and at most {MOST_SCALE}", param_hint="--scale")
    ctx.exit(demonstrate(scale, progress=not no_progress))
