"""The way back needs as little as can be: any guard that works, no descriptor that is not open
already, no /proc, no import, and no feature of the kernel's that may be refused."""

import contextlib
import errno
import gc
import os
import textwrap

import numpy as np
import pytest

import ksmcore
from helpers import seccomp
from helpers.forks import THREADS_RUN, close_all_fds, in_child
from helpers.kernels_view import is_plain, store_bytes
from helpers.memory import PAGE, extent, private_memory, random_pages
from helpers.processes import run_python
from ksmcore._testing import faults

pytestmark = pytest.mark.filterwarnings(THREADS_RUN)

N_PAGES = 40
FOREVER = 10**9
CODES = [
    errno.EPERM,
    errno.ENOSYS,
    errno.EINVAL,
    errno.ENOENT,
    errno.EBUSY,
    errno.ENOTTY,
    errno.EOPNOTSUPP,
    errno.EIO,
]
PASSING = [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN]

# Calls that nothing of the way back depends on.
OPTIONAL_CALLS = [
    "mincore",
    "memfd_create",
    "ftruncate",
    "fallocate",
    "pwrite",
    "pread",
    "open",
    "seal",
    "userfaultfd",
    "uffd_register",
    "uffd_protect",
    "uffd_move",
    "uffd_copy",
    "pagemap_scan",
    "tracker",
]


@pytest.fixture
def guard(each_guard):
    return each_guard


class Life:
    """Buffers and arrays of an engine, merged, some pages written since, some watched."""

    def __init__(self, guard: str = "auto") -> None:
        source = random_pages(3, N_PAGES)
        self.engine = ksmcore.Engine(guard=guard)
        self.buffers = [private_memory(N_PAGES) for _ in range(2)]
        self.views = [np.frombuffer(buffer, np.uint8) for buffer in self.buffers]
        for view in self.views:
            view[:] = source
        self.arrays = [self.engine.array(source) for _ in range(2)]
        self.quiet = self.engine.array(random_pages(4, N_PAGES))
        # Every third page is equal to one of the others.
        self.strewn = self.engine.array(random_pages(5, N_PAGES).reshape(N_PAGES, PAGE))
        self.strewn[::3] = source.reshape(N_PAGES, PAGE)[::3]
        self.regions = [self.engine.register(buffer) for buffer in self.buffers]
        self.engine.dedup()
        for _ in range(3):
            self.engine.scan()
        assert self.engine.stats().pages_sharing == 3 * N_PAGES + len(self.strewn[::3])
        self.views[0][5 * PAGE] ^= 1
        self.expected = [view.copy() for view in self.everything]

    @property
    def everything(self) -> list[np.ndarray]:
        return [*self.views, *self.arrays, self.quiet, self.strewn.reshape(-1)]

    def check(self) -> None:
        for view, expected in zip(self.everything, self.expected, strict=True):
            assert np.array_equal(view, expected)

    def write(self) -> None:
        for view, expected in zip(self.everything, self.expected, strict=True):
            view[::PAGE] += 1
            expected[::PAGE] += 1
        self.check()

    def go_on(self) -> None:
        """A copy, and passes: these may be refused, in words; nothing else may happen."""
        copy = self.engine.copy(self.arrays[0])
        assert np.array_equal(copy, self.expected[2])
        for call in (self.engine.scan, self.engine.dedup):
            with contextlib.suppress(OSError, MemoryError):
                call()
            self.check()
        del copy

    def go_back(self) -> None:
        """All of it, step by step; at the end nothing maps the store."""
        self.engine.unmerge()
        self.check()
        self.regions[0].close()
        for array in self.arrays[:1]:
            self.engine.unregister(array)
        self.check()
        self.engine.close()
        self.check()
        self.write()

    def check_plain(self) -> None:
        for view in self.everything:
            assert is_plain(*extent(view))


# ---- calls that are refused ----------------------------------------------------------------------


@pytest.mark.parametrize("call", OPTIONAL_CALLS)
def test_whatever_call_fails_with_whatever_errno(call, guard):
    for code in CODES + PASSING:
        life = Life(guard)
        faults.inject(call, code, count=FOREVER)
        life.go_on()
        life.write()
        life.go_back()
        faults.clear()
        life.check_plain()
        gc.collect()


