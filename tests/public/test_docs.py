"""What the documentation tells is so: names, signatures, defaults, links, and the code in it."""

import importlib.util
import inspect
import re
import runpy
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import ksmcore
from ksmcore._engine.settings import FIXED

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))] if DOCS.exists() else []
pytestmark = pytest.mark.skipif(not DOCS.exists(), reason="only in the repository")


def section(page, heading):
    """The text under a heading of any level, up to the next one of that level or above."""
    text = (DOCS / page).read_text()
    head = re.search(rf"^(#+) {re.escape(heading)}\n", text, re.MULTILINE)
    assert head is not None, f"{page} has no section {heading}"
    rest = text[head.end() :]
    return re.split(rf"^#{{1,{len(head[1])}}} ", rest, maxsplit=1, flags=re.MULTILINE)[0]


def rows(page, heading):
    """The cells of the tables under a heading, of rows that begin with code."""
    return [
        line.strip("| ").split(" | ")
        for line in section(page, heading).splitlines()
        if line.startswith("| `")
    ]


def codes(text):
    """What stands between backticks."""
    return re.findall(r"`([^`\n]+)`", text)


def page_id(page):
    return str(page.relative_to(ROOT))


# ---- settings and numbers ------------------------------------------------------------------------


def test_every_setting_with_its_default():
    told = {row[0].strip("`"): row for row in rows("scanner.md", "Settings")}
    assert set(told) == {field.name for field in fields(ksmcore.Settings)}
    for field in fields(ksmcore.Settings):
        default = told[field.name][1].strip("`")
        assert eval(default) == field.default
        assert ("*fixed*" in told[field.name][2]) == (field.name in FIXED)


def test_every_number_and_every_reason(engine):
    told = {
        name for row in rows("scanner.md", "Numbers") for name in re.findall(r"`(\w+)`", row[0])
    }
    stats = engine.stats()
    assert told == {*stats.as_dict(), *stats.skipped, *stats.seconds}
    text = (DOCS / "scanner.md").read_text()
    assert all(f"`{name}`" in text for name in ksmcore.RegionStats().as_dict())


def test_every_reason_has_a_remedy(engine):
    told = {
        name for row in rows("tuning.md", "Less is merged than there is") for name in codes(row[0])
    }
    assert told - {"skipped[...]"} == set(engine.stats().skipped)


def test_tables_are_as_the_package_has_them():
    """Else `make tables` writes them."""
    tables = runpy.run_path(DOCS / "tables.py")
    texts = {page: page.read_text() for page in PAGES}
    placed = [found[2] for text in texts.values() for found in tables["PLACE"].finditer(text)]
    assert sorted(placed) == sorted(tables["TABLES"])
    for page, text in texts.items():
        assert tables["renewed"](text) == text, page


# ---- the API -------------------------------------------------------------------------------------


def parameters(call):
    """A signature without annotations and self: '(buffer, *, privatize=False)'."""
    signature = inspect.signature(call)
    shown = [
        parameter.replace(annotation=parameter.empty)
        for parameter in signature.parameters.values()
        if parameter.name != "self"
    ]
    text = str(signature.replace(parameters=shown, return_annotation=signature.empty))
    return text.replace("'", '"').replace('<class "float">', "float")


def members(cls):
    return {name for name in dir(cls) if not name.startswith("_")}


def check_signatures(owner, told):
    """Each "name(...)" or "name" is of `owner`, and called like that."""
    for entry in told:
        name = entry.split("(")[0]
        member = getattr(owner, name)
        if "(" in entry:
            assert entry == name + parameters(member)
        else:
            assert owner is ksmcore or not inspect.isfunction(member), f"{entry} is called"


def test_api_names_everything_public():
    functions = {
        row[0].strip("`")
        for heading in ("Functions", "Arrays", "Allocator", "Pictures")
        for row in rows("api.md", heading)
    }
    check_signatures(ksmcore, functions)
    called = {entry.split("(")[0] for entry in functions}
    assert called <= set(ksmcore.__all__)
    text = (DOCS / "api.md").read_text()
    explained = called | set(re.findall(r"^##+ (\w+)$", text, re.MULTILINE))
    explained |= {name for row in rows("api.md", "Errors") for name in codes(row[0])}
    explained |= set(codes(section("api.md", "History")))
    assert set(ksmcore.__all__) <= explained


@pytest.mark.parametrize("cls", [ksmcore.Engine, ksmcore.Region, ksmcore.Area])
def test_api_names_every_member(cls):
    told = {row[0].strip("`") for row in rows("api.md", cls.__name__)}
    check_signatures(cls, told)
    names = {entry.split("(")[0] for entry in told}
    if cls is ksmcore.Engine:
        shared = section("api.md", "Engine").split("do what the functions of that name do")[1]
        same = set(codes(shared.split("And:")[0]))
        for name in same:
            assert parameters(getattr(cls, name)) == parameters(getattr(ksmcore, name))
        names |= same
    assert names == members(cls)


@pytest.mark.parametrize("cls", [ksmcore.PassReport, ksmcore.Estimate, ksmcore.MemoryInfo])
def test_api_names_every_field(cls):
    told = {row[0].strip("`") for row in rows("api.md", cls.__name__)}
    assert told == set(cls._names())


def test_api_names_the_rest(engine):
    assert set(codes(section("api.md", "RegionStats"))) == (
        members(ksmcore.RegionStats) - {"as_dict", "sum"} | {"RegionStats.sum(parts)"}
    )
    states = [row[0].replace("`", "") for row in rows("api.md", "PageState")]
    assert states == [f"{state.name} = {state.value}" for state in ksmcore.PageState]
    features = next(row for row in rows("api.md", "Functions") if "features" in row[0])
    assert set(codes(features[1])) == set(ksmcore.features())


