"""A plugin for the workers of Dask (needs `distributed`).

    from ksmcore.dask import KsmPlugin
    client.register_plugin(KsmPlugin())   # workers that are there, and those that come later

Each worker process merges within its own memory, and tells the scheduler what it saved.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, SupportsIndex

from distributed.diagnostics.plugin import WorkerPlugin

import ksmcore
from ksmcore._engine.settings import check_names
from ksmcore._kernel.per_process import PerProcess
from ksmcore.sizes import THRESHOLD_BYTES

if TYPE_CHECKING:
    from distributed import Worker

__all__ = ["KsmPlugin"]

# The kernel walks all page tables for the PSS: so much of the time at most, and not more often.
PSS_SHARE = 1 / 50
PSS_SECONDS = 1.0

# The workers of this process that have the plugin: there can be several, in threads.
_workers: PerProcess[set[str]] = PerProcess(set)


class Footprint:
    """What a process takes: its PSS, measured now and then; in between it goes with the RSS."""

    def __init__(self, rss_bytes: Callable[[], int]) -> None:
        self._rss_bytes = rss_bytes
        self._next_at = 0.0
        self._rss = self._pss = 0

    def __call__(self) -> int:
        """In bytes."""
        rss = self._rss_bytes()
        began = time.monotonic()
        if began >= self._next_at:
            self._rss, self._pss = rss, ksmcore.memory_info().pss
            took = time.monotonic() - began
            self._next_at = began + max(PSS_SECONDS, took / PSS_SHARE)
        return max(self._pss + rss - self._rss, 0)


class KsmPlugin(WorkerPlugin):  # type: ignore[misc]
    """Has the large arrays of each worker be merged: the allocator, the background scanner, and
    numbers as the metric "ksmcore" of the worker.

    `threshold_bytes` and `memory` are those of `ksmcore.install_allocator`; `settings` those of
    `ksmcore.start`. `scans=False`: no scanner, tasks call ksmcore themselves.

    `counts="pss"`: what Dask takes for the memory of a worker, on the dashboard and where it spills
    or pauses, is its PSS, in which a shared page counts once. "rss" leaves that as it is: then a
    page counts at each place that maps it, as if nothing were merged.

    Raises:
        TypeError, ValueError: as these functions, on the workers; for settings here too.
    """

    name = "ksmcore"

    def __init__(
        self,
        *,
        threshold_bytes: SupportsIndex = THRESHOLD_BYTES,
        memory: Literal["numpy", "all"] = "numpy",
        scans: bool = True,
        counts: Literal["pss", "rss"] = "pss",
        **settings: Any,
    ) -> None:
        if counts not in ("pss", "rss"):
            raise ValueError(f"counts must be 'pss' or 'rss', not {counts!r}")
        check_names(settings)
        self._threshold_bytes = threshold_bytes
        self._memory: Literal["numpy", "all"] = memory
        self._scans = scans
        self._counts = counts
        self._settings = settings

    def setup(self, worker: Worker) -> None:
        """Called by Dask in each worker."""
        ksmcore.install_allocator(self._threshold_bytes, memory=self._memory)
        if self._scans:
            ksmcore.start(**self._settings)
        else:
            ksmcore.configure(**self._settings)
        _workers.get().add(worker.id)
        worker.metrics["ksmcore"] = _metric
        if self._counts == "pss":
            worker.monitor.get_process_memory = Footprint(worker.monitor.get_process_memory)

    def teardown(self, worker: Worker) -> None:
        """Called by Dask. What is merged stays so until it is collected."""
        worker.metrics.pop("ksmcore", None)
        vars(worker.monitor).pop("get_process_memory", None)  # that of its class is back
        _workers.get().discard(worker.id)
        if not _workers.get():
            ksmcore.stop()
            ksmcore.uninstall_allocator()


def _metric(worker: Worker) -> dict[str, float]:
    """With each heartbeat."""
    engine = ksmcore.default_engine()
    stats = engine.stats()
    return {
        "bytes_saved": stats.bytes_saved,
        "peak_bytes_saved": engine.peak_bytes_saved,
        "pages_shared": stats.pages_shared,
        "pages_sharing": stats.pages_sharing,
        "regions": stats.regions,
        "full_scans": stats.full_scans,
        "scanner_seconds": stats.scanner_seconds,
        "memory_bytes": worker.monitor.get_process_memory(),
    }
