"""What the tests of the command line share."""

import signal
import tempfile

import pytest


@pytest.fixture(autouse=True)
def _own_directories(tmp_path, monkeypatch):
    """Sockets of these tests are beside nobody else's."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)


@pytest.fixture(autouse=True)
def _interruptible():
    """Programs begin as from a terminal, also where the tests run in the background of a shell,
    which has Ctrl-C ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
