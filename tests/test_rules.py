"""Every test that is named elsewhere exists: in rules.md, and where tests are left out."""

import ast
import re
import runpy
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
HEADS = re.compile(r"^### (\d+)\. (.*)$", re.MULTILINE)
NAMED = re.compile(r"^- `(.*?)`$", re.MULTILINE)


def rules():
    """Number of each rule -> what is said and named under it."""
    _, *parts = HEADS.split((TESTS / "rules.md").read_text())
    return dict(zip(map(int, parts[::3]), parts[2::3], strict=True))


def defined(path):
    """The tests of a file and their classes: "test", "Class", "Class::test"."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}::{one.name}" for one in node.body if hasattr(one, "name")}
        # A machine of hypothesis is tested under the name that it is assigned to.
        targets = node.targets if isinstance(node, ast.Assign) else [node]
        found |= {getattr(one, "name", getattr(one, "id", "")) for one in targets}
    return {name for name in found if re.match("(Test|test_)", name)}


def is_there(test):
    file, _, name = test.partition("::")
    path = TESTS / file
    return path.is_file() and (not name or name in defined(path))


def test_the_rules_are_numbered():
    assert list(rules()) == list(range(1, len(rules()) + 1))


@pytest.mark.parametrize("number", rules())
def test_every_rule_is_held_by_tests_that_exist(number):
    text = rules()[number]
    named = NAMED.findall(text)
    assert named, f"nothing holds rule {number}"
    assert len(set(named)) == text.count("\n- ")
    assert [test for test in named if not is_there(test)] == []


def test_what_does_not_exist_is_noticed():
    assert is_there("test_rules.py::test_the_rules_are_numbered")
    assert not is_there("test_rules.py::test_the_rules_are_numbers")
    assert not is_there("no_room/test_rules.py")


def test_what_the_sanitizers_leave_out_exists():
    left_out = runpy.run_path(str(TESTS / "native" / "check.py"))["LEFT_OUT"]
    named = [test.removesuffix("[") for tests in left_out.values() for test in tests]
    assert [test for test in named if not is_there(test)] == []
