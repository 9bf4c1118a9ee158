"""`ksmcore run` around the program: the summary, the reports, and why nothing was saved."""

import json
import os
import re
import subprocess
import sys

import pytest

import ksmcore as library
from helpers.cli import KSMCORE, MERGED, SAVED_BYTES, ksmcore, python, write
from ksmcore.cli.figures import Source, summary

# Stands in for the HTML report, and sees whether the arrays are there when it is made.
REPORT = """
    import sys, types
    def html_report(engine, *, title, command, exit_status):
        return f"{title}|{command}|{exit_status}|{engine.stats().bytes_saved}"
    sys.modules["ksmcore._show.report"] = types.ModuleType("ksmcore._show.report")
    sys.modules["ksmcore._show.report"].html_report = html_report
    sys.argv[0] = "ksmcore"
    from ksmcore.cli import main
    main()
"""


def with_report(tmp_path, *arguments, **options):
    start = write(tmp_path, REPORT, "start.py")
    return python(start, "run", *arguments, cwd=tmp_path, text=True, **options)


# ---- the end -------------------------------------------------------------------------------------

# What is registered before ksmcore comes to be there is called after its own handler.
AT_THE_END = """
    import atexit, os, sys
    def look():
        with open("/proc/self/maps") as maps:
            n_shared = sum("/memfd:ksmcore" in line and " rw-p " in line for line in maps)
        arrays = getattr(sys.modules["__main__"], "models", None)
        if n_shared and arrays:
            right = all((array == arrays[0]).all() for array in arrays)
            os.write(1, f"{os.getpid()} shared, right: {right}\\n".encode())
    atexit.register(look)
"""


