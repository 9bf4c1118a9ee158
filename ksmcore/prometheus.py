"""A collector for prometheus_client (extra `prometheus`).

    from prometheus_client import REGISTRY, start_http_server
    from ksmcore.prometheus import Collector
    REGISTRY.register(Collector())        # the default engine; or Collector(engine, name="frames")
    start_http_server(8000)

Called by users, and by prometheus_client at each scrape. A scrape reads counters, and asks the
kernel for nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector as BaseCollector

from ksmcore import default_engine
from ksmcore._engine.engine import Engine

__all__ = ["Collector"]

# Of Stats: what only grows, and what goes up and down.
COUNTERS = {
    "full_scans": "Completed passes over everything registered",
    "pages_scanned": "Present pages passed",
    "pages_hashed": "Pages that were read, for their checksum",
    "pages_merged": "Pages mapped to a shared page",
    "pages_zeroed": "Zero pages given back",
    "cow_breaks": "Shared pages found copied by a write",
}
GAUGES = {
    "pages_shared": "Shared pages in use",
    "pages_sharing": "Mappings of shared pages beyond the first of each",
    "pages_unshared": "Pages that did not change and equal no other",
    "pages_quiet": "Unshared pages that are not read again until they are written",
    "pages_volatile": "Pages that changed since the last pass",
    "ksm_zero_pages": "Pages that were all zero and given back",
    "bytes_saved": "Bytes given back",
    "general_profit": "Bytes given back, less all metadata",
    "metadata_bytes": "Bytes of metadata",
    "regions": "Registered regions",
    "maps_used": "Memory mappings that the engine is taken to use",
    "maps_allowed": "Memory mappings that the engine may use",
    "run": "1 while the background scanner is wanted",
}


class Collector(BaseCollector):
    """The counters of an engine as metrics `ksmcore_...`, with the label `engine`."""

    def __init__(self, engine: Engine | None = None, *, name: str = "default") -> None:
        self._engine = default_engine() if engine is None else engine
        self._name = name

    def collect(self) -> Iterator[Metric]:
        """Nothing once the engine is closed."""
        if self._engine.closed:
            return
        stats = self._engine.stats()
        label = [self._name]
        for name, text in COUNTERS.items():
            counter = CounterMetricFamily(f"ksmcore_{name}", text, labels=["engine"])
            counter.add_metric(label, getattr(stats, name))
            yield counter
        for name, text in GAUGES.items():
            gauge = GaugeMetricFamily(f"ksmcore_{name}", text, labels=["engine"])
            gauge.add_metric(label, getattr(stats, name))
            yield gauge
        skipped = CounterMetricFamily(
            "ksmcore_pages_skipped",
            "Pages that could have been merged and were not, or were not looked at",
            labels=["engine", "reason"],
        )
        for reason, count in stats.skipped.items():
            skipped.add_metric([self._name, reason], count)
        yield skipped
        seconds = CounterMetricFamily(
            "ksmcore_seconds", "Time spent on a stage of the path", labels=["engine", "stage"]
        )
        for stage, spent in stats.seconds.items():
            seconds.add_metric([self._name, stage], spent)
        yield seconds