def test_all_of_them_at_once(guard):
    life = Life(guard)
    for call in OPTIONAL_CALLS:
        faults.inject(call, errno.EPERM, count=FOREVER)
    life.go_on()
    life.go_back()
    faults.clear()
    life.check_plain()


def test_a_region_whose_tracker_does_not_let_go(guard):
    life = Life(guard)
    faults.inject("uffd_unregister", errno.EPERM, count=1)
    life.go_back()
    faults.clear()
    life.check_plain()


FILTERED = [
    ["userfaultfd"],
    ["ioctl"],
    ["userfaultfd", "ioctl"],
    ["memfd_create"],
    ["fallocate"],
    ["ftruncate"],
    ["mincore"],
    ["pread"],
    ["pwrite"],
    *([name] for name in seccomp.PARTS),
]


@pytest.mark.skipif(not seccomp.is_possible(), reason="no seccomp filters here")
@pytest.mark.parametrize("names", FILTERED, ids="+".join)
def test_whatever_a_filter_answers(names, guard):
    """Put in place after memory was merged, with the guard that it takes away."""

    def work(code: int) -> None:
        life = Life(guard)
        seccomp.refuse(names, code)
        life.go_on()
        life.write()
        if names == ["MADV_POPULATE_WRITE"] and code == errno.ENOMEM:
            # Told there is no memory, it believes that; and nothing has changed.
            with pytest.raises((MemoryError, OSError)):
                life.go_back()
            life.check()
            return
        life.go_back()
        life.check_plain()

    # 0: as if it had worked. No call is made twice because of EAGAIN from where it cannot come.
    for code in [*CODES, errno.ENOMEM, errno.EMFILE, 0]:
        if code == 0 and names[0] not in ("ioctl", "PAGEMAP_SCAN", "PROCMAP_QUERY", "UFFDIO_API"):
            continue
        assert in_child(lambda code=code: work(code)) == 0, (names, errno.errorcode.get(code))


@pytest.mark.skipif(not seccomp.is_possible(), reason="no seccomp filters here")
@pytest.mark.parametrize("names", FILTERED, ids="+".join)
def test_an_engine_that_is_made_under_a_filter(names):
    """It merges what it can, by what is left to it."""

    def work(code: int) -> None:
        seccomp.refuse(names, code)
        engine = ksmcore.Engine()
        source = random_pages(1, N_PAGES)
        a, b = engine.array(source), engine.array(source)
        report = engine.dedup()
        merges = names[0] not in ("memfd_create", "ftruncate", "pwrite")
        assert report.pages_merged == (2 * N_PAGES if merges else 0)
        assert (report.skipped["store"] == 0) == merges
        a[::PAGE] += 1
        engine.scan()
        engine.scan()
        assert np.array_equal(b, source)
        engine.close()
        assert np.array_equal(b, source)
        a[::PAGE] -= 1
        assert np.array_equal(a, source)

    for code in [*CODES, errno.EACCES, errno.ENOMEM, errno.EMFILE]:
        if code == errno.ENOMEM and names == ["MADV_POPULATE_WRITE"]:
            continue
        assert in_child(lambda code=code: work(code)) == 0, (names, errno.errorcode[code])


# ---- descriptors ---------------------------------------------------------------------------------


def test_without_any_descriptor(guard):
    def work() -> None:
        life = Life(guard)
        close_all_fds()
        faults.inject("open", errno.ENOENT, count=FOREVER)
        life.go_on()
        life.write()
        life.go_back()
        faults.clear()
        life.check_plain()

    assert in_child(work) == 0


def test_arrays_are_given_back_where_no_descriptor_can_be_had(guard):
    life = Life(guard)
    extents = [extent(array) for array in life.arrays]
    for call in ("open", "userfaultfd", "memfd_create"):
        faults.inject(call, errno.EMFILE, count=FOREVER)
    regions = life.engine.stats().regions
    life.arrays.clear()
    del life.expected[2:4]
    stats = life.engine.stats()
    faults.clear()
    assert stats.regions == regions - 2
    # The buffers are merged with each other all the same, but for the page that was written.
    assert stats.pages_sharing == N_PAGES + len(life.strewn[::3])
    assert not any(store_bytes(*one) for one in extents)
    life.check()
    life.engine._core.check()
    life.go_back()
    assert life.engine.stats().store_pages == 0


