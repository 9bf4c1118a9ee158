"""Kernel Samepage Merging inside one process, for Python programs that hold large arrays.

    import ksmcore
    region = ksmcore.register(buffer)    # any contiguous buffer; a tensor, a model, a data frame
    ksmcore.start()                      # a background scanner; stop() ends it
    report = ksmcore.scan()              # one pass; or dedup(a, b, c): register and merge now
    ksmcore.unregister(region)           # plain private memory again, same bytes

Equal pages are found, kept once, mapped copy-on-write, and the rest goes back to the operating
system. Writes keep working and never show through. The functions of this module use a default
engine; `Engine` makes further ones, which share nothing with each other.

PYTEST_DONT_REWRITE (there is nothing to rewrite; it would warn where this is imported before it)
"""

from __future__ import annotations

from ksmcore._platform import is_disabled, require_linux

require_linux()

import importlib  # noqa: E402
import operator  # noqa: E402
from typing import TYPE_CHECKING, Any, overload  # noqa: E402

from ksmcore.sizes import THRESHOLD_BYTES  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager
    from typing import Literal, SupportsIndex

    from numpy.typing import ArrayLike, DTypeLike, NDArray
    from typing_extensions import Buffer

    from ksmcore._arrays.installing import Allocator
    from ksmcore._arrays.installing import install as _install
    from ksmcore._arrays.installing import uninstall as _uninstall
    from ksmcore._arrays.making import Order
    from ksmcore._engine.all_engines import process_memory_info as memory_info
    from ksmcore._engine.area import Area
    from ksmcore._engine.changes import Changes
    from ksmcore._engine.counters import Stats
    from ksmcore._engine.engine import Engine
    from ksmcore._engine.features import features
    from ksmcore._engine.history import History, Sample
    from ksmcore._engine.page_state import PageState
    from ksmcore._engine.progress import Progress
    from ksmcore._engine.region import Region
    from ksmcore._engine.settings import Settings
    from ksmcore._engine.stats import Estimate, MemoryInfo, PassReport, RegionStats
    from ksmcore._gate.phase import PhaseWarning
    from ksmcore._show.plotting import Picture
    from ksmcore.errors import InternalError

__all__ = [
    "Area",
    "Changes",
    "Engine",
    "Estimate",
    "History",
    "InternalError",
    "MemoryInfo",
    "PageState",
    "PassReport",
    "PhaseWarning",
    "Region",
    "RegionStats",
    "Sample",
    "Settings",
    "Stats",
    "allocator",
    "area",
    "array",
    "changed",
    "configure",
    "copy",
    "dedup",
    "default_engine",
    "empty",
    "estimate",
    "features",
    "full",
    "hold",
    "html_report",
    "install_allocator",
    "memory_info",
    "plot",
    "register",
    "rows",
    "scan",
    "start",
    "stats",
    "stop",
    "uninstall_allocator",
    "unmerge",
    "unregister",
    "zeros",
]

# Here, and nowhere else: to ask the installed package for it takes as long as half of this import.
__version__ = "0.2.0"


# The public names that are made elsewhere, and where; with the name there, if that is another.
_ELSEWHERE = {
    "Allocator": "_arrays.installing",
    "Area": "_engine.area",
    "Changes": "_engine.changes",
    "Engine": "_engine.engine",
    "Estimate": "_engine.stats",
    "History": "_engine.history",
    "InternalError": "errors",
    "MemoryInfo": "_engine.stats",
    "PageState": "_engine.page_state",
    "PassReport": "_engine.stats",
    "PhaseWarning": "_gate.phase",
    "Region": "_engine.region",
    "RegionStats": "_engine.stats",
    "Sample": "_engine.history",
    "Settings": "_engine.settings",
    "Stats": "_engine.counters",
    "features": "_engine.features",
    "_install": "_arrays.installing:install",
    "_uninstall": "_arrays.installing:uninstall",
    "memory_info": "_engine.all_engines:process_memory_info",
}


def _load() -> None:
    """Have all of them here. Again, it costs next to nothing."""
    if "Engine" in globals():
        return
    found = {}
    for name, place in _ELSEWHERE.items():
        module, _, its_name = place.partition(":")
        found[name] = getattr(importlib.import_module(f"ksmcore.{module}"), its_name or name)
    globals().update(found)


# At once: a process that forks while another thread imports leaves its child waiting for ever, and
# one that locks itself in finds no files later. But where nothing is to be merged only what is used
# comes, when it is first used: there a program is to pay nothing.
if not is_disabled():
    _load()

if not TYPE_CHECKING:  # which would take any name then

    def __getattr__(name: str) -> Any:
        if name not in _ELSEWHERE or name in globals():
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        _load()
        return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_engines: dict[str, Engine] = {}


