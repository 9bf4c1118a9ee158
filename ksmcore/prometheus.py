"""A collector for prometheus_client (extra `prometheus`).

    from prometheus_client import REGISTRY, start_http_server
    from ksmcore.prometheus import Collector
    REGISTRY.register(Collector())        # the default engine; or Collector(engine, name="frames")
    start_http_server(8000)

A scrape reads counters, and asks the kernel for the PSS of the process.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector as BaseCollector

from ksmcore import __version__, default_engine, memory_info
from ksmcore._engine.counters import NUMBERS, Meaning, Stats
from ksmcore._engine.engine import Engine

__all__ = ["Collector"]

# Where the rule of `metric_name` does not do.
NAMES = {
    "general_profit": "general_profit_bytes",
    "seconds": "stage_seconds",
    "passes_put_off": "put_off_passes",
}
UNITS = {"bytes", "pages", "maps"}
# What a number was called where that was not its own name.
OLD_NAMES = {"skipped": "pages_skipped"}


def metric_name(name: str) -> str:
    """The name of a number as Prometheus has names: the unit last."""
    if name in NAMES:
        return NAMES[name]
    words = OLD_NAMES.get(name, name).split("_")
    return "_".join(sorted(words, key=lambda word: word in UNITS))


class Collector(BaseCollector):
    """The numbers of an engine as metrics `ksmcore_...`, with the label `engine`.

    `memory`: PSS and RSS of the process too. `old_names`: what has another name now, under that of
    before as well.
    """

    def __init__(
        self,
        engine: Engine | None = None,
        *,
        name: str = "default",
        memory: bool = True,
        old_names: bool = True,
    ) -> None:
        self._engine = default_engine() if engine is None else engine
        self._name = name
        self._with_memory = memory
        self._with_old_names = old_names

    def collect(self) -> Iterator[Metric]:
        """Nothing once the engine is closed."""
        if self._engine.closed:
            return
        stats = self._engine.stats()
        yield self._info(stats)
        for name, meaning in NUMBERS.items():
            if meaning.kind == "text" or name == "pages_skipped":
                continue  # that sum is left to who scrapes, and gets it by reason
            value = getattr(stats, name)
            new, old = metric_name(name), OLD_NAMES.get(name, name)
            yield self._family(new, meaning, value)
            if self._with_old_names and old != new:
                sentence = (
                    f"{meaning.sentence} (Old name of ksmcore_{new}, until the next release.)"
                )
                yield self._family(old, meaning._replace(sentence=sentence), value)
        if self._with_memory:
            with contextlib.suppress(OSError):  # where there is no /proc
                yield from self._memory()

    def _family(
        self, name: str, meaning: Meaning, value: float | Mapping[str, float]
    ) -> CounterMetricFamily | GaugeMetricFamily:
        family = CounterMetricFamily if meaning.kind == "counter" else GaugeMetricFamily
        labels = ["engine", meaning.by] if meaning.by else ["engine"]
        metric = family(f"ksmcore_{name}", meaning.sentence, labels=labels)
        if isinstance(value, Mapping):
            for part, number in value.items():
                metric.add_metric([self._name, part], number)
        else:
            metric.add_metric([self._name], value)
        return metric

    def _info(self, stats: Stats) -> Metric:
        metric = InfoMetricFamily("ksmcore", "What the engine is made of.", labels=["engine"])
        told = {"version": __version__, "guard": str(stats.guard), "tracker": str(stats.dirty)}
        metric.add_metric([self._name], told)
        return metric

    def _memory(self) -> Iterator[Metric]:
        found = memory_info()
        for name, n_bytes, sentence in (
            ("pss", found.pss, "Memory of the process; what is shared counts in part (PSS)."),
            ("rss", found.rss, "The same, with a shared page at each place that maps it (RSS)."),
        ):
            metric = GaugeMetricFamily(f"ksmcore_process_{name}_bytes", sentence, labels=["engine"])
            metric.add_metric([self._name], n_bytes)
            yield metric
