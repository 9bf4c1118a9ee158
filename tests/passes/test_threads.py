"""Passes with other threads beside the caller's: the same results, whatever becomes of those."""

import dataclasses
import os
import threading

import numpy as np
import pytest

import ksmcore
from helpers.memory import PAGE, private_memory, random_pages
from helpers.processes import run_python
from helpers.waiting import wait_until
from ksmcore._kernel import procfs

N_PAGES = 6000


def content(rng):
    """Pages of all kinds: alone, twins far apart and side by side, stretches, and zeros."""
    pages = random_pages(rng, N_PAGES).reshape(-1, PAGE)
    pages[3000:4000] = pages[:1000]
    pages[4000:4300] = pages[rng.integers(0, 3000, 300)]
    pages[4300:5000] = pages[7]
    pages[5000:5400] = 0
    return pages


def outcome(source, n_threads, change):
    """All that an engine tells after some passes, but for times."""
    with ksmcore.Engine(threads=n_threads) as engine:
        pages = engine.array(source)
        reports = [change(engine)]
        pages[::50] ^= 1
        reports += [engine.scan() for _ in range(3)]
        engine._core.check(are_filed=True)
        assert np.array_equal(pages[1::50], source[1::50])
        stats = engine.stats().as_dict()
    told = [dataclasses.replace(report, seconds=0.0) for report in reports]
    numbers = {name: stats[name] for name in stats if name.startswith("pages_")}
    return told, numbers, stats["skipped"]


@pytest.mark.parametrize("change", [ksmcore.Engine.dedup, ksmcore.Engine.scan])
def test_results_do_not_depend_on_the_number_of_threads(rng, change):
    source = content(rng)
    alone = outcome(source, 1, change)
    assert alone[1]["pages_sharing"] > 1900
    for n_threads in (2, 5, "auto"):
        assert outcome(source, n_threads, change) == alone


def n_tasks():
    return len(os.listdir("/proc/self/task"))


def test_they_are_there_during_a_pass_and_not_after(rng):
    source = random_pages(rng, N_PAGES)
    ends = threading.Event()
    before = n_tasks()
    counted = []

    def make_passes():
        while not ends.is_set():
            with ksmcore.Engine(threads=4) as engine:
                pages = engine.array(source)
                engine.scan()
                del pages

    thread = threading.Thread(target=make_passes)
    thread.start()
    try:
        wait_until(lambda: counted.append(n_tasks()) or counted[-1] > before + 1, "a thread more")
    finally:
        ends.set()
        thread.join()
    wait_until(lambda: n_tasks() == before, "the end of all threads")
    assert max(counted) <= before + 1 + 3


def test_the_scanner_keeps_to_one_unless_told(engine, monkeypatch):
    walked = []
    walk = type(engine._core).walk

    class Watched:
        def __getattr__(self, name):
            return getattr(engine._core, name)

        def walk(self, *args, **named):
            walked.append(named["n_threads"])
            return walk(engine._core, *args, **named)

    passes = engine._now().passes
    monkeypatch.setattr(passes, "_core", Watched())
    for wanted, expected in (("auto", 1), (3, 3)):
        engine.configure(threads=wanted)
        passes.begin_batches()
        passes.make_batch(0, 64)
        assert walked[-1] == expected
    engine.scan()
    assert walked[-1] == 3


def test_a_page_that_goes_away_is_left_out_by_every_thread(rng):
    """Whoever reads it returns to where it was."""
    import ctypes

    source = random_pages(rng, 1024).reshape(-1, PAGE)
    memory = private_memory(2 * len(source))
    pages = np.frombuffer(memory, np.uint8).reshape(-1, PAGE)
    pages[:] = np.concatenate([source, source])
    libc = ctypes.CDLL(None, use_errno=True)
    gone, len_bytes = ctypes.c_void_p(pages[100:].ctypes.data), ctypes.c_size_t(700 * PAGE)
    with ksmcore.Engine(threads=4) as engine:
        engine.register(memory)
        engine._core.begin_pass()
        assert libc.mprotect(gone, len_bytes, 0) == 0
        entered = engine._core.enter_guard()
        try:
            engine._core.walk(0, 2**64 - 1, len(pages), True, n_threads=4)
        finally:
            engine._core.leave_guard(entered)
            assert libc.mprotect(gone, len_bytes, 3) == 0
        engine.dedup()
        assert np.array_equal(pages, np.concatenate([source, source]))
        engine._core.check(are_filed=True)


def test_they_take_no_address_space_with_them():
    """Nor does the C library for them: the program's own memory is not to fail for that."""
    run_python(
        f"""
        import resource
        import numpy as np
        import ksmcore
        source = np.random.default_rng(1).integers(0, 256, (6000, {PAGE}), np.uint8)
        with open("/proc/self/statm") as statm:
            n_bytes = int(statm.read().split()[0]) * {PAGE}
        limit = n_bytes + 2 * source.nbytes + (350 << 20)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        with ksmcore.Engine(threads=8) as engine:
            arrays = [engine.array(source) for _ in range(2)]
            engine.dedup()
            assert engine.stats().pages_sharing == len(source), engine.stats()
            np.ones(200 << 20, np.uint8)
            assert all(np.array_equal(array, source) for array in arrays)
        """
    )


def test_where_no_thread_can_be_begun_one_does_everything():
    run_python(
        f"""
        import os, resource
        import numpy as np
        import ksmcore
        pages = np.random.default_rng(1).integers(0, 256, (1000, {PAGE}), np.uint8)
        if os.getuid() == 0:
            os.setresuid(65534, 65534, 65534)
        resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
        with ksmcore.Engine(threads=4) as engine:
            arrays = [engine.array(pages) for _ in range(2)]
            engine.dedup()
            assert engine.stats().pages_sharing == 1000, engine.stats()
            assert all(np.array_equal(array, pages) for array in arrays)
        """
    )


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 7),
        ({"cpu.max": "max 100000"}, 7),
        ({"cpu.max": "150000 100000"}, 2),
        ({"cpu.max": "50000 100000"}, 1),
        ({"inner/cpu.max": "300000 100000", "cpu.max": "400000 100000"}, 3),
        ({"cpu.max": "nonsense"}, 7),
        ({"cpu.max": "100000 0"}, 7),
    ],
)
def test_processors_are_those_that_the_process_may_use(tmp_path, monkeypatch, files, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(7)))
    membership = tmp_path / "membership"
    membership.write_text("0::/inner\n")
    for name, text in files.items():
        path = tmp_path / "groups" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert procfs.processors(membership, tmp_path / "groups") == expected


def test_processors_of_version_1_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(7)))
    membership = tmp_path / "membership"
    membership.write_text("4:cpuacct,cpu:/inner\n3:memory:/inner\n")
    group = tmp_path / "cpu" / "inner"
    group.mkdir(parents=True)
    (group / "cpu.cfs_quota_us").write_text("250000")
    (group / "cpu.cfs_period_us").write_text("100000")
    assert procfs.processors(membership, tmp_path) == 3
