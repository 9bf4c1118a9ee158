"""What the tests of this room share."""

import pytest

from helpers.gate import Mapping


@pytest.fixture
def mapped():
    """Makes `Mapping`s that are unmapped at the end of the test."""
    made = []

    def make(*args, **options):
        mapping = Mapping(*args, **options)
        made.append(mapping)
        return mapping

    yield make
    for mapping in made:
        mapping.close()