def test_arrays_are_given_back_also_where_mappings_cannot_be_known(guard):
    """What their slots held is kept for whoever may have mapped it; all else is as ever."""

    def work() -> None:
        life = Life(guard)
        close_all_fds()
        faults.inject("open", errno.ENOENT, count=FOREVER)
        extents = [extent(array) for array in life.arrays]
        life.arrays.clear()
        del life.expected[2:4]
        assert life.engine.stats().regions == 4
        life.check()
        life.go_back()
        faults.clear()
        assert not any(store_bytes(*one) for one in extents)
        life.check_plain()

    assert in_child(work) == 0


# ---- nothing of the standard library -------------------------------------------------------------

MERGED = """
    import sys
    import numpy as np, ksmcore

    a = np.random.default_rng(0).standard_normal(1 << 18)
    b, right = a.copy(), a.copy()
    engine = ksmcore.Engine()
    engine.register(a), engine.register(b)
    made = [engine.array(a), engine.array(a)]
    engine.dedup()
    assert engine.stats().pages_sharing > 1000
"""
NOTHING_TO_IMPORT = """
    import builtins

    def no_more(name, *args, real=builtins.__import__, **kwargs):
        if name not in sys.modules:
            raise ImportError(f"{name} is imported on the way back")
        return real(name, *args, **kwargs)

    builtins.__import__ = no_more
    sys.path.clear(), sys.meta_path.clear(), sys.path_hooks.clear()
"""
BACK = {
    "unmerge": "engine.unmerge(); engine.unregister(made[0]); engine.close()",
    "free": "del made[:]; engine.close()",
    "exit": "",
    "exit, scanning": "engine.start()",
}
AFTER = """
    assert np.array_equal(a, right) and np.array_equal(b, right)
    print("right", flush=True)
"""


@pytest.mark.parametrize("back", BACK)
def test_nothing_is_imported_on_the_way_back(back):
    done = run_python(MERGED, NOTHING_TO_IMPORT, BACK[back], AFTER)
    assert (done.stdout, done.stderr, done.returncode) == ("right\n", "", 0)


# Forks and chroots take root; so do filters without it.
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="takes root")


@as_root
@pytest.mark.parametrize("back", BACK)
def test_in_a_chroot_with_nothing_in_it(back, tmp_path):
    """No /proc, no library; and passes are refused in words."""
    jail = f"""
    import os
    os.chroot({str(tmp_path)!r})
    os.chdir("/")
    for call in (engine.scan, engine.dedup):
        try:
            call()
        except OSError as error:
            assert "nothing can be merged now" in str(error)
        else:
            raise AssertionError("it found /proc")
    assert np.array_equal(engine.copy(a), right)
    """
    done = run_python(MERGED, jail, BACK[back], AFTER)
    assert (done.stdout, done.returncode) == ("right\n", 0)
    # Where it has come to a pass by then.
    if "start" in BACK[back] and done.stderr:
        assert done.stderr.startswith("the scanner waits: ")
    assert len(done.stderr.splitlines()) <= ("start" in BACK[back])


@as_root
@pytest.mark.parametrize("kept", ["a", "b"])
def test_a_guard_by_name_that_was_lost_with_root(kept):
    if ksmcore.features()["userfaultfd"] is not None:
        pytest.skip("no such guard here")
    lost = textwrap.dedent("""
        import os
        engine.close()
        engine = ksmcore.Engine(guard="userfaultfd")
        engine.register(a), engine.register(b)
        assert engine.dedup().pages_merged > 1000
        os.setgid(65534), os.setuid(65534)
        try:
            engine.scan()
        except OSError as error:
            assert "userfaultfd" in str(error)
        else:
            raise AssertionError("it is still there")
        engine.unmerge()
    """)
    done = run_python(MERGED, lost, f"engine.unregister({kept}); engine.close()", AFTER)
    assert (done.stdout, done.stderr, done.returncode) == ("right\n", "", 0)


def test_a_guard_by_name_that_is_refused_later(guard):
    life = Life(guard)
    faults.inject("userfaultfd", errno.EPERM, count=FOREVER)
    life.go_back()
    faults.clear()
    life.check_plain()
