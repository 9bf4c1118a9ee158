"""Every function of the table tells what it writes into, and waits where a window is open."""

import ctypes
import threading

import pytest

from helpers.memory import PAGE, address, octets, private_memory
from helpers.scenarios import FILL, MASK_ONLY, SCENARIOS, UNSEEN, Stage
from helpers.waiting import wait_until
from ksmcore._hooks import calls as hooked
from ksmcore._testing import calls

AT = 64  # from the beginning of the page


@pytest.fixture
def stage(tmp_path):
    stage = Stage(tmp_path)
    yield stage
    stage.close()


class Caller(threading.Thread):
    """Makes the call of a scenario, once it is told to `go`; before, it is `ready`, or has `failed`."""

    def __init__(self, name: str, stage: Stage, to: int) -> None:
        super().__init__()
        self.function = ctypes.CFUNCTYPE(ctypes.c_long, use_errno=True)(
            hooked.hook(name.partition(":")[0])
        )
        self.scenario = SCENARIOS[name]
        self.stage, self.to = stage, to
        self.ready, self.go = threading.Event(), threading.Event()
        self.failed: OSError | None = None
        self.result = self.errno = 0

    def run(self) -> None:
        try:
            arguments = self.scenario(self.stage, self.to)
        except OSError as error:
            self.failed = error
        self.ready.set()
        self.go.wait()
        if self.failed is None:
            self.result = self.function(*(ctypes.c_long(value) for value in arguments))
            self.errno = ctypes.get_errno()


def test_there_is_a_scenario_for_each_row():
    names = [name for name, _ in hooked.rows()]
    assert len(set(names)) == len(names)
    assert {name.partition(":")[0] for name in SCENARIOS} == set(names)


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_call_waits_for_a_window_over_what_it_writes(told, stage, name):
    function = name.partition(":")[0]
    if not dict(hooked.rows())[function]:
        pytest.skip(f"this C library has no {function}")
    memory = private_memory(2)
    octets(memory)[:] = FILL
    to = address(octets(memory)) + PAGE + AT
    caller = Caller(name, stage, to)
    caller.start()
    caller.ready.wait()
    before = bytes(octets(memory))
    if function not in MASK_ONLY and caller.failed is None:
        assert calls.shut(to - AT, PAGE)
        caller.go.set()
        try:
            wait_until(lambda: hooked.counts()["waiting"] == 1 or not caller.is_alive())
            assert caller.is_alive()
            assert bytes(octets(memory)) == before
        finally:
            calls.let_in()
    elif function in MASK_ONLY:
        caller.failed = OSError("waits for a signal")
    caller.go.set()
    caller.join()
    if caller.failed is not None:
        pytest.skip(str(caller.failed))
    assert ctypes.c_int(caller.result).value != -1, caller.errno
    if function not in UNSEEN:
        assert bytes(octets(memory)) != before
    # Nothing is left of it.
    assert calls.first(to - AT, PAGE) is None


@pytest.mark.parametrize("name", ["read", "recv", "readv", "fread"])
def test_a_call_waits_for_no_other_window(told, stage, name):
    memory = private_memory(3)
    to = address(octets(memory)) + PAGE
    caller = Caller(name, stage, to)
    caller.start()
    caller.ready.wait()
    for other in (to - PAGE, to + PAGE):
        assert calls.shut(other, PAGE)
        caller.go.set()
        wait_until(lambda: not caller.is_alive())
        calls.let_in()
    assert ctypes.c_int(caller.result).value != -1
