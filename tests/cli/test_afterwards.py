"""`ksmcore report`: what was written as JSON, told again."""

import json
import os

import pytest

from helpers.cli import MERGED, ksmcore, write


def test_a_run_is_told_as_it_was(tmp_path):
    write(tmp_path, MERGED)
    done = ksmcore("run", "--json", "out.json", "program.py", cwd=tmp_path)
    told = ksmcore("report", "out.json", cwd=tmp_path)
    assert (told.returncode, told.stderr) == (0, "")
    summary = [line for line in done.stderr.splitlines() if "Written" not in line]
    assert [line for line in told.stdout.splitlines() if line in summary] == summary
    assert told.stdout.startswith("ksmcore  pid ")
    assert told.stdout.endswith("  Exit     status 0\n")


def test_the_scanners_time_is_told(tmp_path):
    write(tmp_path, MERGED)
    done = ksmcore("run", "--json", "out.json", "program.py", cwd=tmp_path)
    found = json.loads((tmp_path / "out.json").read_text())
    assert 0 < found["stats"]["scanner_seconds"] < found["cpu_seconds"]
    line = (
        f"  Time     {found['stats']['scanner_seconds']:.2f} s of the "
        f"{found['cpu_seconds']:.2f} s of processor time were the scanner's"
    )
    assert line in done.stderr.splitlines()


def test_an_estimate_and_processes(tmp_path):
    write(tmp_path, MERGED.split("deadline", maxsplit=1)[0])
    done = ksmcore("estimate", "--json", "out.json", "program.py", cwd=tmp_path)
    told = ksmcore("report", "out.json", cwd=tmp_path)
    assert told.stdout.splitlines() == [*done.stderr.splitlines(), "  Exit     status 0"]
    done = ksmcore("estimate", "--pid", os.getpid(), "--json", "out.json", cwd=tmp_path)
    assert ksmcore("report", "out.json", cwd=tmp_path).stdout == done.stdout


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "is no JSON"),
        ("\xff\xfe", "is no JSON"),
        ("[]", "was not written by"),
        ('{"schema": 1}', "was not written by"),
        ('{"schema": 99, "ksmcore": "9.9"}', "written by ksmcore 9.9"),
        ('{"schema": 1, "ksmcore": "0.1.0", "stats": {}}', "is incomplete"),
        ('{"schema": 1, "ksmcore": "0.1.0"}', "is incomplete"),
    ],
)
def test_what_is_none_of_ours(tmp_path, text, why):
    (tmp_path / "out.json").write_text(text, encoding="latin-1")
    done = ksmcore("report", "out.json", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert why in done.stderr
    assert done.stderr.count("\n") == 1
    assert ksmcore("report", "nothing.json", cwd=tmp_path).returncode == 2
