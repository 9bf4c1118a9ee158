"""Public names: each means one thing."""

from importlib.util import find_spec

import pytest

import ksmcore
import ksmcore.cli
import ksmcore.doctor


@pytest.mark.parametrize("package", [ksmcore, ksmcore.cli, ksmcore.doctor])
def test_no_module_hides_behind_a_public_name(package):
    assert [name for name in package.__all__ if find_spec(f"{package.__name__}.{name}")] == []
    assert all(hasattr(package, name) for name in package.__all__)
