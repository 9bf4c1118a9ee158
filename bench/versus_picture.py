"""Free memory against time while two equal copies are merged, as the original's mail showed it.

Needs matplotlib (in the extra "bench").
"""

from __future__ import annotations

import threading
import time
from pathlib import Path

import ksmcore
from bench import corpora, kernel_ksm
from bench.corpora import PAGE
from bench.versus_cases import LIMIT_SECONDS, Memory, memory_of
from ksmcore._kernel import procfs

SAMPLE_SECONDS = 0.02
BEFORE_SECONDS = 0.5
AFTER_SECONDS = 1.0


def free_mib() -> float:
    return procfs.sizes_of("/proc/meminfo")["MemFree"] / 2**20


class Sampler:
    """Free memory every SAMPLE_SECONDS, from `BEFORE_SECONDS` before the merge on."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.free: list[float] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        time.sleep(BEFORE_SECONDS)
        self._begun = time.perf_counter()

    def _run(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            self.times.append(time.perf_counter())
            self.free.append(free_mib())

    def end(self) -> tuple[list[float], list[float]]:
        """Seconds since the merge began, and MiB more than were free then."""
        time.sleep(AFTER_SECONDS)
        self._stop.set()
        self._thread.join()
        first = next(
            free for at, free in zip(self.times, self.free, strict=True) if at >= self._begun
        )
        return [at - self._begun for at in self.times], [free - first for free in self.free]


def sample(memory: Memory, kernel: bool) -> tuple[list[float], list[float]]:
    if not kernel:
        with ksmcore.Engine() as engine:
            sampler = Sampler()
            engine.dedup(*memory.arrays)
            return sampler.end()
    kernel_ksm.start_empty()
    sampler = Sampler()
    memory.mergeable()
    kernel_ksm.run()
    kernel_ksm.wait_until_saved(len(memory.arrays[0]), LIMIT_SECONDS)
    curve = sampler.end()
    kernel_ksm.start_empty()
    return curve


def draw(path: Path, n_pages: int, sides: list[bool]) -> None:
    """One curve for each side, the worst case."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "ksmcore"
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 3.5), layout="constrained")
    for kernel in sides:
        with memory_of(*[corpora.fill_tails] * 2, n_pages=n_pages) as memory:
            seconds, freed = sample(memory, kernel)
        axes.plot(seconds, freed, label="the kernel's KSM" if kernel else "ksmcore")
    axes.axvline(0, color="0.8", linewidth=1)
    axes.set_xlabel("seconds since merging began")
    axes.set_ylabel("MiB more that are free")
    mib = n_pages * PAGE >> 20
    axes.set_title(f"Two copies of {mib} MiB, pages that differ only in their last 8 bytes")
    axes.legend()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)