@pytest.mark.parametrize("children", [(), ("--children",)])
def test_what_is_merged_is_not_copied_back_for_the_end(tmp_path, children):
    """Of the program's own process, and of those below it."""
    write(tmp_path, AT_THE_END, "sitecustomize.py")
    write(tmp_path, MERGED, "inner.py")
    outer = MERGED
    if children:
        outer += """
    import subprocess
    subprocess.run([sys.executable, "inner.py"], check=True)
"""
    write(tmp_path, outer)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path}
    done = ksmcore("run", *children, "program.py", cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    told = re.findall(r"^(\d+) shared, right: True$", done.stdout, re.MULTILINE)
    assert len(set(told)) == len(told) == 1 + len(children)
    assert "saved at most" in done.stderr


# ---- what it saves -------------------------------------------------------------------------------


def test_memory_is_saved_by_the_kernels_figures(tmp_path):
    """The same program takes less; the summary says how much, and the program's output is alone."""
    script = """
        import sys, time
        import numpy as np
        from ksmcore._kernel import smaps
        def pss():
            totals = smaps.smaps_rollup()
            return totals["Pss"] - totals.get("Pss_File", 0)
        deadline = time.monotonic() + (60 if "wait" in sys.argv else 0)
        before = pss()
        base = np.random.default_rng(1).random(250_000)
        models = [base.copy() for _ in range(30)]
        while pss() - before > 5 * base.nbytes and time.monotonic() < deadline:
            time.sleep(0.05)
        assert all((model == base).all() for model in models)
        print(pss() - before <= 5 * base.nbytes)
    """
    write(tmp_path, script)
    plain = python("program.py", cwd=tmp_path, text=True)
    assert (plain.stdout, plain.stderr) == ("False\n", "")
    ours = ksmcore("run", "program.py", "wait", cwd=tmp_path)
    assert ours.stdout == "True\n"
    assert ours.returncode == 0
    assert ours.stderr.startswith("ksmcore: ")
    assert "MiB saved at most" in ours.stderr
    assert "PSS" in ours.stderr
    assert re.search(r"pass(es)? in", ours.stderr)


@pytest.mark.parametrize(
    ("which", "saves"), [((), True), (("--memory", "numpy"), False), (("--memory", "all"), True)]
)
def test_memory_that_is_not_numpys(tmp_path, which, saves):
    if saves and library.features()["memory"] is not None:
        pytest.skip("malloc cannot be redirected here")
    script = """
        import time
        import numpy as np
        import ksmcore
        looked_at = np.arange(100_000)
        blocks = [bytes(range(1, 251)) * 40_000 for _ in range(5)]
        done = ksmcore.stats().full_scans
        while ksmcore.stats().full_scans < done + 4:
            time.sleep(0.02)
        assert all(block == blocks[0] for block in blocks)
    """
    write(tmp_path, script)
    given = (*which, "--interval", "1", "--json", "out.json")
    done = ksmcore("run", "--quiet", *given, "program.py", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    found = json.loads((tmp_path / "out.json").read_text())
    assert (found["peak_bytes_saved"] > 30_000_000) == saves


@pytest.mark.parametrize("leave", ["pass", "sys.exit(3)", "1/0", "raise KeyboardInterrupt"])
def test_figures_are_those_of_the_end_while_arrays_live(tmp_path, leave):
    """Also those that only a function knows, when it is left by an error."""
    local = "def main():\n" + MERGED.replace("\n    ", "\n        ") + f"        {leave}\n"
    script = f"{MERGED}\n    {leave}\n" if leave == "pass" else f"    {local}\n    main()\n"
    write(tmp_path, script)
    done = ksmcore("run", "--json", "out.json", "program.py", cwd=tmp_path)
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["bytes_saved"] > SAVED_BYTES
    assert found["peak_bytes_saved"] >= found["bytes_saved"]
    assert found["memory"]["saved"] > SAVED_BYTES
    assert found["stats"]["full_scans"] >= 2
    assert found["exit_status"] == done.returncode % 256 or leave == "raise KeyboardInterrupt"
    assert found["command"] == ["python", "program.py"]
    assert sum(region["pages_merged"] for region in found["regions"]) > 0


def test_threads_that_go_on_after_the_end(tmp_path):
    """The figures are taken when they are done too."""
    script = f"""
    import threading
    def work():
        global models
        {MERGED.replace(chr(10) + "    ", chr(10) + "        ")}
        print("done")
    threading.Thread(target=work).start()
    """
    write(tmp_path, script)
    done = ksmcore("run", "--json", "out.json", "program.py", cwd=tmp_path)
    assert done.stdout == "done\n", done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["bytes_saved"] > SAVED_BYTES


# ---- reports -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("leave", "status"), [("pass", 0), ("sys.exit(3)", 3), ("1/0", 1)])
def test_reports_are_written_whatever_happens(tmp_path, leave, status):
    """Where they were asked for, though the program goes elsewhere."""
    write(tmp_path, f"{MERGED}\n    import os\n    os.chdir('/')\n    {leave}\n")
    done = with_report(tmp_path, "--report", "out.html", "--json", "out.json", "program.py", "a b")
    assert done.returncode == status
    assert done.stderr.count("Written") == 2
    title, command, exit_status, saved = (tmp_path / "out.html").read_text().split("|")
    assert title == "python program.py 'a b'"
    assert command == "['python', 'program.py', 'a b']"
    assert int(exit_status) == status
    assert int(saved) > SAVED_BYTES
    assert json.loads((tmp_path / "out.json").read_text())["exit_status"] == status
    assert sorted(path.suffix for path in tmp_path.glob("*out*")) == [".html", ".json"]


@pytest.mark.parametrize("quiet", [(), ("--quiet",)])
def test_a_report_that_cannot_be_written_any_more(tmp_path, quiet):
    (tmp_path / "gone").mkdir()
    (tmp_path / "taken").mkdir()
    script = """
        import os
        print("output")
        os.rmdir("gone")
        os.mkdir("taken/out.json")
        raise SystemExit(3)
    """
    write(tmp_path, script)
    done = with_report(
        tmp_path, *quiet, "--report", "gone/out.html", "--json", "taken/out.json", "program.py"
    )
    assert done.returncode == 3
    assert done.stdout == "output\n"
    for path, why in (("gone/out.html", "No such file"), ("taken/out.json", "Is a directory")):
        assert f"ksmcore: {path} was not written: " in done.stderr
        assert re.search(rf"{why}.*'{path}'", done.stderr)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["run", "estimate"])
@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("", "no file's name"),
        ("-", "no file's name"),
        ("no/out.json", "no such directory: 'no'"),
        ("directory", "Is a directory"),
        ("program.py", "program.py is a program"),
        ("link", "link is a program"),
    ],
)
def test_a_report_that_cannot_be_written_is_refused_before_the_program_begins(
    tmp_path, command, path, why
):
    """Among them a name that was forgotten, where the program's is taken for it."""
    program = write(tmp_path, "print('output')")
    (tmp_path / "link").symlink_to("program.py")
    (tmp_path / "directory").mkdir()
    done = ksmcore(command, "--json", path, "program.py", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert why in done.stderr
    assert program.read_text() == "print('output')"


def test_a_report_through_a_link_and_to_what_is_no_file(tmp_path):
    write(tmp_path, "print('output')")
    (tmp_path / "real.json").write_text("old")
    (tmp_path / "real.json").chmod(0o640)
    (tmp_path / "link").symlink_to("real.json")
    done = ksmcore("run", "--json", "link", "--report", "/dev/null", "program.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "link").is_symlink()
    assert json.loads((tmp_path / "real.json").read_text())["schema"] == 1
    assert (tmp_path / "real.json").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("command", ["run", "estimate"])
def test_numbers_on_a_pipe(tmp_path, command):
    write(tmp_path, "import os; print('output'); os.chdir('/')")
    done = ksmcore(command, "--json", "/dev/stdout", "program.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "not written" not in done.stderr
    begun, rest = done.stdout.split("\n", 1)
    assert begun == "output"
    assert json.loads(rest)["schema"] == 1


def test_numbers_where_the_output_goes(tmp_path):
    """What the program wrote there stays, and so do the numbers when somebody goes on."""
    write(tmp_path, "print('output')")
    command = [sys.executable, "-m", "ksmcore", "run", "--json", "out", "program.py"]
    with open(tmp_path / "out", "w") as out:
        subprocess.run(command, stdout=out, cwd=tmp_path, timeout=120, check=True)
        out.write("later")
    begun, rest = (tmp_path / "out").read_text().split("\n", 1)
    assert begun == "output"
    assert rest.endswith("}\nlater")
    assert json.loads(rest.removesuffix("later"))["schema"] == 1


def test_an_argument_that_is_no_text_loses_no_report(tmp_path):
    write(tmp_path, "import sys; assert sys.argv[1] == 'caf\\udce9.npy'")
    both = ("--report", "out.html", "--json", "out.json")
    done = ksmcore("run", *both, "program.py", "caf\udce9.npy", cwd=tmp_path)
    assert (done.returncode, done.stderr.count("Written")) == (0, 2)
    assert json.loads((tmp_path / "out.json").read_text())["command"][-1] == "caf\udce9.npy"
    assert "caf\\udce9.npy" in (tmp_path / "out.html").read_text()


def test_one_file_for_two_reports_is_refused(tmp_path):
    write(tmp_path, "print('output')")
    (tmp_path / "link").symlink_to("out")
    both = ("--json", "out", "--report", "./link")
    done = ksmcore("run", *both, "program.py", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "--report and --json name the same file" in done.stderr
    both = ("--json", "/dev/null", "--report", "/dev/null")
    assert ksmcore("run", *both, "program.py", cwd=tmp_path).returncode == 0


def test_arrays_that_have_gone_are_no_saving_at_the_end(tmp_path):
    program = MERGED + "    del base, models\n"
    write(tmp_path, program)
    done = ksmcore("run", *NUMPYS, "--json", "out.json", "program.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["peak_bytes_saved"] >= SAVED_BYTES
    assert found["bytes_saved"] == 0
    assert found["allocator"]["dirty_bytes"] == 0
    assert "0 B at the end" in done.stderr


def test_a_report_that_fails(tmp_path):
    write(tmp_path, "print('output')")
    write(tmp_path, REPORT.replace("return f", "1/0; f"), "start.py")
    done = python("start.py", "run", "--report", "o", "program.py", cwd=tmp_path, text=True)
    assert (done.returncode, done.stdout) == (0, "output\n")
    assert "ksmcore: o was not written: division by zero" in done.stderr
    assert not (tmp_path / "o").exists()


def test_a_report_that_nothing_can_make_is_refused_before_the_program_begins(tmp_path):
    write(tmp_path, "print('output')")
    write(tmp_path, REPORT.replace(".html_report = html_report", ".other = 1"), "start.py")
    done = python("start.py", "run", "--report", "o", "program.py", cwd=tmp_path, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert "html_report" in done.stderr


# ---- the summary ---------------------------------------------------------------------------------


def test_quiet(tmp_path):
    write(tmp_path, "import sys; print(1); print(2, file=sys.stderr)")
    done = ksmcore("run", "--quiet", "program.py", cwd=tmp_path)
    assert (done.stdout, done.stderr) == ("1\n", "2\n")


HELD = """
    import time
    import numpy as np
    import ksmcore
    rng = np.random.default_rng(1)
    def wait(until):
        deadline = time.monotonic() + 60
        while not until(ksmcore.stats()):
            assert time.monotonic() < deadline
            time.sleep(0.01)
"""
# The interpreter's own blocks are no part of what happens then.
NUMPYS = ("--memory", "numpy")
UNIQUE = """
    kept = [rng.random(50_000) for _ in range(4)]
    wait(lambda stats: stats.pages_unshared >= 4 * 97)
"""
LEFT = """
    kept = [np.arange(100_000) for _ in range(12)]
    wait(lambda now: now.skipped["map_budget"] > 0 and now.pages_unshared > now.pages_volatile)
"""
YOUNG = """
    end = ksmcore.stats().full_scans + 2
    while ksmcore.stats().full_scans < end:
        kept = [rng.random(50_000) for _ in range(4)]
"""
EQUAL = """
    import time
    import numpy as np
    kept = [np.arange(100_000) for _ in range(12)]
    time.sleep({seconds})
"""


@pytest.mark.parametrize(
    ("script", "options", "environ", "reason"),
    [
        ("", NUMPYS, {}, "the program made no NumPy array of 64.0 KiB or more"),
        ("import numpy; numpy.ones(9)", (*NUMPYS, "--threshold", "1M"), {}, "of 1.0 MiB or more"),
        ("", ("--threshold", "1G"), {}, " of 1.0 GiB or more"),
        (HELD + YOUNG, NUMPYS, {}, "its arrays lived for less than a second"),
        (HELD + UNIQUE, NUMPYS, {}, "no two pages of its arrays held the same bytes"),
        (EQUAL.format(seconds=0), ("--no-scan",), {}, "with --no-scan nothing looks for equal"),
        (EQUAL.format(seconds=0.5), ("--interval", "60000"), {}, "so it takes two"),
        (EQUAL.format(seconds=0), (), {"KSMCORE_DISABLE": "1"}, "KSMCORE_DISABLE is set"),
        (HELD + LEFT, NUMPYS, {"KSMCORE_MAP_BUDGET": "0"}, "for the reasons below"),
    ],
)
def test_why_nothing_was_saved(tmp_path, script, options, environ, reason):
    write(tmp_path, script)
    done = ksmcore("run", *options, "program.py", cwd=tmp_path, env={**os.environ, **environ})
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("ksmcore: Nothing was saved: ")
    assert reason in done.stderr


def test_a_program_that_is_left_alone_has_nothing_of_ours_loaded(tmp_path):
    write(
        tmp_path, "import sys; print([n for n in sys.modules if n in ('numpy', 'ksmcore._core')])"
    )
    environ = {**os.environ, "KSMCORE_DISABLE": "1"}
    done = ksmcore("run", "--quiet", "program.py", cwd=tmp_path, env=environ)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")
    done = ksmcore("run", "--json", "out.json", "program.py", cwd=tmp_path, env=environ)
    assert json.loads((tmp_path / "out.json").read_text())["disabled"] is True


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"skipped": {"young": 9, "map_budget": 0}, "pages_hashed": 0}, "lived for less than a"),
        ({"pages_volatile": 10, "pages_unshared": 3}, "most pages changed from pass to pass"),
        ({"pages_volatile": 3, "pages_unshared": 10}, "held the same bytes (10 different ones"),
        ({"pages_left_out": 7}, "had to be left, for the reasons below"),
        ({"pages_merged": 7}, "written or freed again before a pass had ended"),
        ({"pages_scanned": 0}, "no page was in memory while the scanner looked"),
        ({"full_scans": 1}, "the program ended after 1 pass of the scanner."),
        ({"scanner_error": "OSError(5)"}, "the scanner ended by an error: OSError(5)"),
    ],
)
def test_why_nothing_was_saved_by_the_numbers(changes, reason):
    with library.Engine() as engine:
        figures = {**Source(engine, ["python"], 65536).snapshot(), "past_malloc": []}
    assert len(summary(figures)) == 1  # nothing was made, and nothing is to be told
    figures["regions_ever"] = 1
    figures["stats"].update(regions=1, full_scans=5, pages_scanned=100)
    figures["stats"].update(changes)
    first, *_ = summary(figures)
    assert first.startswith("ksmcore: Nothing was saved: ")
    assert reason in first
    figures["peak_bytes_saved"] = 1 << 20
    assert summary(figures)[0] == "ksmcore: 1.0 MiB saved at most, 0 B at the end"


def test_what_more_mappings_would_bring_is_told_once():
    with library.Engine() as engine:
        figures = {**Source(engine, ["python"], 65536).snapshot(), "past_malloc": []}
    figures["regions_ever"] = 1
    figures["stats"].update(full_scans=5, pages_scanned=100)
    figures["stats"].update(
        {"pages_left_out": 512, "page_bytes": 4096, "maps_used": 90, "maps_allowed": 100}
    )
    figures["stats"].update(
        {"bytes_saved_per_map": 2048, "skipped": {"map_budget": 9_000, "changed": 3}}
    )
    figures["peak_bytes_saved"] = 1 << 20
    lines = summary(figures)
    told = [line.strip() for line in lines if "apping" in line]
    assert len(told) == 1
    assert told[0].startswith(
        "Mappings 90 of 100 in use, for 2.0 KiB saved each; up to 2.0 MiB more with a higher"
    )
    assert any("Skipped  3 times" in line for line in lines)


def test_memory_that_the_allocator_does_not_get_is_told(tmp_path):
    script = """
        import resource
        import numpy as np
        _, most = resource.getrlimit(resource.RLIMIT_AS)
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        # Less than a chunk, and room for what threads map when they begin.
        resource.setrlimit(resource.RLIMIT_AS, (used + (60 << 20), most))
        kept = np.ones(1 << 20)
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    """
    write(tmp_path, script)
    done = ksmcore("run", *NUMPYS, "program.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Nothing was saved: the kernel refused the memory for its arrays" in done.stderr
    assert "Refused  1 time memory for arrays" in done.stderr


def test_what_was_skipped_is_told(tmp_path):
    environ = {**os.environ, "KSMCORE_MAX_SHARED_PAGES": "60"}
    script = MERGED.replace("10 * base.nbytes", "1")
    write(tmp_path, f"{script}\n    time.sleep(0.5)")
    done = ksmcore("run", "program.py", cwd=tmp_path, env=environ)
    assert "a page that met the limit max_shared_pages" in done.stderr


@pytest.mark.parametrize(
    "do",
    [
        "os.close(2); open('data', 'w')",
        "os.dup2(os.open('data', os.O_WRONLY | os.O_CREAT), 2)",
        "sys.stderr.close()",
        "sys.stderr = sys.stdout = None",
        "os.closerange(0, 1024)",
    ],
)
def test_what_the_program_does_to_stderr(tmp_path, do):
    """The summary goes to the stderr that the process began with, or nowhere."""
    write(tmp_path, f"import os, sys; {do}")
    done = ksmcore("run", "program.py", cwd=tmp_path)
    plain = python("program.py", cwd=tmp_path, text=True)
    assert done.returncode == plain.returncode == 0
    assert done.stdout == plain.stdout == ""
    if (tmp_path / "data").exists():
        assert (tmp_path / "data").read_bytes() == b""
    if "None" in do or "stderr.close" in do:
        assert done.stderr.startswith("ksmcore: ")
    else:
        assert done.stderr == ""


def test_output_of_the_program_comes_first(tmp_path):
    write(tmp_path, "import sys; sys.stdout.write('output without an end'); 1/0")
    with open(tmp_path / "both", "wb") as both:
        command = [sys.executable, *KSMCORE, "run", "program.py"]
        subprocess.run(command, cwd=tmp_path, stdout=both, stderr=both, check=False, timeout=120)
    text = (tmp_path / "both").read_text()
    assert text.index("ZeroDivisionError") < text.index("ksmcore: ")
    assert text.index("output without an end") < text.index("ksmcore: ")


def test_the_engine_is_closed_by_the_program(tmp_path):
    write(
        tmp_path,
        f"{MERGED}\n    ksmcore.default_engine().close(); print((models[3] == base).all())",
    )
    done = ksmcore("run", "program.py", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "True\n")
    assert "saved at most, 0 B at the end" in done.stderr


def test_settings(tmp_path):
    script = """
        import ksmcore, numpy as np
        from ksmcore._testing.arena import is_here
        print(ksmcore.default_engine().scanning, ksmcore.default_engine().settings.sleep_millisecs)
        for n in (1000, 5000):
            print(is_here(np.ones(n, np.uint8)))
    """
    write(tmp_path, script)
    told = {
        (): "True 20\nFalse\nFalse\n",
        ("--interval", "7", "--threshold", "4k"): "True 7\nFalse\nTrue\n",
        ("--no-scan", "--threshold", "4096"): "False 20\nFalse\nTrue\n",
    }
    for options, output in told.items():
        assert ksmcore("run", *options, "program.py", cwd=tmp_path).stdout == output


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--threshold", "much"], "'much' is no size"),
        (["--threshold", "0"], "not between 1 byte"),
        (["--interval", "-1"], "-1"),
        (["--unknown"], "--unknown"),
        ([], "SCRIPT"),
        (["-m"], "SCRIPT"),
    ],
)
def test_wrong_options(tmp_path, options, told):
    done = ksmcore("run", *options, *(["program.py"] if told != "SCRIPT" else []), cwd=tmp_path)
    assert done.returncode == 2
    assert told in done.stderr
    assert done.stdout == ""


def test_a_wrong_setting_in_the_environment(tmp_path):
    write(tmp_path, "print(1)")
    environ = {**os.environ, "KSMCORE_MAX_CPU": "200"}
    done = ksmcore("run", "program.py", cwd=tmp_path, env=environ)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("Error: KSMCORE_MAX_CPU='200'")


def test_every_reason_has_words():
    with library.Engine() as engine:
        figures = {**Source(engine, ["python"], 65536).snapshot(), "past_malloc": []}
    reasons = figures["stats"]["skipped"]
    del reasons["young"]  # is not told
    figures["regions_ever"], figures["allocator"]["peak_bytes"] = 1, 1 << 30
    reasons.update(dict.fromkeys(reasons, 2))
    told = [line for line in summary(figures) if "Skipped" in line]
    assert len(told) == len(set(told)) == len(reasons)
    assert "  Skipped  2 times a page that lies in a region that was held" in told
