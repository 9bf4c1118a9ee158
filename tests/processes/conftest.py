"""What the tests of this room share."""

import pytest

from helpers.forks import Memory


@pytest.fixture
def memory(engine):
    return Memory.merged(engine, 1)