def default_engine() -> Engine:
    """The engine behind the functions of this module; made when it is first needed."""
    engine = _engines.get("default")
    if engine is None:
        _load()
        # No lock, which a signal handler on this thread, or a forked child, would wait for: of two
        # that make one at a time, the first wins.
        made = Engine()
        engine = _engines.setdefault("default", made)
        if engine is not made:
            made.close()
    return engine


def configure(**changes: Any) -> Settings:
    """`Engine.configure` of the default engine."""
    return default_engine().configure(**changes)


@overload
def register(buffer: Buffer, *, name: str | None = None, privatize: bool = False) -> Region: ...
@overload
def register(
    buffer: object, *, name: str | None = None, privatize: bool = False
) -> Region | Area: ...
def register(buffer: object, *, name: str | None = None, privatize: bool = False) -> Region | Area:
    """`Engine.register` of the default engine: let the pages of a buffer, or of all memory that an
    object holds, be merged."""
    return default_engine().register(buffer, name=name, privatize=privatize)


def unregister(buffer: object) -> None:
    """Make the pages of a region, an area, or of what is registered of an object, plain private
    memory again, whichever engine has the region or area (all else is looked up in the default
    engine). See `Engine.unregister`."""
    _load()
    if isinstance(buffer, Region | Area):
        buffer.close()
    else:
        default_engine().unregister(buffer)


def hold(buffer: object) -> AbstractContextManager[None]:
    """Keep the scanner away from registered memory while system calls write into it, whichever
    engine has the region (a bare buffer: the default engine). See `Engine.hold`."""
    _load()
    return buffer.hold() if isinstance(buffer, Region) else default_engine().hold(buffer)


def scan(*, progress: Progress = None) -> PassReport:
    """`Engine.scan` of the default engine: one full pass by the rules of KSM."""
    return default_engine().scan(progress=progress)


def dedup(*buffers: object, progress: Progress = None) -> PassReport:
    """`Engine.dedup` of the default engine: register what is not yet registered, and merge now."""
    return default_engine().dedup(*buffers, progress=progress)


def start(**changes: Any) -> AbstractContextManager[Engine]:
    """`Engine.start` of the default engine: scan in the background; `with` stops it again."""
    return default_engine().start(**changes)


def stop() -> None:
    """`Engine.stop` of the default engine: what is merged stays."""
    default_engine().stop()


def area() -> Area:
    """`Engine.area` of the default engine: regions that are removed together."""
    return default_engine().area()


def unmerge() -> None:
    """`Engine.unmerge` of the default engine: plain private memory again, still registered."""
    default_engine().unmerge()


def estimate(*buffers: object, progress: Progress = None) -> Estimate:
    """`Engine.estimate` of the default engine: what would be saved; changes nothing."""
    return default_engine().estimate(*buffers, progress=progress)


def stats() -> Stats:
    """`Engine.stats` of the default engine: all counters of this moment."""
    return default_engine().stats()


def empty(
    shape: SupportsIndex | Sequence[SupportsIndex],
    dtype: DTypeLike = float,
    order: Order = "C",
) -> NDArray[Any]:
    """`Engine.empty` of the default engine: a page-aligned, registered array."""
    return default_engine().empty(shape, dtype, order)


def zeros(
    shape: SupportsIndex | Sequence[SupportsIndex],
    dtype: DTypeLike = float,
    order: Order = "C",
) -> NDArray[Any]:
    """`Engine.zeros` of the default engine: a page-aligned, registered array of zeros."""
    return default_engine().zeros(shape, dtype, order)


def full(
    shape: SupportsIndex | Sequence[SupportsIndex],
    fill_value: Any,
    dtype: DTypeLike | None = None,
    order: Order = "C",
) -> NDArray[Any]:
    """`Engine.full` of the default engine: a page-aligned, registered array of one value."""
    return default_engine().full(shape, fill_value, dtype, order)


def rows(
    n: SupportsIndex,
    row_shape: SupportsIndex | Sequence[SupportsIndex],
    dtype: DTypeLike = float,
) -> NDArray[Any]:
    """`Engine.rows` of the default engine: an array whose rows each begin on a page."""
    return default_engine().rows(n, row_shape, dtype)


def array(source: ArrayLike, dtype: DTypeLike | None = None) -> NDArray[Any]:
    """`Engine.array` of the default engine: a page-aligned, registered copy of any array-like."""
    return default_engine().array(source, dtype)


def copy(source: NDArray[Any]) -> NDArray[Any]:
    """`Engine.copy` of the default engine: a page-aligned, registered copy of an array."""
    return default_engine().copy(source)


