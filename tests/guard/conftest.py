"""What the tests of this room share: each of them is for every guard that can be had here."""

import pytest


@pytest.fixture
def guard(each_guard):
    return each_guard
