"""For the tests of this room: calls that tell of themselves, and C code to make them from."""

import ctypes
from pathlib import Path

import pytest

import ksmcore
from helpers.native import compiled
from ksmcore._hooks import calls as hooked
from ksmcore._testing import calls


def pytest_collection_modifyitems(items):
    reason = ksmcore.features()["calls"]
    for item in items if reason is not None else ():
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def told():
    """Calls tell of themselves, and SIGSEGV is kept out of masks; afterwards nothing is left of it."""
    n_users = hooked.counts()["users"]
    calls.begin(True)
    yield
    calls.end(True)
    assert hooked.counts()["users"] == n_users
    assert hooked.counts()["untold"] == 0


@pytest.fixture(scope="session")
def native_path(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("hooks"), [Path(__file__).parent / "native.c"])


@pytest.fixture
def native(native_path):
    """native.c, loaded."""
    return ctypes.CDLL(str(native_path), use_errno=True)
