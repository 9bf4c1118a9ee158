"""Prints what the figures depend on before the benchmarks, and a table of memory after them."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import pytest

import ksmcore
from bench import corpora, measure
from ksmcore._kernel import procfs


def _line_of(path: str, otherwise: str = "not there") -> str:
    try:
        return Path(path).read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return otherwise


def _processor() -> str:
    return procfs.words("/proc/cpuinfo").get("model name", platform.machine())


def pytest_report_header() -> list[str]:
    huge = "/sys/kernel/mm/transparent_hugepage"
    memory = os.sysconf("SC_PHYS_PAGES") * corpora.PAGE / 2**30
    load = " ".join(f"{value:.2f}" for value in os.getloadavg())
    missing = [f"{name} ({why})" for name, why in ksmcore.features().items() if why is not None]
    settings = ", ".join(f"{name}={value!r}" for name, value in _settings().items())
    size = corpora.n_pages_asked() * corpora.PAGE >> 20
    return [
        f"machine: {_processor()}, {os.cpu_count()} processors, {memory:.1f} GiB, load {load}",
        f"kernel: {platform.release()}, pages of {corpora.PAGE} bytes, "
        f"max_map_count {procfs.max_map_count()}",
        f"huge pages: enabled {_line_of(f'{huge}/enabled')}, defrag {_line_of(f'{huge}/defrag')}, "
        f"memory files {_line_of(f'{huge}/shmem_enabled')}",
        f"ksmcore {ksmcore.__version__}: {settings}; kernel features missing: "
        f"{', '.join(missing) or 'none'}",
        f"one copy: {size} MiB (KSMCORE_BENCH_MIB)",
    ]


def _settings() -> dict[str, object]:
    with ksmcore.Engine() as engine:
        stats = engine.stats()
        return {**engine.settings.as_dict(), "guard": stats.guard, "dirty": stats.dirty}


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    write = terminalreporter.write_line
    if measure.in_turns:
        terminalreporter.section("medians, in turns")
    for name, ours, others in measure.in_turns:
        write(f"{name}: {ours * 1e3:.2f} ms, NumPy's own {others * 1e3:.2f}: {ours / others:.2f}")
    if not measure.rows:
        return
    terminalreporter.section("memory, by the kernel's account")
    width = max(len(row.name) for row in measure.rows)
    write(f"{'':<{width}}{'pages':>9}{'s/GiB':>8}{'mappings':>16}{'saved (PSS)':>13}")
    for row in measure.rows:
        speed = "" if row.seconds_per_gib is None else f"{row.seconds_per_gib:.3f}"
        maps = f"{row.maps_before} -> {row.maps_after}"
        saved = f"{row.pss_saved_bytes / 2**20:.1f} MiB"
        figures = f"{row.n_pages:>9}{speed:>8}{maps:>16}{saved:>13}"
        write(f"{row.name:<{width}}{figures}  {row.note}".rstrip())
