"""Any order of operations, against a model of plain bytes; every invariant after every step."""

import gc
import os

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    precondition,
    rule,
)

import ksmcore
from helpers.forks import THREADS_RUN
from helpers.memory import PAGE
from helpers.stress import LONG
from ksmcore._engine.settings import GUARDS
from ksmcore._kernel import smaps
from ksmcore._testing import pagemap

MAX_PAGES = 24

# A few contents, so that pages meet; the last differ from others in their last or first bytes only.
CONTENTS = [np.full(PAGE, value, np.uint8) for value in (0, 1, 2)]
CONTENTS += [CONTENTS[1].copy(), CONTENTS[2].copy()]
CONTENTS[3][-1] = 9
CONTENTS[4][0] = 9


class Held:
    """One array, what it must contain, and its region if it has one."""

    def __init__(self, array: np.ndarray, region: ksmcore.Region | None) -> None:
        self.array = array
        self.model = array.copy()
        self.region = region


class EngineMachine(RuleBasedStateMachine):
    held = Bundle("held")

    @initialize(
        order=st.sampled_from(["digest", "content"]),
        zero_pages=st.booleans(),
        guard=st.sampled_from([name for name in GUARDS if ksmcore.features()[name] is None]),
    )
    def make_engine(self, order, zero_pages, guard):
        self.engine = ksmcore.Engine(order=order, use_zero_pages=zero_pages, guard=guard)
        self.alive = []
        self.children = []
        self.scanned = False

    def teardown(self):
        if hasattr(self, "engine"):
            while self.children:
                self.end_a_child()
            self.engine.close()
            for held in self.alive:
                assert np.array_equal(held.array, held.model)

    @rule(target=held, n_pages=st.integers(1, MAX_PAGES))
    def make_array(self, n_pages):
        held = Held(self.engine.empty((n_pages, PAGE), np.uint8), None)
        self.alive.append(held)
        self.scanned = False
        return held

    @rule(target=held, n_pages=st.integers(1, MAX_PAGES))
    def register_plain_memory(self, n_pages):
        memory = np.zeros((n_pages + 2) * PAGE, np.uint8)
        start = -memory.__array_interface__["data"][0] % PAGE
        array = memory[start : start + n_pages * PAGE].reshape(n_pages, PAGE)
        region = self.engine.register(array)
        held = Held(array, region)
        self.alive.append(held)
        self.scanned = False
        return held

    @rule(held=held, page=st.integers(0, MAX_PAGES - 1), content=st.integers(0, len(CONTENTS) - 1))
    def write_a_page(self, held, page, content):
        page %= len(held.array)
        held.array[page] = CONTENTS[content]
        held.model[page] = CONTENTS[content]
        self.scanned = False

    @rule(
        held=held, page=st.integers(0, MAX_PAGES - 1), n=st.integers(1, MAX_PAGES), data=st.data()
    )
    def write_a_stretch(self, held, page, n, data):
        content = data.draw(st.integers(0, len(CONTENTS) - 1))
        held.array[page : page + n] = CONTENTS[content]
        held.model[page : page + n] = CONTENTS[content]
        self.scanned = False

    @rule(held=held, at=st.integers(0, MAX_PAGES * PAGE - 1), value=st.integers(0, 255))
    def write_a_byte(self, held, at, value):
        at %= held.array.size
        held.array.reshape(-1)[at] = value
        held.model.reshape(-1)[at] = value
        self.scanned = False

    @rule(source=held, sink=held)
    def copy(self, source, sink):
        n = min(len(source.array), len(sink.array))
        np.copyto(sink.array[:n], source.array[:n])
        sink.model[:n] = source.model[:n].copy()
        self.scanned = False

    @rule(most=st.sampled_from([2, 3, 5, "auto"]))
    def limit_sharing(self, most):
        self.engine.configure(max_page_sharing=most)
        self.scanned = False

    @rule()
    def scan(self):
        self.engine.scan()
        self.scanned = True

    @rule()
    def scan_until_nothing_happens(self):
        for _ in range(4):
            self.engine.scan()
        self.scanned = True
        before = self.engine.stats()
        self.engine.scan()
        after = self.engine.stats()
        assert (after.pages_merged, after.pages_zeroed) == (
            before.pages_merged,
            before.pages_zeroed,
        )
        if after.dirty == "pagemap" and not self.children:
            # Private copies over the store cannot be protected.
            n_read = after.pages_hashed - before.pages_hashed
            assert n_read == after.pages_unshared - after.pages_quiet

    @rule()
    def dedup_everything(self):
        self.engine.dedup()
        self.scanned = True

    @rule(held=held)
    def dedup_one(self, held):
        addr = held.array.__array_interface__["data"][0]
        if self.engine._core.find(addr, held.array.nbytes) is not None:
            self.engine.dedup(held.array)
            self.scanned = False

    @rule(held=held)
    def unregister(self, held):
        addr = held.array.__array_interface__["data"][0]
        if self.engine._core.find(addr, held.array.nbytes) is not None:
            self.engine.unregister(held.array)
            self.scanned = False

    @rule(held=held)
    def register_again(self, held):
        addr = held.array.__array_interface__["data"][0]
        if self.engine._core.find(addr, held.array.nbytes) is None:
            held.region = self.engine.register(held.array)
            self.scanned = False

    @rule(held=held, immediate=st.booleans())
    def pass_while_held(self, held, immediate):
        """Nothing of a held region takes part, not as a partner either."""
        addr = held.array.__array_interface__["data"][0]
        if self.engine._core.find(addr, held.array.nbytes) is None:
            return
        before = [vma.path for vma in smaps.vmas_in(addr, addr + held.array.nbytes)]
        with self.engine.hold(held.array), self.engine.hold(held.array[:1]):
            (self.engine.dedup if immediate else self.engine.scan)()
            held.array[-1] = CONTENTS[3]
            held.model[-1] = CONTENTS[3]
        assert [vma.path for vma in smaps.vmas_in(addr, addr + held.array.nbytes)] == before
        self.scanned = False

    @precondition(lambda self: len(self.children) < 3)
    @rule(writes=st.booleans())
    def fork(self, writes):
        """A child that keeps what it inherited, and compares it when it is told to end."""
        go = os.pipe()
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                status = 0 if self.live_as_a_child(go[0], writes) else 2
            finally:
                os._exit(status)
        os.close(go[0])
        self.children.append((pid, go[1]))

    def live_as_a_child(self, go, writes):
        expected = [held.model.copy() for held in self.alive]
        if writes:
            own = self.engine.full((3, PAGE), 7, np.uint8)
            merged = self.engine.dedup(own).pages_merged
            self.engine._core.check(are_filed=True)
            if merged != 3 or self.engine.stats().regions != 1:
                return False
            for held, model in zip(self.alive, expected, strict=True):
                held.array[0] ^= 0x55
                model[0] ^= 0x55
        os.read(go, 1)
        return all(
            np.array_equal(held.array, model)
            for held, model in zip(self.alive, expected, strict=True)
        )

    @precondition(lambda self: self.children)
    @rule()
    def end_a_child(self):
        self.scanned = False
        pid, go = self.children.pop(0)
        os.write(go, b"x")
        os.close(go)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0

    @rule(held=consumes(held))
    def drop(self, held):
        """Forget the last name of an array: its memory goes, registered or not."""
        self.alive.remove(held)
        if held.region is not None:
            held.region.close()
        held.array = held.model = held.region = None
        gc.collect()
        self.scanned = False

    @invariant()
    def contents_are_those_of_the_model(self):
        for held in getattr(self, "alive", ()):
            assert np.array_equal(held.array, held.model)

    @invariant()
    def nothing_is_broken_inside(self):
        if hasattr(self, "engine"):
            self.engine._core.check(are_filed=True)

    @invariant()
    def nobody_is_protected_but_quiet_pages(self):
        """No survey would ever show it again. (A write lifts the protection of a quiet page.)"""
        if not hasattr(self, "engine") or self.engine.stats().dirty != "pagemap":
            return
        n_protected = sum(
            n_pages - sum(n for _, n, _ in pagemap.survey(addr, n_pages, True))
            for _, addr, n_pages in self.engine._core.regions()
        )
        assert n_protected <= self.engine.stats().pages_quiet

    @invariant()
    def counters_add_up_after_a_pass(self):
        if not getattr(self, "scanned", False):
            return
        stats = self.engine.stats()
        tracked = absent_shared = 0
        for _, addr, n_pages in self.engine._core.regions():
            flags = pagemap.query(addr, n_pages)
            tracked += sum(bool(flag & 1) for flag in flags)
            absent_shared += sum(not flag & 1 for flag in flags)
        # A merged page that was not read since is not present; a zero page that was read since is.
        assert stats.pages_tracked <= tracked + absent_shared
        assert (
            stats.pages_shared + stats.pages_sharing + stats.pages_unshared + (stats.pages_volatile)
            == stats.pages_tracked
        )
        assert stats.bytes_saved == (stats.pages_sharing + stats.ksm_zero_pages) * PAGE
        if not self.children:
            # The pass has found out that nobody else maps the store any more.
            assert stats.store_pages_frozen == 0


EngineMachine.TestCase.settings = settings(
    max_examples=3000 if LONG else 100,
    stateful_step_count=60 if LONG else 40,
    derandomize=not LONG,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
TestEngineMachine = pytest.mark.filterwarnings(THREADS_RUN)(EngineMachine.TestCase)
