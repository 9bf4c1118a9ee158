"""A collector for prometheus_client (extra `prometheus`).

    from prometheus_client import REGISTRY, start_http_server
    from ksmcore.prometheus import Collector
    REGISTRY.register(Collector())        # the default engine; or Collector(engine, name="frames")
    start_http_server(8000)

A scrape reads counters, and asks the kernel for nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector as BaseCollector

from ksmcore import default_engine
from ksmcore._engine.counters import NUMBERS
from ksmcore._engine.engine import Engine

__all__ = ["Collector"]


class Collector(BaseCollector):
    """The numbers of an engine as metrics `ksmcore_...`, with the label `engine`."""

    def __init__(self, engine: Engine | None = None, *, name: str = "default") -> None:
        self._engine = default_engine() if engine is None else engine
        self._name = name

    def collect(self) -> Iterator[Metric]:
        """Nothing once the engine is closed."""
        if self._engine.closed:
            return
        stats = self._engine.stats()
        for name, meaning in NUMBERS.items():
            if meaning.kind == "text" or name == "pages_skipped":
                continue  # that sum is left to who scrapes, and gets it by reason
            value = getattr(stats, name)
            parts = {(part,): n for part, n in value.items()} if meaning.by else {(): value}
            family = CounterMetricFamily if meaning.kind == "counter" else GaugeMetricFamily
            metric = family(
                f"ksmcore_{'pages_skipped' if name == 'skipped' else name}",
                meaning.sentence,
                labels=["engine", meaning.by] if meaning.by else ["engine"],
            )
            for part, number in parts.items():
                metric.add_metric([self._name, *part], number)
            yield metric
