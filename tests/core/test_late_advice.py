"""What a program advises about memory after it has registered it: kept, or not merged."""

import errno
import mmap
import os

import numpy as np
import pytest

from helpers.kernels_view import store_bytes
from helpers.libc import libc, why_failed
from helpers.loose import Loose, call
from helpers.memory import PAGE
from helpers.watching import MISSING, PROTECTED, Watcher, bind_to_node, give_key, protection_key
from ksmcore._gate import buffers
from ksmcore._kernel import smaps
from ksmcore._kernel.numa import own_numa_policy
from ksmcore._testing import faults

N = 64
PART = slice(16, 40)

# What can be given to a new mapping: advice, and how smaps tells it.
KEPT = {
    "random": (1, "rr"),
    "sequential": (2, "sr"),
    "dontfork": (10, "dc"),
    "mergeable": (12, "mg"),
    "hugepage": (14, "hg"),
    "nohugepage": (15, "nh"),
    "dontdump": (16, "dd"),
}
FLAGS = {flag for _, flag in KEPT.values()}
WIPEONFORK, KEEPONFORK = 18, 19


@pytest.fixture
def guard(each_guard):
    return each_guard


@pytest.fixture(params=[slice(0, N), PART], ids=["all", "part"])
def pages(request):
    return request.param


@pytest.fixture(params=KEPT)
def kept(request):
    return KEPT[request.param]


@pytest.fixture
def loose(rng):
    """Registered by whoever uses it."""
    made = Loose(rng.integers(1, 256, (N, PAGE), dtype=np.uint8))
    yield made
    made.unmap()


def advise(loose, pages, advice):
    result = libc.madvise(loose.at(pages.start), (pages.stop - pages.start) * PAGE, advice)
    if result != 0:
        pytest.skip(why_failed("madvise"))


def by_page(loose, told, otherwise):
    """Of each page: what is told of its mapping."""
    found = [otherwise] * N
    for vma in smaps.vmas_in(loose.addr, loose.at(N)):
        for page in range(N):
            if vma.start <= loose.at(page) < vma.end:
                found[page] = told(vma)
    return found


def traits(loose):
    return by_page(loose, lambda vma: vma.flags & FLAGS, None)


def within(pages, inside, outside):
    return [inside if pages.start <= page < pages.stop else outside for page in range(N)]


def given(pages, flag):
    return within(pages, frozenset({flag}), frozenset())


def is_over_store(loose):
    return store_bytes(loose.addr, loose.at(N)) != 0


# --- what a new mapping is given as well ----------------------------------------------------------


@pytest.mark.parametrize("fill", [7, 0])
@pytest.mark.parametrize("how", ["dedup", "scan"])
def test_advice_is_kept_when_pages_are_merged_for_the_first_time(
    engine, loose, kept, pages, fill, how
):
    loose.pages[:] = fill
    region = engine.register(loose.pages)
    partner = engine.full((N, PAGE), fill, np.uint8)
    advice, flag = kept
    advise(loose, pages, advice)
    assert traits(loose) == given(pages, flag)
    for _ in range(1 if how == "dedup" else 3):
        getattr(engine, how)()
    stats = engine.stats()
    assert stats.ksm_zero_pages == 2 * N if fill == 0 else stats.pages_sharing > 0
    assert traits(loose) == given(pages, flag)
    assert (loose.pages == fill).all()
    region.close()
    assert traits(loose) == given(pages, flag)
    assert (partner == fill).all()


@pytest.mark.parametrize("how", ["close", "unmerge", "equal again", "others' bytes", "alone"])
def test_advice_for_merged_memory_is_kept_whatever_becomes_of_it(engine, loose, kept, pages, how):
    source = loose.pages.copy()
    region = engine.register(loose.pages)
    partner = engine.array(source)
    assert engine.dedup().pages_merged == 2 * N
    advice, flag = kept
    advise(loose, pages, advice)
    assert traits(loose) == given(pages, flag)
    if how == "close":
        region.close()
    elif how == "unmerge":
        engine.unmerge()
    elif how == "equal again":
        loose.pages[10:50] += 1
        engine.scan()
        loose.pages[10:50] -= 1
        engine.dedup()
        assert engine.stats().pages_reshared == 40
    elif how == "others' bytes":
        loose.pages[10:50] = partner[10:50] = source[10:50][::-1]
        engine.dedup()
        assert engine.stats().pages_sharing == N
    else:
        loose.pages[10:50] += 1
        for _ in range(6):
            engine.scan()
    left = {"close": 0, "unmerge": 0, "alone": N - 40}.get(how, N)
    assert store_bytes(loose.addr, loose.at(N)) == left * PAGE
    assert traits(loose) == given(pages, flag)


