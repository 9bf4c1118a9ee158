"""The rooms of the package call downward only, and no two modules import each other."""

import ast
import graphlib
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "ksmcore"
pytestmark = pytest.mark.skipif(not PACKAGE.exists(), reason="only in the repository")

# From the ground up; what shares a line is one floor. "" is the public face, ksmcore/__init__.py.
FLOORS = [
    "_platform errors sizes",
    "_kernel",
    "_pages _trees",
    "_hooks",
    *"_records _guard _pass _core _arrays _gate _engine _show".split(),
    "",
    "doctor prometheus dask",
    "cli",
    "__main__ _testing",
]
FLOOR = {room: n for n, line in enumerate(FLOORS) for room in line.split(" ")}


def is_left_out(node):
    """Type-only imports, and the notebook's that a method imports when it shows itself."""
    return (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)) or (
        isinstance(node, ast.FunctionDef) and node.name == "_repr_html_"
    )


def imports_in(node):
    """(module, name) of each import under a node of Python."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ImportFrom):
            yield from ((child.module, alias.name) for alias in child.names)
        elif isinstance(child, ast.Import):
            yield from ((alias.name, "") for alias in child.names)
        elif not is_left_out(child):
            yield from imports_in(child)


def imports_of(text, suffix):
    if suffix == ".py":
        return list(imports_in(ast.parse(text)))
    found = re.findall(r"^\s*from (ksmcore[\w.]*) c?import \(?([^#)]*)", text, re.MULTILINE)
    return [
        (module, name.split()[0])
        for module, names in found
        for name in names.split(",")
        if name.strip()
    ]


def graph(package):
    """Module -> the modules of the package that it imports, by their names in the package."""
    files = [path for kind in ("py", "pyx", "pxd") for path in sorted(package.rglob(f"*.{kind}"))]
    named = {path: ".".join(path.relative_to(package).with_suffix("").parts) for path in files}
    named = {path: name.removesuffix("__init__").removesuffix(".") for path, name in named.items()}
    found = {name: set() for name in named.values()}
    for path, name in named.items():
        for module, imported in imports_of(path.read_text(), path.suffix):
            if module is not None and module.partition(".")[0] == "ksmcore":
                inner = module.partition(".")[2]
                deeper = f"{inner}.{imported}".strip(".")
                found[name].add(deeper if deeper in found else inner)
        found[name].discard(name)
    return found


def upward(found):
    """The imports that lead to a floor above."""
    floors = {name: FLOOR[name.partition(".")[0]] for name in found}
    return [(a, b) for a, imported in found.items() for b in imported if floors[b] > floors[a]]


def test_calls_go_down_only():
    found = graph(PACKAGE)
    assert len(found) > 80
    assert upward(found) == []


def test_no_modules_import_each_other():
    list(graphlib.TopologicalSorter(graph(PACKAGE)).static_order())


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("_records/rmap.pyx", "from ksmcore._pass.batch cimport batch"),
        ("_kernel/forks.pyx", "from ksmcore._trees cimport rb_tree"),
        ("_engine/stats.py", "from ksmcore import _show"),
        ("_gate/phase.py", "def late():\n    import ksmcore.cli.output"),
    ],
)
def test_an_upward_import_would_be_noticed(tmp_path, file, line):
    for path in PACKAGE.rglob("*.p*"):
        if path.suffix in (".py", ".pyx", ".pxd"):
            copied = tmp_path / path.relative_to(PACKAGE)
            copied.parent.mkdir(exist_ok=True)
            copied.write_text(path.read_text())
    planted = tmp_path / file
    planted.write_text(f"{planted.read_text()}\n{line}\n")
    assert [a for a, _ in upward(graph(tmp_path))] == [file.partition(".")[0].replace("/", ".")]
