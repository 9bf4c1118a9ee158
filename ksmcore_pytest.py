"""pytest plugin: the fixture `ksm`, the marker `min_saved`, and a summary of what was saved.

    @pytest.mark.min_saved("50 MB")
    def test_models(ksm):
        models = [ksm.array(backbone) for _ in range(8)]
        ksm.dedup()

Loaded by pytest wherever ksmcore is installed; does nothing, and imports nothing, until one of the
two is used.
"""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from ksmcore._engine.engine import Engine

SAVED = "ksmcore bytes saved"  # a property of a test's report


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "min_saved(size): the test fails unless a pass of its fixture `ksm` leaves as much saved; "
        "size is a number of bytes, or text like '50 MB'",
    )


def pytest_runtest_setup(item: pytest.Item) -> None:
    marker = item.get_closest_marker("min_saved")
    if marker is None:
        return
    try:
        _asked(marker)
    except (TypeError, ValueError) as error:
        raise pytest.fail.Exception(f"min_saved: {error}", pytrace=False) from None
    if "ksm" not in getattr(item, "fixturenames", ()):
        pytest.fail("min_saved needs the fixture `ksm`", pytrace=False)


def _asked(marker: pytest.Mark) -> int:
    from ksmcore.sizes import parse_bytes

    if len(marker.args) != 1 or marker.kwargs:
        raise TypeError("it takes one size")
    return parse_bytes(marker.args[0])


def _engine(item: pytest.Item) -> Engine | None:
    """The test's engine; None if it has none, or a fixture of that name that is another's."""
    found: Any = getattr(item, "funcargs", {}).get("ksm")
    library = sys.modules.get("ksmcore")
    return found if library is not None and isinstance(found, library.Engine) else None


@pytest.fixture
def ksm() -> Iterator[Engine]:
    """A fresh ksmcore engine, closed after the test."""
    import ksmcore

    with ksmcore.Engine() as engine:
        yield engine


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    # Not pytest_pyfunc_call, which methods of unittest.TestCase do not go through.
    result = yield
    engine = _engine(item)
    if engine is not None:
        # Not what is saved now: arrays of the test's own have gone by the time it returns.
        saved = engine.peak_bytes_saved
        item.user_properties.append((SAVED, saved))
        marker = item.get_closest_marker("min_saved")
        if marker is not None and saved < _asked(marker):
            pytest.fail(
                f"{saved:,} bytes saved at most, of {_asked(marker):,} asked for", pytrace=False
            )
    return result


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    saved = [
        (report.nodeid, value)
        for outcome in ("passed", "failed")
        for report in terminalreporter.getreports(outcome)
        if report.when == "call"
        for name, value in report.user_properties
        if name == SAVED
    ]
    if saved:
        from ksmcore.sizes import human_bytes

        terminalreporter.section("ksmcore: memory saved")
        for test, n_bytes in saved:
            terminalreporter.write_line(f"{human_bytes(n_bytes):>10}  {test}")