def test_a_child_has_nothing_of_what_it_is_not_to_have(engine, loose):
    region = engine.register(loose.pages)
    partner = engine.array(loose.pages)
    advise(loose, slice(0, N), KEPT["dontfork"][0])
    assert engine.dedup().pages_merged == 2 * N
    pid = os.fork()
    if pid == 0:
        # Nothing is mapped there.
        os._exit(0 if libc.madvise(loose.addr, N * PAGE, mmap.MADV_NORMAL) != 0 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert np.array_equal(loose.pages, partner)
    region.close()


# --- what it cannot be given ----------------------------------------------------------------------


class Wiped:
    """MADV_WIPEONFORK"""

    def give(self, addr, len_bytes):
        call("madvise", addr, len_bytes, WIPEONFORK)

    def take_back(self, addr, len_bytes):
        call("madvise", addr, len_bytes, KEEPONFORK)

    def is_given(self, vma):
        return "wf" in vma.flags


class Locked:
    """mlock"""

    def give(self, addr, len_bytes):
        call("mlock", addr, len_bytes)

    def take_back(self, addr, len_bytes):
        call("munlock", addr, len_bytes)

    def is_given(self, vma):
        return "lo" in vma.flags


class Bound:
    """mbind"""

    def give(self, addr, len_bytes):
        bind_to_node(addr, len_bytes)

    def take_back(self, addr, len_bytes):
        bind_to_node(addr, len_bytes, False)

    def is_given(self, vma):
        return own_numa_policy([vma]) is not None


class Keyed:
    """pkey_mprotect"""

    def give(self, addr, len_bytes):
        self.key = protection_key()
        give_key(addr, len_bytes, self.key)

    def take_back(self, addr, len_bytes):
        give_key(addr, len_bytes, 0)
        libc.pkey_free(self.key)

    def is_given(self, vma):
        return vma.protection_key != 0


class Dropped:
    """A userfaultfd of other software, that is to be asked what a page that is not there holds"""

    mode = MISSING

    def give(self, addr, len_bytes):
        self.watcher = Watcher()
        self.watcher.watch(addr, len_bytes, self.mode)

    def take_back(self, addr, len_bytes):
        assert self.watcher.n_faults() == 0
        self.watcher.leave(addr, len_bytes)
        self.watcher.close()

    def is_given(self, vma):
        return bool(vma.flags & {"um", "uw"})


class Protected(Dropped):
    """The same, that is to be told of writes to pages that it protects"""

    mode = PROTECTED


@pytest.fixture(params=[Wiped, Locked, Bound, Keyed, Dropped, Protected])
def lost(request):
    return request.param()


def count(report, lost):
    return report.skipped["refused" if isinstance(lost, Dropped) else "altered"]


@pytest.mark.parametrize("fill", [7, 0])
@pytest.mark.parametrize("how", ["dedup", "scan"])
def test_what_would_be_lost_keeps_a_region_from_being_merged(engine, loose, lost, pages, fill, how):
    loose.pages[:] = fill
    region = engine.register(loose.pages)
    partner = engine.full((N, PAGE), fill, np.uint8)
    addr, len_bytes = loose.at(pages.start), (pages.stop - pages.start) * PAGE
    lost.give(addr, len_bytes)
    try:
        for _ in range(4):
            report = getattr(engine, how)()
            assert by_page(loose, lost.is_given, None) == within(pages, True, False)
        assert count(report, lost) == N
        assert not is_over_store(loose)
        assert (loose.pages == fill).all()
    finally:
        lost.take_back(addr, len_bytes)
    # It comes back when that is taken back.
    for _ in range(3):
        report = getattr(engine, how)()
    assert count(report, lost) == 0
    assert engine.stats().ksm_zero_pages == 2 * N if fill == 0 else is_over_store(loose)
    assert (loose.pages == fill).all()
    assert (partner == fill).all()
    region.close()


def test_whoever_would_have_shared_with_it_goes_on_alone(engine, loose):
    """The other half of a merge is left too, and merges with the next that comes."""
    source = loose.pages.copy()
    region = engine.register(loose.pages)
    partner = engine.array(source)
    call("madvise", loose.addr, N * PAGE, WIPEONFORK)
    report = engine.dedup()
    assert report.pages_merged == 0
    assert report.skipped["altered"] == N
    # What comes after the span in which the advice is seen is not even compared.
    assert 0 < report.skipped["partner"] <= N
    third = engine.array(source)
    assert engine.dedup().pages_merged == 2 * N
    assert not is_over_store(loose)
    for one in (loose.pages, partner, third):
        assert np.array_equal(one, source)
    region.close()


def test_a_child_finds_zeros_where_it_is_to_find_them(engine, loose):
    region = engine.register(loose.pages)
    partner = engine.array(loose.pages)
    engine.scan()
    call("madvise", loose.addr, N * PAGE, WIPEONFORK)
    for _ in range(3):
        engine.scan()
    pid = os.fork()
    if pid == 0:
        os._exit(0 if not loose.pages.any() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert np.array_equal(loose.pages, partner)
    region.close()


@pytest.mark.parametrize("how", ["close", "unmerge"])
@pytest.mark.parametrize("kind", [Locked, Bound, Keyed])
def test_what_merged_memory_was_given_it_has_when_it_is_plain_again(
    engine, loose, pages, kind, how
):
    source = loose.pages.copy()
    region = engine.register(loose.pages)
    partner = engine.array(source)
    assert engine.dedup().pages_merged == 2 * N
    lost = kind()
    addr, len_bytes = loose.at(pages.start), (pages.stop - pages.start) * PAGE
    lost.give(addr, len_bytes)
    assert by_page(loose, lost.is_given, None) == within(pages, True, False)
    try:
        if how == "close":
            region.close()
        else:
            engine.unmerge()
        assert not is_over_store(loose)
        assert by_page(loose, lost.is_given, None) == within(pages, True, False)
        assert np.array_equal(loose.pages, source)
    finally:
        lost.take_back(addr, len_bytes)
    assert np.array_equal(partner, source)


# --- the look itself ------------------------------------------------------------------------------


def test_nothing_is_remapped_while_the_kernel_does_not_tell(engine, loose):
    region = engine.register(loose.pages)
    partner = engine.array(loose.pages)
    # Of preads the census makes the first.
    faults.inject("pread", errno.EIO, after=1, count=1000)
    report = engine.dedup()
    faults.clear()
    assert report.pages_merged == 0
    assert report.skipped["refused"] + report.skipped["partner"] == 2 * N
    assert not is_over_store(loose)
    assert engine.dedup().pages_merged == 2 * N
    assert np.array_equal(loose.pages, partner)
    region.close()


def test_merged_memory_comes_back_while_the_kernel_does_not_tell(engine, loose):
    source = loose.pages.copy()
    region = engine.register(loose.pages)
    partner = engine.array(source)
    assert engine.dedup().pages_merged == 2 * N
    faults.inject("open", errno.EMFILE, count=1000)
    faults.inject("pread", errno.EMFILE, count=1000)
    region.close()
    faults.clear()
    assert not is_over_store(loose)
    assert np.array_equal(loose.pages, source)
    partner[:] = 1
    for _ in range(2):
        engine.scan()
    engine._core.check()


def walk(engine):
    engine._core.walk(0, 1 << 47, 1 << 30, True)


@pytest.mark.parametrize("advice", ["dontfork", "dontdump"])
def test_advice_is_kept_for_memory_that_is_registered_after_the_look_of_a_pass(
    engine, loose, advice
):
    partners = [engine.array(loose.pages) for _ in range(3)]
    number, flag = KEPT[advice]
    advise(loose, slice(0, N), number)
    engine._core.take_census(-1, 65530)
    engine._core.begin_pass()
    walk(engine)
    assert engine.stats().pages_sharing == 2 * N
    region = engine.register(loose.pages)
    walk(engine)
    assert engine.stats().pages_sharing == 3 * N
    assert traits(loose) == given(slice(0, N), flag)
    assert np.array_equal(loose.pages, partners[0])
    region.close()
    assert traits(loose) == given(slice(0, N), flag)


def test_advice_for_what_lay_there_before_is_not_given_to_what_is_registered_after_the_look(
    engine, loose
):
    source = loose.pages.copy()
    partners = [engine.array(source) for _ in range(2)]
    number, flag = KEPT["dontfork"]
    advise(loose, slice(0, N), number)
    region = engine.register(loose.pages)
    engine._core.take_census(-1, 65530)
    engine._core.begin_pass()
    walk(engine)
    assert traits(loose) == given(slice(0, N), flag)
    region.close()
    anew = Loose(source, loose.addr)
    assert traits(anew) == given(slice(0, 0), flag)
    region = engine.register(anew.pages)
    walk(engine)
    assert engine.stats().pages_sharing == 2 * N
    assert traits(anew) == given(slice(0, 0), flag)
    assert np.array_equal(anew.pages, partners[0])
    region.close()


# --- registered by the thousand: what only smaps tells is found out before the first merge --------


@pytest.fixture
def unseen(monkeypatch):
    """Registrations have read smaps for as long as they may."""

    class UsedUp:
        def is_used_up(self):
            return True

        def use(self):
            raise AssertionError("smaps was read")

    monkeypatch.setattr(buffers, "_allowance", UsedUp())


@pytest.mark.parametrize("how", ["dedup", "scan"])
def test_what_would_be_lost_is_found_out_before_the_first_merge(
    engine, loose, lost, pages, how, unseen
):
    addr, len_bytes = loose.at(pages.start), (pages.stop - pages.start) * PAGE
    lost.give(addr, len_bytes)
    if isinstance(lost, Bound):
        with pytest.raises(AssertionError, match="smaps was read"):
            engine.register(loose.pages)  # that can be asked for at once
        lost.take_back(addr, len_bytes)
        return
    region = engine.register(loose.pages)
    partner = engine.array(loose.pages)
    try:
        for _ in range(3):
            report = getattr(engine, how)()
        assert count(report, lost) == N
        assert not is_over_store(loose)
    finally:
        lost.take_back(addr, len_bytes)
    for _ in range(3):
        getattr(engine, how)()
    assert is_over_store(loose)
    assert np.array_equal(loose.pages, partner)
    region.close()


def test_what_came_after_the_look_waits_for_the_next(engine, loose, lost, unseen):
    if isinstance(lost, Bound):
        pytest.skip("is told at once")
    partners = [engine.array(loose.pages) for _ in range(3)]
    engine._core.take_census(-1, 65530)
    engine._core.begin_pass()
    walk(engine)
    assert engine.stats().pages_sharing == 2 * N
    lost.give(loose.addr, N * PAGE)
    try:
        region = engine.register(loose.pages)
        walk(engine)
        assert engine.stats().pages_sharing == 2 * N
        assert not is_over_store(loose)
    finally:
        lost.take_back(loose.addr, N * PAGE)
    assert np.array_equal(loose.pages, partners[0])
    region.close()


def test_advice_to_unseen_memory_is_kept(engine, loose, kept, pages, unseen):
    number, flag = kept
    advise(loose, pages, number)
    region = engine.register(loose.pages)
    partner = engine.array(loose.pages)
    assert engine.dedup().pages_merged == 2 * N
    assert traits(loose) == given(pages, flag)
    assert np.array_equal(loose.pages, partner)
    region.close()
    assert traits(loose) == given(pages, flag)


def test_unseen_memory_that_cannot_be_merged_is_an_error_all_the_same(engine, unseen):
    with mmap.mmap(-1, 4 * PAGE) as shared, pytest.raises(AssertionError, match="smaps was read"):
        engine.register(shared)
    assert engine.regions == ()


def test_an_allowance_comes_back_with_time(monkeypatch):
    now = 100.0
    monkeypatch.setattr(buffers.time, "monotonic", lambda: now)
    allowance = buffers._Allowance()
    for _ in range(3):
        assert not allowance.is_used_up()
        now += 0.4
        allowance.use()
    assert allowance.is_used_up()
    now += 0.1
    assert allowance.is_used_up()
    now += 0.2
    assert not allowance.is_used_up()
    now += 50
    assert not allowance.is_used_up()
    now += 1.5
    allowance.use()
    assert allowance.is_used_up()
