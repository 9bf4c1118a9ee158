"""The Prometheus collector, scraped over HTTP as Prometheus does."""

import urllib.request

import numpy as np
import pytest

import ksmcore
from ksmcore._engine.counters import NUMBERS

prometheus_client = pytest.importorskip("prometheus_client")


@pytest.fixture
def scrape(engine):
    """Register a collector of the engine, and serve it; gives a function that scrapes."""
    from ksmcore.prometheus import Collector

    registry = prometheus_client.CollectorRegistry()
    registry.register(Collector(engine, name="tests"))
    server, thread = prometheus_client.start_http_server(0, addr="127.0.0.1", registry=registry)

    def get():
        with urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}/metrics") as answer:
            lines = answer.read().decode().splitlines()
        samples = [line.rpartition(" ") for line in lines if not line.startswith("#")]
        return {name: float(value) for name, _, value in samples}

    yield get
    server.shutdown()
    server.server_close()
    thread.join()


def test_scrape(engine, scrape, rng):
    a = engine.empty((40, 4096), np.uint8)
    a[:] = rng.integers(0, 256, a.shape, dtype=np.uint8)
    b = engine.array(a)
    engine.dedup()
    samples = scrape()
    assert samples['ksmcore_pages_sharing{engine="tests"}'] == 40
    assert samples['ksmcore_bytes_saved{engine="tests"}'] == engine.stats().bytes_saved
    assert samples['ksmcore_full_scans_total{engine="tests"}'] == 0
    engine.scan()
    later = scrape()
    assert later['ksmcore_full_scans_total{engine="tests"}'] == 1
    assert later['ksmcore_seconds_total{engine="tests",stage="pagemap"}'] > 0
    assert later['ksmcore_pages_skipped_total{engine="tests",reason="held"}'] == 0
    assert all(later[name] >= value for name, value in samples.items() if "_total{" in name)
    assert np.array_equal(a, b)


def test_every_number_of_stats_is_a_metric(engine):
    from ksmcore.prometheus import Collector

    metrics = {
        metric.name.removeprefix("ksmcore_"): metric for metric in Collector(engine).collect()
    }
    stats = engine.stats().as_dict()
    numbers = {name for name, value in stats.items() if type(value) in (int, float)} | {"seconds"}
    assert set(metrics) == numbers
    by_reason = {one.labels["reason"]: one.value for one in metrics["pages_skipped"].samples}
    assert by_reason == stats["skipped"]
    assert {one.labels["stage"] for one in metrics["seconds"].samples} == set(stats["seconds"])


def test_what_only_grows_is_a_counter(engine):
    from ksmcore.prometheus import Collector

    metrics = {
        metric.name.removeprefix("ksmcore_"): metric for metric in Collector(engine).collect()
    }
    assert metrics["full_scans"].type == metrics["pages_skipped"].type == "counter"
    assert metrics["pages_shared"].type == metrics["maps_used"].type == "gauge"
    assert metrics["full_scans"].documentation == "Completed passes over everything registered."
    for name in {*metrics} - {"pages_skipped"}:
        assert (metrics[name].type, metrics[name].documentation) == (
            NUMBERS[name].kind,
            NUMBERS[name].sentence,
        )


def test_a_closed_engine_has_no_metrics(scrape, engine):
    assert any(name.startswith("ksmcore_") for name in scrape())
    engine.close()
    assert not any(name.startswith("ksmcore_") for name in scrape())


def test_default_engine():
    from ksmcore.prometheus import Collector

    names = {metric.name for metric in Collector().collect()}
    assert "ksmcore_bytes_saved" in names
    assert ksmcore.stats().run == 0
