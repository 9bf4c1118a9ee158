"""What objects of libraries hold. Run by engine/test_libraries.py, in processes of their own."""

import warnings

import numpy as np
import pytest

from helpers.memory import PAGE, extent
from ksmcore._gate import objects


def places(thing):
    """(address, end) of all memory that is found, by address."""
    found = objects.reach(thing, lambda _: None)
    return sorted((start, start + n_bytes) for start, n_bytes in found.leaves)


def named(thing):
    return dict(objects.reach(thing, lambda _: None).unreached)


# --- libraries ------------------------------------------------------------------------------------


def storage_of(tensor):
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.data_ptr() + storage.nbytes()


def test_torch_tensors_stand_for_their_storage():
    torch = pytest.importorskip("torch")
    packed = torch.ones(8 * PAGE, requires_grad=True)
    assert places([packed[5:9], packed.detach()[::3], packed]) == [storage_of(packed)]
    assert packed.untyped_storage().resizable()
    half = torch.ones(4 * PAGE, dtype=torch.bfloat16)
    assert places(half) == [storage_of(half)]
    assert places([half.untyped_storage()]) == [storage_of(half)]


def test_torch_modules_and_optimizers():
    torch = pytest.importorskip("torch")
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.BatchNorm1d(64))
    model.register_buffer("extra", torch.ones(PAGE), persistent=False)
    expected = sorted(storage_of(t) for t in [*model.parameters(), *model.buffers()])
    assert places(model) == expected
    assert set(places(model.state_dict())) < set(expected)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(4, 64)).sum().backward()
    optimizer.step()
    assert len(places(optimizer)) > 2 * len(list(model.parameters()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.script(torch.nn.Linear(64, 64))
    assert places(scripted) == sorted(storage_of(t) for t in scripted.parameters())


@pytest.mark.filterwarnings("ignore:Sparse")
def test_torch_tensors_of_other_layouts():
    torch = pytest.importorskip("torch")
    dense = torch.eye(64)
    for sparse in (dense.to_sparse(), dense.to_sparse_csr(), dense.to_sparse_csc()):
        assert storage_of(
            sparse.values() if sparse.layout != torch.sparse_coo else sparse._values()
        ) in places([sparse])
    assert named([torch.empty(5, device="meta")]) == {"torch.Tensor: it is on the device 'meta'": 1}


def test_jax():
    jax = pytest.importorskip("jax")
    for dtype in ("float32", "bfloat16", "int8"):
        values = jax.numpy.ones(8 * PAGE, dtype)
        start = values.unsafe_buffer_pointer()
        assert places({"w": values}) == [(start, start + values.nbytes)]
        values.delete()
        assert places([values]) == []
        assert sum(named([values]).values()) == 1


def test_pyarrow():
    pa = pytest.importorskip("pyarrow")
    table = pa.table(
        {
            "x": np.arange(10_000.0),
            "text": [f"value {n}" for n in range(10_000)],
            "kind": pa.array(["a", "b"] * 5000).dictionary_encode(),
            "lists": [[1, 2]] * 10_000,
        }
    )
    buffers = [b for column in table.columns for c in column.chunks for b in c.buffers() if b]
    buffers += [b for b in table["kind"].chunk(0).dictionary.buffers() if b]
    expected = sorted({(b.address, b.address + b.size) for b in buffers})
    assert places(table) == expected
    assert set(places([table["x"], table["text"].chunk(0)])) < set(expected)
    one = table["x"].chunk(0).slice(7, 9)
    assert places(one) == places(table["x"])
    part = one.buffers()[1].slice(80, 100)
    assert places([part]) == places(table["x"])


def test_pandas():
    pd = pytest.importorskip("pandas")
    values = np.arange(20_000.0)
    frame = pd.DataFrame({"x": values, "y": np.arange(20_000)})
    frame["more"] = pd.array([1, None] * 10_000, dtype="Int64")
    frame["kind"] = pd.Categorical(["a", "b"] * 10_000)
    view = frame["y"]
    found = places(frame)
    assert set(places(view)) < set(found)
    assert sum(end - start for start, end in found) >= 20_000 * (8 + 8 + 8 + 1 + 1)
    pytest.importorskip("pyarrow")
    arrow = pd.Series(values, dtype="float64[pyarrow]")
    assert sum(end - start for start, end in places([arrow])) >= values.nbytes


def test_polars():
    pl = pytest.importorskip("polars")
    pytest.importorskip("pyarrow")
    frame = pl.DataFrame(
        {"x": np.arange(20_000.0), "y": [None, 1] * 10_000, "t": ["long" * 9] * 20_000}
    )
    found = places(frame)
    assert found == places(frame)
    assert sum(end - start for start, end in found) > 20_000 * (8 + 8 + 16)
    assert set(places([frame["x"]])) < set(found)


def test_xarray():
    xr = pytest.importorskip("xarray")
    values = np.ones((64, PAGE))
    assert extent(values) in places(xr.Dataset({"t": (("x", "y"), values)}))


def test_sklearn():
    """The nodes of a tree lie in C: they are asked for, and no copy is taken for them."""
    ensemble = pytest.importorskip("sklearn.ensemble")
    neighbors = pytest.importorskip("sklearn.neighbors")
    rng = np.random.default_rng(0)
    x = rng.random((2000, 5))
    y = (x[:, 0] > rng.random(2000)).astype(int)
    forest = ensemble.RandomForestClassifier(3, random_state=0).fit(x, y)
    found = places(forest)
    for tree in forest.estimators_:
        nodes = tree.tree_.__getstate__()["nodes"]
        assert extent(nodes) in found
    again = places(forest)
    assert found == again
    near = neighbors.KNeighborsClassifier().fit(x, y)
    assert extent(near._fit_X) in places(near)


def test_scipy_copies_are_told_from_memory():
    spatial = pytest.importorskip("scipy.spatial")
    tree = spatial.cKDTree(np.random.default_rng(0).random((20_000, 3)))
    assert extent(tree.data) in places([tree])
    assert named([tree]) == {"scipy.cKDTree: it hands out copies of some of it": 1}
