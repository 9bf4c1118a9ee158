"""Objects of libraries, registered and merged. Run by test_libraries.py, in processes of
their own."""

import contextlib
import gc

import numpy as np
import pytest

import ksmcore
from helpers.memory import PAGE, private_memory

N_PAGES = 24


# --- libraries ------------------------------------------------------------------------------------


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


def aligned(torch, engine, shape, dtype="float32"):
    """A tensor that begins on a page, in memory that is not registered."""
    n_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = np.frombuffer(private_memory(-(-n_bytes // PAGE)), np.uint8)[:n_bytes]
    return torch.from_numpy(memory.view(dtype).reshape(shape))


class TestTorch:
    def test_a_tensor(self, engine, torch):
        a, b = (aligned(torch, engine, (64, 1024)) for _ in range(2))
        a += torch.randn(64, 1024)
        b.copy_(a)
        a.requires_grad_()
        region = engine.register(a)
        assert isinstance(region, ksmcore.Region)
        assert engine.dedup(a, b[3:7]).pages_merged == 2 * region.n_pages
        b[0, 0] += 1
        assert a[0, 0] != b[0, 0]
        with engine.hold(b[5]):
            pass
        engine.unregister(a.detach().T)
        assert region.closed

    def test_a_storage_that_is_registered_stays_where_it_is(self, engine, torch):
        values = torch.ones(N_PAGES * PAGE)
        storage = values.untyped_storage()
        engine.estimate(values)
        assert storage.resizable()
        region = engine.register(values)
        with pytest.raises(RuntimeError, match="resiz"):
            storage.resize_(0)
        del values, storage
        gc.collect()
        assert engine.dedup(region).pages_merged == region.n_pages

    def test_models_that_share(self, engine, torch):
        backbone = torch.nn.Linear(256, 256)
        one, two = (torch.nn.Sequential(backbone, torch.nn.Linear(256, 64)) for _ in range(2))
        report = engine.dedup(one, two)
        assert {text.partition(": ")[2] for text in report.unreached} == {"no whole page inside"}
        assert engine.stats().regions == 3
        before = {k: v.clone() for k, v in one.state_dict().items()}
        optimizer = torch.optim.SGD(one.parameters(), 0.1)
        one(torch.randn(4, 256)).sum().backward()
        optimizer.step()
        assert not torch.equal(before["0.weight"], backbone.weight)
        engine.unregister(one.state_dict())
        engine.unregister(two)
        assert engine.stats().regions == 0

    def test_bfloat16(self, engine, torch):
        values = torch.ones(N_PAGES * PAGE, dtype=torch.bfloat16)
        assert engine.dedup({"w": values}).pages_merged >= 2 * N_PAGES - 1

    def test_small_tensors_packed_in_one_storage(self, engine, torch):
        storage = torch.ones(N_PAGES * PAGE // 4)
        parts = storage.split(100)
        report = engine.dedup(dict(enumerate(parts)))
        assert engine.stats().regions == 1
        assert report.pages_scanned >= N_PAGES - 1
        assert report.unreached == {}

    def test_what_helps_a_tensor_is_told(self, engine, torch):
        memory = torch.from_numpy(np.frombuffer(private_memory(64), np.uint8))
        size = 20 * PAGE
        for offset in (0, 64):
            # Two storages of one length and different phases.
            buffer = memoryview(memory.numpy())[offset * PAGE // 64 * 20 + offset :][:size]
            tensor = torch.frombuffer(buffer, dtype=torch.uint8)
            with contextlib.ExitStack() as stack:
                if offset:
                    told = stack.enter_context(pytest.warns(ksmcore.PhaseWarning))
                engine.register(tensor)
        text = str(told[0].message)
        assert "MALLOC_MMAP_THRESHOLD_" in text
        assert "torch.from_numpy" in text
        with pytest.raises(ValueError, match="small tensors"):
            engine.register(torch.ones(3))
        with pytest.raises(ValueError, match="device 'meta'"):
            engine.register(torch.empty(3, device="meta"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.filterwarnings("ignore:Some donated buffers")
def test_jax(engine, dtype):
    jax = pytest.importorskip("jax")
    values = jax.numpy.ones((N_PAGES, PAGE), dtype)
    region = engine.register(values)
    assert isinstance(region, ksmcore.Region)
    assert engine.dedup({"p": values}).pages_merged == region.n_pages
    # A held array is not given away: the result lies elsewhere.
    more = jax.jit(lambda x: x + 1, donate_argnums=0)(values)
    assert bool((more == 2).all())
    assert bool((values == 1).all())
    engine.unregister([region])
    assert region.closed


def test_pyarrow_tables(engine):
    pa = pytest.importorskip("pyarrow")
    table = pa.table({"x": pa.array([1] * 100_000), "t": pa.array(["abc"] * 100_000)})
    expected = table.to_pylist()[:10]
    report = engine.dedup(table, table.slice(10, 20))
    assert report.bytes_saved > 100_000 * 8 * 0.9
    assert table.to_pylist()[:10] == expected
    assert table["x"].to_numpy().sum() == 100_000
    engine.unregister(table)
    assert engine.stats().regions == 0


@pytest.mark.filterwarnings("ignore::ksmcore.PhaseWarning")
def test_pandas_frames_go_on_as_ever(engine):
    pd = pytest.importorskip("pandas")
    frame = pd.DataFrame({"x": np.ones(100_000), "y": np.arange(100_000) // 10_000})
    view = frame["x"]
    engine.dedup(frame, view)
    assert engine.stats().bytes_saved > 100_000 * 8 * 1.5
    frame.loc[5, "x"] = 7
    frame["z"] = 1
    assert frame["x"].sum() == 100_006
    assert frame.groupby("y")["x"].sum().iloc[1] == 10_000


def test_polars_frames(engine):
    pl = pytest.importorskip("polars")
    pytest.importorskip("pyarrow")
    frame = pl.DataFrame({"x": np.ones(100_000), "y": ["a" * 20] * 100_000})
    area = engine.register(frame)
    report = engine.dedup(frame)
    assert report.bytes_saved > 100_000 * 8 * 0.9
    assert frame["x"].sum() == 100_000
    area.close()


def test_xarray_datasets(engine):
    xr = pytest.importorskip("xarray")
    data = xr.Dataset({"t": (("x", "y"), np.ones((N_PAGES, PAGE)))})
    assert engine.dedup(data).bytes_saved > N_PAGES * PAGE * 7


def test_sklearn_forests(engine):
    ensemble = pytest.importorskip("sklearn.ensemble")
    rng = np.random.default_rng(0)
    x = rng.random((4000, 5))
    y = (x[:, 0] > rng.random(4000)).astype(int)
    forest = ensemble.RandomForestClassifier(5, random_state=0).fit(x, y)
    before = forest.predict_proba(x)
    area = engine.register(forest)
    nodes = sum(tree.tree_.__getstate__()["nodes"].nbytes for tree in forest.estimators_)
    assert sum(region.nbytes for region in area.regions) > 0.7 * nodes
    engine.dedup(forest)
    assert np.array_equal(before, forest.predict_proba(x))
    del forest
    gc.collect()
    area.close()
    assert engine.stats().regions == 0
