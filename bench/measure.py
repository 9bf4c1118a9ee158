"""How benchmarks run, check themselves and report: by the kernel's figures, not by our counters.

Called by the benchmarks, and by conftest.py, which prints the table collected here.
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

import numpy as np

import ksmcore
from bench.corpora import PAGE, Pages
from ksmcore._kernel import smaps

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

Case = TypeVar("Case")
Result = TypeVar("Result")

ROUNDS = 3
# Between a saving and the fall of PSS: this part of it, and what the interpreter takes meanwhile.
TOLERANCE = 0.03
SLACK_BYTES = 1 << 20


def load_c(name: str, level: str) -> ctypes.CDLL | None:
    """A program in C of this folder, compiled at this level and loaded; None without a compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, f"{name}.so")
        source = Path(__file__).with_name(name)
        subprocess.run([compiler, level, "-shared", "-fPIC", "-o", path, source], check=True)
        return ctypes.CDLL(str(path))


@dataclass(frozen=True)
class Kernel:
    """What the kernel says of this process at one moment."""

    pss_bytes: int
    n_maps: int

    @classmethod
    def now(cls) -> Kernel:
        gc.collect()
        # What was freed, the records of engines of rounds before included, goes back to the kernel:
        # or it would count, or go, at a moment of its own choosing. Not in every C library.
        if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
            trim(0)
        # Not ksmcore.memory_info(): its list of some thousand mappings would take memory itself.
        return cls(smaps.smaps_rollup()["Pss"], smaps.count_maps())


@dataclass(frozen=True)
class Row:
    """One line of the table after the benchmarks."""

    name: str
    n_pages: int
    seconds_per_gib: float | None
    maps_before: int
    maps_after: int
    pss_saved_bytes: int
    note: str


rows: list[Row] = []
# (name, seconds of ours, of NumPy's own): medians of rounds in turns.
in_turns: list[tuple[str, float, float]] = []


def digest(pages: Pages) -> bytes:
    return hashlib.blake2b(pages.reshape(-1).data, digest_size=16).digest()


def read_all(pages: Pages) -> int:
    """Read every byte; the sum, so that nothing can leave the reading out."""
    return int(pages.view(np.uint64).sum())


def assert_pss(fell_bytes: int, expected_bytes: int) -> None:
    """PSS fell (or, both negative, grew) as expected."""
    allowed = TOLERANCE * abs(expected_bytes) + SLACK_BYTES
    assert abs(fell_bytes - expected_bytes) <= allowed, (
        f"PSS fell by {fell_bytes:,} bytes and not by {expected_bytes:,}"
    )


def assert_met(n_scanned: int, n_pages: int) -> None:
    """Every page was looked at; one that the kernel is moving at that moment cannot be."""
    assert n_scanned >= n_pages, (
        f"{n_pages - n_scanned} pages were not there to be scanned. If the kernel was "
        "compacting memory (pgmigrate_success in /proc/vmstat grew), run this again"
    )


class Merged:
    """An engine with some pages, before and after merging; for use in one round."""

    def __init__(self, *fills: Callable[[Pages], object], n_pages: int, **settings: object) -> None:
        """One array of `n_pages` for each of `fills`, which writes its contents."""
        self.engine = ksmcore.Engine(**settings)
        self.arrays: list[Pages] = []
        for fill in fills:
            self.arrays.append(self.engine.empty((n_pages, PAGE), np.uint8))
            fill(self.arrays[-1])
        self.digests = [digest(pages) for pages in self.arrays]
        self.start()

    def start(self) -> None:
        """Measure from here on."""
        self.metadata_bytes = self.engine.stats().metadata_bytes
        self.bytes_saved = self.engine.stats().bytes_saved
        self.before = Kernel.now()

    def check(self) -> Kernel:
        """All contents are right, and PSS fell by what was saved, less the engine's records.

        Measured after everything was read, for a merged page that nobody has read yet is missing
        from PSS.
        """
        for pages, known in zip(self.arrays, self.digests, strict=True):
            assert digest(pages) == known
        after = Kernel.now()
        stats = self.engine.stats()
        records = stats.metadata_bytes - self.metadata_bytes
        saved = stats.bytes_saved - self.bytes_saved
        assert_pss(self.before.pss_bytes - after.pss_bytes, saved - records)
        return after

    def close(self) -> None:
        """End the engine; the contents stay."""
        self.engine.close()
        for pages, known in zip(self.arrays, self.digests, strict=True):
            assert digest(pages) == known
        self.arrays.clear()


def run(
    benchmark: BenchmarkFixture,
    prepare: Callable[[], Case],
    work: Callable[[Case], Result],
    finish: Callable[[Case, Result], None],
) -> None:
    """Time `work`, each round on a case of its own, which `finish` checks and closes, untimed."""
    cases: list[Case] = []
    results: list[Result] = []

    def settle() -> None:
        while results:
            finish(cases.pop(), results.pop())

    def setup() -> None:
        settle()
        cases.append(prepare())

    pedantic = cast(Callable[..., None], benchmark.pedantic)
    pedantic(lambda: results.append(work(cases[0])), setup=setup, rounds=ROUNDS)
    settle()


def run_again(benchmark: BenchmarkFixture, work: Callable[[], Result]) -> list[Result]:
    """Time `work`, which changes nothing, round by round after one that does not count."""
    results: list[Result] = []
    pedantic = cast(Callable[..., None], benchmark.pedantic)
    pedantic(lambda: results.append(work()), rounds=ROUNDS, warmup_rounds=1)
    return results


def record(
    benchmark: BenchmarkFixture,
    n_pages: int,
    before: Kernel | None = None,
    after: Kernel | None = None,
    note: str = "",
) -> None:
    """Add a benchmark to the table and to its extra_info. `n_pages`: the pages it went over."""
    if before is None or after is None:
        before = after = Kernel.now()
    seconds = benchmark.stats.stats.median if benchmark.stats is not None else None
    row = Row(
        name=benchmark.name.removeprefix("test_"),
        n_pages=n_pages,
        seconds_per_gib=None if seconds is None else seconds * 2**30 / (n_pages * PAGE),
        maps_before=before.n_maps,
        maps_after=after.n_maps,
        pss_saved_bytes=before.pss_bytes - after.pss_bytes,
        note=note,
    )
    rows.append(row)
    benchmark.extra_info.update(
        pages=row.n_pages,
        seconds_per_gib=row.seconds_per_gib,
        maps_before=row.maps_before,
        maps_after=row.maps_after,
        pss_saved_bytes=row.pss_saved_bytes,
        note=note,
    )
