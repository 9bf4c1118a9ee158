"""pytest plugin: `pytest --ksmcore`, the fixture `ksm`, the marker `min_saved`, and a table of what
was saved.

    @pytest.mark.min_saved("50 MB")
    def test_models(ksm):
        models = [ksm.array(backbone) for _ in range(8)]
        ksm.dedup()

With `--ksmcore` all tests run under the allocator, and when a test function returns what its arrays
hold is merged, while they still live. So does a test with the marker and without the fixture.

Loaded by pytest wherever ksmcore is installed; does nothing, and imports nothing, until one of
these is used.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from types import CodeType, FrameType
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from ksmcore._engine.engine import Engine

SAVED = "ksmcore bytes saved"  # a property of a test's report
# In the table of --ksmcore.
MOST_LINES = 30


class _Saved:
    """What is saved while a test runs, by the default engine: at most, at the end of passes."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        # What tests before have freed, or written anew, is no saving any more.
        with suppress(Exception):
            self._engine.scan()
        self._before = self._engine.stats().bytes_saved
        self.most = 0

    def merge(self) -> None:
        # What the test itself has begun may be in the way: then nothing is told.
        with suppress(Exception):
            self._engine.dedup()
            self.most = max(self.most, self._engine.stats().bytes_saved - self._before)


SAVING = pytest.StashKey[_Saved]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("ksmcore").addoption(
        "--ksmcore",
        action="store_true",
        help="run all tests under ksmcore's allocator, and tell what merging saves in each",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "min_saved(size): the test fails unless a pass of its fixture `ksm`, or one over all its "
        "arrays, leaves as much saved; size is a number of bytes, or text like '50 MB'",
    )
    if config.getoption("--ksmcore"):
        import ksmcore

        ksmcore.install_allocator()


def pytest_unconfigure(config: pytest.Config) -> None:
    if config.getoption("--ksmcore"):
        sys.modules["ksmcore"].uninstall_allocator()


def _is_ours(item: pytest.Item) -> bool:
    """Does it run under the allocator, and have what its arrays hold merged?"""
    if "ksm" in getattr(item, "fixturenames", ()):
        return False
    return (
        bool(item.config.getoption("--ksmcore")) or item.get_closest_marker("min_saved") is not None
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    if not _is_ours(item):
        return (yield)
    import ksmcore

    # Here, for what its fixtures make is its, too.
    ksmcore.install_allocator()
    item.stash[SAVING] = _Saved(ksmcore.default_engine())
    try:
        return (yield)
    finally:
        if not item.config.getoption("--ksmcore"):
            ksmcore.uninstall_allocator()


def pytest_runtest_setup(item: pytest.Item) -> None:
    marker = item.get_closest_marker("min_saved")
    if marker is None:
        return
    try:
        _asked(marker)
    except (TypeError, ValueError) as error:
        raise pytest.fail.Exception(f"min_saved: {error}", pytrace=False) from None


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


@contextmanager
def _at_return(code: CodeType, function: Callable[[], object]) -> Iterator[None]:
    """Call a function whenever that code returns, with its variables still there."""
    if sys.version_info >= (3, 12):
        monitoring = sys.monitoring
        free = [n for n in range(6) if monitoring.get_tool(n) is None]
        if not free:
            yield
            return
        event = monitoring.events.PY_RETURN
        monitoring.use_tool_id(free[-1], "ksmcore")
        monitoring.register_callback(free[-1], event, lambda *_: function() and None)
        monitoring.set_local_events(free[-1], code, event)
        try:
            yield
        finally:
            monitoring.set_local_events(free[-1], code, 0)
            monitoring.register_callback(free[-1], event, None)
            monitoring.free_tool_id(free[-1])
        return

    def profile(frame: FrameType, event: str, _: object) -> None:
        if event == "return" and frame.f_code is code:
            function()

    before = sys.getprofile()
    if before is None:
        sys.setprofile(profile)
    try:
        yield
    finally:
        if before is None:
            sys.setprofile(None)


def _merging(item: pytest.Item, saved: _Saved) -> AbstractContextManager[None]:
    """Merge when the test function returns."""
    function = getattr(item, "obj", None)
    function = getattr(function, "__func__", function)
    function = getattr(function, "__wrapped__", function)
    code = getattr(function, "__code__", None)
    return nullcontext() if code is None else _at_return(code, saved.merge)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    # Not pytest_pyfunc_call, which methods of unittest.TestCase do not go through.
    found = item.stash.get(SAVING, None)
    if found is not None:
        with _merging(item, found):
            result = yield
        found.merge()  # what its fixtures hold
        _tell(item, found.most)
        return result
    result = yield
    engine = _engine(item)
    if engine is not None:
        # Not what is saved now: arrays of the test's own have gone by the time it returns.
        _tell(item, engine.peak_bytes_saved)
    return result


def _tell(item: pytest.Item, saved: int) -> None:
    item.user_properties.append((SAVED, saved))
    marker = item.get_closest_marker("min_saved")
    if marker is not None and saved < _asked(marker):
        pytest.fail(
            f"{saved:,} bytes saved at most, of {_asked(marker):,} asked for", pytrace=False
        )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    saved = [
        (report.nodeid, value)
        for outcome in ("passed", "failed")
        for report in terminalreporter.getreports(outcome)
        if report.when == "call"
        for name, value in report.user_properties
        if name == SAVED
    ]
    if not saved:
        return
    from ksmcore.sizes import counted, human_bytes

    terminalreporter.section("ksmcore: memory saved")
    n_left = 0
    if terminalreporter.config.getoption("--ksmcore"):
        n_tests = len(saved)
        saved = sorted((one for one in saved if one[1] > 0), key=lambda one: -one[1])[:MOST_LINES]
        n_left = n_tests - len(saved)
    for test, n_bytes in saved:
        terminalreporter.write_line(f"{human_bytes(n_bytes):>10}  {test}")
    if n_left:
        terminalreporter.write_line(f"{counted(n_left, 'other')} saved less, or nothing")
