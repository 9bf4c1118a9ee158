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


def test_what_is_not_used_is_not_imported():
    """Plugins and tools import ksmcore in programs that have no arrays."""
    done = run_python(
        """
        import sys
        import ksmcore
        assert set(ksmcore.__all__) <= set(dir(ksmcore))
        assert not {"numpy", "ksmcore._engine", "ksmcore._kernel"} & set(sys.modules)
        assert ksmcore.Engine is ksmcore.Engine
        assert "numpy" in sys.modules
        """
    )
    assert done.returncode == 0, done.stderr


def test_a_name_that_there_is_not():
    with pytest.raises(AttributeError, match="'ksmcore' has no attribute 'Enjine'"):
        _ = ksmcore.Enjine  # type: ignore[attr-defined]


def test_all_names_at_once():
    names: dict[str, object] = {}
    exec("from ksmcore import *", names)
    assert set(ksmcore.__all__) <= names.keys()
