"""The command line itself: help, version, what is missing, `doctor` as it is printed."""

import json
import os
import re
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

import pytest

from helpers.cli import KSMCORE, ksmcore, python, write
from ksmcore import __version__
from ksmcore.cli.checkup import show
from ksmcore.doctor import Check, Diagnosis
from ksmcore.doctor.checks import map_limit

COMMANDS = ("run", "report", "doctor", "estimate", "live", "demo")


def test_help_names_every_command():
    done = ksmcore("--help")
    assert done.returncode == 0
    for command in COMMANDS:
        # With a line that is not cut off.
        assert re.search(rf"^  {command} +\w.*\.$|^  {command} +\w.*\?$", done.stdout, re.MULTILINE)
        more = ksmcore(command, "--help")
        assert more.returncode == 0
        assert more.stdout.startswith(f"Usage: ksmcore {command} ")
    assert ksmcore("-h").stdout == done.stdout


def test_no_command_and_a_wrong_one():
    assert ksmcore().returncode == 2
    done = ksmcore("nothing")
    assert done.returncode == 2
    assert "'nothing'" in done.stderr


def test_version():
    assert ksmcore("--version").stdout == f"ksmcore {__version__}\n"


def test_the_script_is_the_same():
    script = Path(sysconfig.get_path("scripts"), "ksmcore")
    (entry,) = metadata.entry_points(group="console_scripts", name="ksmcore")
    assert entry.value == "ksmcore.cli:main"
    if not script.exists():
        pytest.skip("not installed by pip")
    done = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"ksmcore {__version__}\n"


@pytest.mark.parametrize("missing", [["click"], ["rich"], ["click", "rich"]])
def test_what_is_missing_is_named(tmp_path, missing):
    script = f"""
        import importlib.util, sys
        real = importlib.util.find_spec
        importlib.util.find_spec = lambda name: None if name in {missing} else real(name)
        from ksmcore.cli import main
        main()
    """
    write(tmp_path, script)
    done = python("program.py", "doctor", cwd=tmp_path, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"ksmcore: the command line needs {' and '.join(missing)}: "
        f"pip install {' '.join(missing)}\n"
    )


def test_importing_ksmcore_imports_nothing_of_it():
    program = "import ksmcore, ksmcore.doctor, sys; print({'click', 'rich'} & set(sys.modules))"
    assert python("-c", program, text=True).stdout == "set()\n"


# ---- doctor --------------------------------------------------------------------------------------


def test_doctor():
    done = ksmcore("doctor", env={**os.environ, "COLUMNS": "90"})
    assert done.returncode in (0, 1)
    assert done.stderr == ""
    assert max(map(len, done.stdout.splitlines())) <= 90
    for name in ("self-test", "guard", "mappings", "huge pages"):
        assert re.search(rf"^{name} +(ok|WEAK|BROKEN)", done.stdout, re.MULTILINE)
    assert re.search(r"^(Healthy|Weak): ", done.stdout, re.MULTILINE)


def test_doctor_as_json():
    done = ksmcore("doctor", "--json")
    found = json.loads(done.stdout)
    assert found["exit_status"] == done.returncode
    assert found["schema"] == 1


def test_doctor_of_what_is_broken():
    done = ksmcore("doctor", env={**os.environ, "KSMCORE_DISABLE": "1"})
    assert done.returncode == 2
    assert "-> unset KSMCORE_DISABLE" in done.stdout
    assert "\nBroken: " in done.stdout


def test_remedies_are_below_what_they_help(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "110")
    checks = (
        map_limit(500, 2**20),
        map_limit(65_000, 65_530),
        Check("other", "good", "text"),
    )
    show(Diagnosis(checks))
    lines = capsys.readouterr().out.splitlines()
    assert [line[:13].strip() for line in lines[:4]] == ["mappings", "mappings", "", "other"]
    assert lines[2].strip().startswith("-> sudo sysctl vm.max_map_count=1048576")
    assert lines[-1] == ("Weak: ksmcore works here, and not as it should. 1 thing could be better.")


def test_broken_pipe():
    with subprocess.Popen(
        [sys.executable, *KSMCORE, "doctor", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        process.stdout.close()
        assert b"Traceback" not in process.stderr.read()


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    "command",
    [
        ("doctor",),
        ("doctor", "--json"),
        ("live", "--once", os.getpid()),
        ("demo", "--scale", "0.02", "--no-progress"),
        ("--help",),
        ("run", "--help"),
        ("--version",),
    ],
    ids=lambda words: "-".join(map(str, words[:2])),
)
def test_output_that_cannot_be_written(command, unbuffered):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, *KSMCORE, *map(str, command)],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
            timeout=120,
            check=False,
        )
    assert done.stderr == "ksmcore: the output cannot be written: No space left on device\n"
    assert done.returncode == os.EX_IOERR


def test_output_of_a_program_that_cannot_be_written_is_the_programs(tmp_path):
    write(tmp_path, "print(1, flush=True)")
    with open("/dev/full", "w") as full:
        plain, ours = (
            subprocess.run(
                [sys.executable, *before, "program.py"],
                stdout=full,
                stderr=subprocess.PIPE,
                cwd=tmp_path,
                timeout=120,
                check=False,
            )
            for before in ((), (*KSMCORE, "run", "--quiet"))
        )
    assert (ours.returncode, ours.stderr) == (plain.returncode, plain.stderr)


def test_an_error_that_cannot_be_told():
    with open("/dev/full", "w") as full:
        command = [sys.executable, *KSMCORE, "unknown"]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=full, check=False, timeout=60)
    assert (done.returncode != 0, done.stdout) == (True, b"")


def test_a_setting_that_is_no_text_is_shown():
    environ = {**os.environb, b"KSMCORE_GUARD": b"\xff", b"PYTHONIOENCODING": b"utf-8:strict"}
    done = ksmcore("doctor", env=environ)
    assert (done.returncode, done.stderr) == (2, "")
    assert "KSMCORE_GUARD=\\udcff" in done.stdout
