"""What all tests share: the report header, fixed seeds, and fixtures that leave nothing behind."""

import contextlib
import faulthandler
import gc
import mmap
import os
import platform
import signal
import weakref

import hypothesis
import numpy as np
import pytest

import ksmcore
from helpers.memory import private_memory
from helpers.stress import LONG
from ksmcore._engine.settings import GUARDS
from ksmcore._gate import buffers
from ksmcore._kernel import procfs
from ksmcore._testing import faults, hooks

SEED = 20090331
WATCHDOG_FD = pytest.StashKey[int]()

# Derandomized: a run is the same everywhere and always. No deadline: CI machines are slow at times.
hypothesis.settings.register_profile(
    "ksmcore",
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=60,
    stateful_step_count=40,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("ksmcore")

# The buffers here are small: let their writes be tracked all the same.
MIN_WATCHED_PAGES = hooks.watch_from(1)


# A test that takes longer hangs, and shows where.
WATCHDOG_SECONDS = 300


def pytest_configure(config):
    # Past what captures output. No thread: see faulthandler_timeout in pyproject.toml.
    config.stash[WATCHDOG_FD] = os.dup(2)
    faulthandler.register(signal.SIGALRM, config.stash[WATCHDOG_FD], all_threads=True)


def pytest_unconfigure(config):
    faulthandler.unregister(signal.SIGALRM)
    os.close(config.stash[WATCHDOG_FD])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol():
    signal.alarm(WATCHDOG_SECONDS)
    try:
        return (yield)
    finally:
        signal.alarm(0)


def pytest_report_header():
    features = ", ".join(
        f"{name}: {'yes' if why_not is None else f'no ({why_not})'}"
        for name, why_not in ksmcore.features().items()
    )
    return [
        f"ksmcore {ksmcore.__version__}, Python {platform.python_version()}, "
        f"NumPy {np.__version__}",
        f"kernel {platform.release()} ({platform.machine()}), page {mmap.PAGESIZE} bytes, "
        f"vm.max_map_count {procfs.max_map_count()}, uid {os.getuid()}",
        f"features: {features}",
    ]


def pytest_collection_modifyitems(items):
    # The default engine has calls redirected as long as the process lives, once a test has made it.
    items.sort(key=lambda item: "/tests/hooks/" not in str(item.path))
    if LONG:
        return
    skip = pytest.mark.skip(reason="long; set KSMCORE_STRESS=1")
    for item in items:
        if item.get_closest_marker("stress"):
            item.add_marker(skip)


@hypothesis.given(hypothesis.strategies.none())
def nothing(_):
    """Hypothesis asks the garbage collector about what it has with its first test."""


def pytest_collection_finish():
    # What was collected stays until the end: the garbage collector need not go over it in each of
    # the thousands of times that tests call it.
    nothing()
    gc.collect()
    gc.freeze()


@pytest.fixture
def rng():
    """Random numbers that are the same in every run."""
    return np.random.default_rng(SEED)


@pytest.fixture(params=[name for name in GUARDS if ksmcore.features()[name] is None])
def each_guard(request):
    """Every guard that can be had here, one after the other."""
    return request.param


@pytest.fixture
def guard():
    """The guard of `engine`. Modules that want to try them all override it, with `each_guard`."""
    return "auto"


@pytest.fixture
def engine(guard):
    """An engine of the test's own; afterwards its invariants must hold and its handler be gone."""
    engine = ksmcore.Engine(guard=guard)
    try:
        yield engine
        if not engine.closed:
            engine._core.check()
    finally:
        faults.clear()
        engine.close()
    assert not hooks.handler_installed()


@pytest.fixture
def collected():
    """Nothing waits for the collector: what a forgotten engine still has mapped is taken from the
    map budget of the others."""
    gc.collect()


@pytest.fixture(autouse=True)
def fresh_allowance(monkeypatch):
    """What tests before this one have read of the mappings, on however slow a machine, is no reason
    not to be told of everything at once."""
    monkeypatch.setattr(buffers, "_allowance", buffers._Allowance())


@pytest.fixture(autouse=True)
def _no_faults_left():
    """No failure that one test ordered hits another one."""
    yield
    faults.clear()


@pytest.fixture
def private_buffer():
    """Maker of plain private anonymous memory, n pages of zeros: what any engine takes."""
    made = []

    def make(n_pages):
        memory = private_memory(n_pages)
        made.append(weakref.ref(memory))
        return memory

    yield make
    for reference in made:
        memory = reference()
        if memory is not None:
            # Where somebody still looks at it, it goes with the last of them.
            with contextlib.suppress(BufferError):
                memory.close()