def test_api_names_every_command_and_option():
    click = pytest.importorskip("click")
    commands = pytest.importorskip("ksmcore.cli.commands").cli.commands
    of_commands, _, of_run = section("api.md", "Command line").partition("| option of `run` |")
    told = dict(re.findall(r"^\| `(\w+)(.*)$", of_commands, re.MULTILINE))
    assert set(told) == set(commands)
    told["run"] += of_run
    told["estimate"] += "".join(line for line in of_run.splitlines() if "`estimate` has it" in line)
    for name, command in commands.items():
        options = {
            option
            for parameter in command.params
            if isinstance(parameter, click.Option)
            for option in parameter.opts
            if option.startswith("--")
        }
        assert set(re.findall(r"--[a-z][a-z-]*", told[name])) == options


# ---- what is named and linked --------------------------------------------------------------------


def outside_blocks(page):
    """The text of a page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_names_in_it_exist(page):
    """`ksmcore.scan`, `Engine.close()`, `region.hold()`, in text and code."""
    classes = (ksmcore.Engine, ksmcore.Region, ksmcore.Area, ksmcore.Settings)
    owners = {cls.__name__: cls for cls in classes}
    owners |= {name.lower(): cls for name, cls in owners.items()} | {"ksmcore": ksmcore}
    for owner, name in re.findall(r"\b([A-Za-z]+)\.([A-Za-z]\w*)", page.read_text()):
        if owner in owners and name not in ("md", "py"):
            is_module = owner == "ksmcore" and importlib.util.find_spec(f"ksmcore.{name}")
            assert is_module or hasattr(owners[owner], name), f"{owner}.{name}"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_files_in_it_exist(page):
    """Paths, and compiled modules by room and name: `_pass/scan`."""
    names = {"script.py", "train.py"}
    for name in codes(outside_blocks(page)):
        if name in names:
            continue
        if re.fullmatch(r"_[a-z]+(/[a-z_]+)?", name):
            assert list((ROOT / "ksmcore").glob(f"{name}.py*")), name
        elif re.fullmatch(r"[\w/.]+\.(py|pyx|h|md)", name):
            assert (ROOT / name).exists() or (ROOT / "ksmcore" / name).exists(), name


def anchors(page):
    """The anchors that headings get where the repository is read."""
    made = set()
    for heading in re.findall(r"^#+ (.*)$", outside_blocks(page), re.MULTILINE):
        plain = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        numbered = (plain, *(f"{plain}-{n}" for n in range(1, 20)))
        made.add(next(name for name in numbered if name not in made))
    return made


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_somewhere(page):
    text = re.sub(r"`[^`\n]*`", "", outside_blocks(page))
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_relative_to(ROOT), link
        assert target.is_file(), link
        assert not anchor or anchor in anchors(target), link


def test_every_page_is_in_the_indexes():
    for index in (ROOT / "README.md", DOCS / "README.md"):
        linked = {link.split("/")[-1] for link in re.findall(r"\]\(([^)\s#]+)", index.read_text())}
        assert {page.name for page in PAGES} - {"README.md"} <= linked


# ---- code ----------------------------------------------------------------------------------------

# Runs the python blocks of a page as one program, with the page's line numbers. What a line prints
# must be what stands behind it as "# -> ...", where three dots are anything.
RUNNER = r"""
import re, sys
path, source = sys.argv[1], sys.stdin.read()
printed = {}
def record(*values):
    printed.setdefault(sys._getframe(1).f_lineno, []).append(" ".join(map(str, values)))
exec(compile(source, path, "exec"), {"__name__": "__main__", "print": record})
for number, line in enumerate(source.splitlines(), 1):
    _, told, wanted = line.partition("# -> ")
    pattern = ".*".join(map(re.escape, wanted.split("...")))
    for text in printed.get(number, ["nothing"]) if told else []:
        if not re.fullmatch(pattern, text):
            sys.exit(f"{path}:{number} prints {text!r}, not {wanted!r}")
"""


def blocks(page, kind):
    """(number of lines before it, code) of the fenced blocks of a kind. Those of kind "python
    fragment" are not meant to run."""
    text = page.read_text()
    return [
        (text.count("\n", 0, found.start(1)), found[1])
        for found in re.finditer(rf"^```{kind}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    ]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=page_id)
def test_code_does_what_it_says(page, tmp_path):
    source = ""
    for n_lines, code in blocks(page, "python"):
        source += "\n" * (n_lines - source.count("\n")) + code
    assert source.count("# -> ") >= 3
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", RUNNER, page.name],
        input=source,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page, "python test")], ids=page_id
)
def test_tests_in_it_pass(page, tmp_path):
    for number, (_, code) in enumerate(blocks(page, "python test")):
        (tmp_path / f"test_block_{number}.py").write_text(code)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stdout
    assert "ksmcore: memory saved" in done.stdout


def test_every_python_block_is_marked():
    kinds = {"python", "python test", "python fragment", "sh", ""}
    for page in PAGES:
        fences = re.findall(r"^```(.*)$", page.read_text(), re.MULTILINE)
        assert len(fences) % 2 == 0
        assert set(fences[::2]) <= kinds
        assert not any(fences[1::2])
        for _, code in blocks(page, "python fragment"):
            compile(code, page.name, "exec")
