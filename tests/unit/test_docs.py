"""What the documentation tells of names and defaults is so."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

import ksmcore
from ksmcore.settings import FIXED

DOCS = Path(__file__).resolve().parents[2] / "docs" / "scanner.md"
pytestmark = pytest.mark.skipif(not DOCS.exists(), reason="only in the repository")


def rows(heading):
    """The first columns of the tables under a heading."""
    section = DOCS.read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    return [
        line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| `")
    ]


def test_every_setting_with_its_default():
    told = {row[0].strip("`"): row for row in rows("Settings")}
    assert set(told) == {field.name for field in fields(ksmcore.Settings)}
    for field in fields(ksmcore.Settings):
        default = told[field.name][1].strip("`")
        assert eval(default) == field.default
        assert ("*fixed*" in told[field.name][2]) == (field.name in FIXED)


def test_every_number_and_every_reason(engine):
    told = {name for row in rows("Numbers") for name in re.findall(r"`(\w+)`", row[0])}
    stats = engine.stats()
    assert told == (set(stats.as_dict()) | set(stats.skipped)) - {"skipped"}
    text = DOCS.read_text()
    assert all(f"`{stage}`" in text for stage in stats.seconds)
    assert all(f"`{name}`" in text for name in ksmcore.RegionStats().as_dict())
