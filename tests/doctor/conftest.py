"""What the tests of this room share."""

import os

import pytest


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch):
    """What is examined is the machine, not what the environment asks for."""
    for name in list(os.environ):
        if name.startswith("KSMCORE_"):
            monkeypatch.delenv(name)