def changed(copy: NDArray[Any], *, since: NDArray[Any]) -> Changes:
    """`Engine.changed` of the default engine: which pages and rows of a copy differ from its
    source, reading only pages that they do not share."""
    return default_engine().changed(copy, since=since)


def allocator(threshold_bytes: SupportsIndex = THRESHOLD_BYTES) -> Allocator:
    """Have large NumPy arrays be page-aligned and registered with the default engine, while in the
    block:

        with ksmcore.allocator():
            model = load()               # every array of 64 KiB and more, whoever makes it

    It holds for this thread, or asynchronous task (for this context, as NEP 49 has it); a thread
    begins with a context of its own (before Python 3.14), so have it enter the block itself, or use
    `install_allocator`. Arrays stay what they are when the block is left, and give their memory
    back when they are collected.

    Raises:
        TypeError, ValueError: threshold_bytes is no positive integer.
    """
    _load()
    return Allocator(default_engine(), threshold_bytes)


def install_allocator(
    threshold_bytes: SupportsIndex = THRESHOLD_BYTES,
    *,
    memory: Literal["numpy", "all"] = "numpy",
    max_free_bytes: SupportsIndex | None = None,
) -> None:
    """Have all large NumPy arrays of the process be page-aligned and registered with the default
    engine from now on, in all threads, those that run already among them. Again: with another
    threshold.

    Arrays of less than threshold_bytes bytes, those that exist already, and those of a context with
    another allocator (NEP 49) are left alone. A forked child goes on with it, with its own engine.

    `memory="all"`: the same for what libraries ask of malloc and its kin, so for tensors, `bytes`,
    frames and models too. The functions are redirected for all loaded objects, and stay so; with
    the GNU C library only.

    `max_free_bytes`: most freed memory that is kept for the next arrays, of what was needed in the
    last second; None: an eighth of what the machine and the control group have left.

    Raises:
        TypeError, ValueError: threshold_bytes is no positive integer; max_free_bytes is negative,
            or none; memory is something else, or "all" is not to be had here.
    """
    _load()
    _install(default_engine(), threshold_bytes, memory, max_free_bytes)


def uninstall_allocator() -> None:
    """Leave new arrays to NumPy's own allocator again. Arrays that exist stay registered until they
    are collected. Nothing happens when it is not installed."""
    _load()
    _uninstall()


def html_report(
    engine: Engine | None = None,
    *,
    title: str = "ksmcore",
    command: str | Sequence[str] | None = None,
    exit_status: int | None = None,
) -> str:
    """One HTML page, complete in itself, about an engine (None: the default engine) and the memory
    of this process.

    It shows what is saved, over time too, what each page of the largest regions is, all counters
    with their meanings, what was left out and what can be done about it, the settings, and the
    machine (not its name). Of a closed engine there are no page maps.

    `command`: the program that was run, as text or as a list of arguments; `exit_status`: what it
    ended with. Both are shown at the top.

    Raises:
        TypeError: something else than an engine was given.
    """
    _load()
    if engine is not None and not isinstance(engine, Engine):
        raise TypeError(f"html_report is about an Engine, not {type(engine).__name__}")
    from ksmcore._show import report

    return report.html_report(
        default_engine() if engine is None else engine,
        title=title,
        command=command,
        exit_status=exit_status,
    )


def load_ipython_extension(shell: Any) -> None:
    """Called by `%load_ext ksmcore`: the magic `%%ksmcore`."""
    from ksmcore._show import magic

    magic.register(shell, default_engine, allocator)


def plot(target: Engine | Region | None = None, *, most_regions: int = 6) -> Picture:
    """Draw page maps, and of an engine what was saved over time (extra `plot`: matplotlib).

    `target`: a region, an engine with all its memory, or None for the default engine. The largest
    `most_regions` regions have a map each, all others one together. A map is made to fit: its
    caption says how many pages one cell stands for.

    Returns a `matplotlib.figure.Figure`; a notebook shows it, `savefig` keeps it. Pyplot is not
    used, and no window opens.

    Raises:
        ImportError: matplotlib is missing.
        TypeError: something else was given, or `most_regions` is no integer.
        ValueError: `most_regions` is below 0, or the region or engine is closed.
    """
    _load()
    if target is not None and not isinstance(target, Engine | Region):
        raise TypeError(f"plot draws an Engine or a Region, not {type(target).__name__}")
    most_regions = operator.index(most_regions)
    if most_regions < 0:
        raise ValueError(f"most_regions must be at least 0, not {most_regions}")
    from ksmcore._show import plotting

    if isinstance(target, Region):
        return plotting.of_region(target)
    return plotting.of_engine(default_engine() if target is None else target, most_regions)
