"""The demonstration at a tiny scale: it ends well, says what it saved, notices what is wrong."""

from __future__ import annotations

import re
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import ksmcore
import ksmcore.cli.demo
from helpers.cli import ksmcore as command_line

TINY = 0.01


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The demonstration, with a default engine of its own."""
    with ksmcore.Engine() as engine:
        monkeypatch.setattr(ksmcore, "default_engine", lambda: engine)
        yield ksmcore.cli.demo


def saved_mib(output: str) -> float:
    """What the demonstration says that ksmcore counted as saved."""
    found = re.search(r"^Saved, by ksmcore's count: ([\d.,]+) MiB", output, re.MULTILINE)
    assert found is not None, output
    return float(found[1].replace(",", ""))


def test_from_the_command_line_with_a_progress_bar() -> None:
    done = command_line("demo", "--scale", TINY)
    assert done.returncode == 0, done.stdout + done.stderr
    assert saved_mib(done.stdout) > 5
    assert "PSS" in done.stdout
    assert "Done" in done.stdout
    assert "ksmcore dedup" in done.stderr
    assert command_line("demo", "--scale", TINY, "--no-progress").stderr == ""


def test_twice_in_one_process_leaves_nothing_registered(
    demo: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        assert demo.demonstrate(TINY, progress=False) == 0
        shown = capsys.readouterr()
        assert saved_mib(shown.out) > 5
        assert shown.err == ""
    assert ksmcore.default_engine().regions == ()


@pytest.mark.parametrize("broken", ["scan", "unregister"])
def test_a_changed_array_is_noticed(
    demo: ModuleType,
    broken: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One changed number, in an array that the demonstration does not write to, ends it with 1."""
    kept: list[Any] = []
    hold, real = demo.hold, getattr(ksmcore, broken)

    def keep(*args: Any) -> Any:
        kept.append(hold(*args))
        return kept[0]

    def corrupt(*args: Any, **kwargs: Any) -> Any:
        result = real(*args, **kwargs)
        kept[0].arrays["model3.block2.down"][0, 0] += 1
        return result

    monkeypatch.setattr(demo, "hold", keep)
    monkeypatch.setattr(ksmcore, broken, corrupt)
    assert demo.demonstrate(TINY, progress=False) == 1
    wrong = capsys.readouterr().err
    assert wrong.startswith("demo: WRONG: ")
    assert "model3.block2.down has other bytes" in wrong


def test_nothing_saved_is_a_failure(
    demo: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = ksmcore.dedup

    def dedup_nothing(*buffers: object, progress: bool) -> ksmcore.PassReport:
        return real(progress=progress)

    monkeypatch.setattr(ksmcore, "dedup", dedup_nothing)
    monkeypatch.setattr(ksmcore, "empty", np.empty)
    assert demo.demonstrate(TINY, progress=False) == 1
    assert "WRONG: nothing was saved" in capsys.readouterr().err


@pytest.mark.parametrize("scale", ["0", "-1", "nan", "1e9", "much"])
def test_a_scale_out_of_range_is_refused(scale: str) -> None:
    done = command_line("demo", f"--scale={scale}")
    assert (done.returncode, done.stdout) == (2, "")
    assert "--scale" in done.stderr
