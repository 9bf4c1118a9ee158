"""Public names: each means one thing."""

from importlib.util import find_spec

import pytest

import ksmcore
import ksmcore.cli
import ksmcore.doctor
from helpers.processes import run_python


@pytest.mark.parametrize("package", [ksmcore, ksmcore.cli, ksmcore.doctor])
def test_no_module_hides_behind_a_public_name(package):
    assert [name for name in package.__all__ if find_spec(f"{package.__name__}.{name}")] == []
    assert all(hasattr(package, name) for name in package.__all__)


def test_where_nothing_is_merged_only_what_is_used_is_imported():
    done = run_python(
        """
        import sys
        import ksmcore
        assert set(ksmcore.__all__) <= set(dir(ksmcore))
        assert not {"numpy", "ksmcore._engine", "ksmcore._kernel"} & set(sys.modules)
        ksmcore.unregister  # a function of its own
        assert "numpy" not in sys.modules
        assert ksmcore.Engine is ksmcore.Engine
        assert "numpy" in sys.modules
        assert ksmcore.stats().bytes_saved == 0
        """,
        KSMCORE_DISABLE="1",
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_else_all_of_it_is_there_at_once():
    """Whoever forks, or locks itself in, later finds no import left to do."""
    done = run_python(
        """
        import sys
        import ksmcore
        before = set(sys.modules)
        with ksmcore.Engine() as engine:
            array = engine.zeros(1 << 20)
            engine.dedup(array)
            engine.changed(engine.copy(array), since=array)
            engine.start()
            engine.stop()
            engine.stats()
            engine.estimate()
        late = {name for name in set(sys.modules) - before if name.startswith("ksmcore")}
        assert late == set(), late
        """,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_name_that_there_is_not():
    with pytest.raises(AttributeError, match="'ksmcore' has no attribute 'Enjine'"):
        _ = ksmcore.Enjine  # type: ignore[attr-defined]


def test_all_names_at_once():
    names: dict[str, object] = {}
    exec("from ksmcore import *", names)
    assert set(ksmcore.__all__) <= names.keys()
