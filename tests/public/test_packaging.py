"""What is told of the package in several files is the same in all of them."""

import re
import sys
from pathlib import Path

import pytest

import ksmcore

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(
    not (ROOT / ".github").exists() or sys.version_info < (3, 11),
    reason="only in the repository, with tomllib",
)


@pytest.fixture(scope="module")
def project():
    import tomllib

    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def pythons(project):
    """The releases that have a classifier."""
    told = " ".join(project["project"]["classifiers"])
    return re.findall(r"Python :: (3\.\d+)", told)


def test_every_python_is_built_and_tested(project, pythons):
    wheels = project["tool"]["cibuildwheel"]["build"].split()
    assert wheels == [f"cp{version.replace('.', '')}-*" for version in pythons]
    text = (ROOT / ".github" / "workflows" / "tests.yml").read_text()
    matrix = re.search(r"python: \[(.*)\]", text)[1]
    assert re.findall(r'"([\d.]+)"', matrix) == pythons
    assert project["project"]["requires-python"] == f">={pythons[0]}"


def test_the_recipe_is_of_this_version_and_needs_the_same(project):
    text = (ROOT / "conda" / "recipe.yaml").read_text()
    assert f'version: "{ksmcore.__version__}"' in text
    needed = re.search(r"  run:\n((?:    - .*\n)+)", text)[1]
    names = {
        line.strip("- ").replace(" ", "") for line in needed.splitlines() if "python" not in line
    }
    assert names == set(project["project"]["dependencies"])


def test_the_command_line_needs_no_extra(project):
    assert project["project"]["optional-dependencies"]["cli"] == []
