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
    assert samples['ksmcore_sharing_pages{engine="tests"}'] == 40
    assert samples['ksmcore_saved_bytes{engine="tests"}'] == engine.stats().bytes_saved
    assert samples['ksmcore_full_scans_total{engine="tests"}'] == 0
    engine.scan()
    later = scrape()
    assert later['ksmcore_full_scans_total{engine="tests"}'] == 1
    assert later['ksmcore_stage_seconds_total{engine="tests",stage="pagemap"}'] > 0
    assert later['ksmcore_skipped_pages_total{engine="tests",reason="held"}'] == 0
    assert all(later[name] >= value for name, value in samples.items() if "_total{" in name)
    assert np.array_equal(a, b)
    (told,) = [name for name in samples if name.startswith("ksmcore_info{")]
    stats = engine.stats()
    assert told == (
        f'ksmcore_info{{engine="tests",guard="{stats.guard}",tracker="{stats.dirty}",'
        f'version="{ksmcore.__version__}"}}'
    )
    pss = samples['ksmcore_process_pss_bytes{engine="tests"}']
    assert 0 < pss <= samples['ksmcore_process_rss_bytes{engine="tests"}'] + 200 * 4096


def metrics_of(engine, **options):
    from ksmcore.prometheus import Collector

    found = list(Collector(engine, **options).collect())
    assert len({metric.name for metric in found}) == len(found)
    return {metric.name.removeprefix("ksmcore_"): metric for metric in found}


def test_every_number_of_stats_is_a_metric(engine):
    from ksmcore.prometheus import metric_name

    metrics = metrics_of(engine, memory=False, old_names=False)
    del metrics["ksmcore"]
    stats = engine.stats().as_dict()
    numbers = {name for name, value in stats.items() if type(value) in (int, float)} | {"seconds"}
    numbers = numbers - {"pages_skipped"} | {"skipped"}
    assert set(metrics) == {metric_name(name) for name in numbers}
    by_reason = {one.labels["reason"]: one.value for one in metrics["skipped_pages"].samples}
    assert by_reason == stats["skipped"]
    stages = {one.labels["stage"] for one in metrics["stage_seconds"].samples}
    assert stages == set(stats["seconds"])
    for name in numbers:
        metric = metrics[metric_name(name)]
        assert (metric.type, metric.documentation) == (NUMBERS[name].kind, NUMBERS[name].sentence)


def test_units_stand_last(engine):
    for name in metrics_of(engine, old_names=False):
        words = name.split("_")
        assert not {"bytes", "pages", "seconds", "maps"} & set(words[:-1]), name


def test_old_names_are_there_for_a_release(engine):
    new = metrics_of(engine, memory=False, old_names=False)
    both = metrics_of(engine, memory=False)
    old = both.keys() - new.keys()
    assert {"bytes_saved", "pages_skipped", "pages_shared", "seconds", "maps_used"} <= old
    for name in old:
        assert "Old name of ksmcore_" in both[name].documentation
    assert both["bytes_saved"].samples[0].value == both["saved_bytes"].samples[0].value


def test_without_proc_there_is_no_pss(engine, monkeypatch):
    import ksmcore.prometheus

    def no_proc():
        raise FileNotFoundError

    assert "process_pss_bytes" in metrics_of(engine)
    monkeypatch.setattr(ksmcore.prometheus, "memory_info", no_proc)
    metrics = metrics_of(engine)
    assert "saved_bytes" in metrics
    assert "process_pss_bytes" not in metrics


def test_a_closed_engine_has_no_metrics(scrape, engine):
    assert any(name.startswith("ksmcore_") for name in scrape())
    engine.close()
    assert not any(name.startswith("ksmcore_") for name in scrape())


def test_default_engine():
    from ksmcore.prometheus import Collector

    names = {metric.name for metric in Collector().collect()}
    assert "ksmcore_saved_bytes" in names
    assert ksmcore.stats().run == 0
