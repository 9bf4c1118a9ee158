"""For the lost-write tests: the writers in C, every guard, and a summary of what was counted."""

import ctypes
from pathlib import Path

import pytest

import ksmcore
from helpers.handlers import SOURCE
from helpers.native import compiled
from ksmcore._engine.settings import GUARDS


@pytest.fixture(scope="session")
def writers(tmp_path_factory):
    """The C files of this directory, and the handlers, as one library."""
    sources = [*sorted(Path(__file__).parent.glob("*.c")), SOURCE]
    loaded = ctypes.CDLL(str(compiled(tmp_path_factory.mktemp("writers"), sources)))
    loaded.writers_run.restype = ctypes.c_long
    loaded.writers_flip.restype = None
    loaded.writers_stop.restype = None
    loaded.calls_run.restype = None
    loaded.calls_jam.restype = None
    return loaded


@pytest.fixture(params=GUARDS)
def guard(request):
    """Each guard that can be had here."""
    why_not = ksmcore.features().get(request.param)
    if why_not is not None:
        pytest.skip(f"no {request.param} guard here: {why_not}")
    return request.param


def pytest_terminal_summary(terminalreporter):
    reports = [
        report
        for outcome in ("passed", "failed")
        for report in terminalreporter.getreports(outcome)
        if report.when == "call" and report.user_properties
    ]
    counted = [
        (report.nodeid.rpartition("::")[2], name, value)
        for report in reports
        if "/stress/" in report.nodeid
        for name, value in report.user_properties
    ]
    if counted:
        terminalreporter.section("counted by the lost-write tests")
    for test, name, value in counted:
        terminalreporter.write_line(f"{test}: {name}: {value}")
