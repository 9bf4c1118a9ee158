"""What is wrong here: the checks by themselves, and whole examinations of ailing processes."""

import errno
import json

import numpy as np
import pytest

import ksmcore
from helpers.files import write_files
from helpers.kernels_view import descriptors
from helpers.memory import PAGE
from ksmcore._engine.settings import GUARDS
from ksmcore._guard import guard
from ksmcore._kernel import procfs, smaps, syscalls
from ksmcore._testing import faults
from ksmcore.doctor import Check, Diagnosis, checks, limits
from ksmcore.doctor import diagnosis as examining

# -1 before Python 3.15.
UNLIMITED = checks.resource.RLIM_INFINITY
NAMES = (
    "self-test",
    "kernel",
    "memfd",
    "descriptors",
    "proc",
    "pagemap",
    "guard",
    "calls",
    "tracking",
    "mappings",
    "addresses",
    "file size",
    "memory",
    "locked",
    "overcommit",
    "huge pages",
    "kernel's KSM",
    "core files",
    "signals",
    "python",
    "numpy",
    "environment",
)


@pytest.fixture
def root(tmp_path):
    """Files of a kernel: `root({"proc/sys/vm/overcommit_memory": "2"})`."""

    def make(files):
        write_files(tmp_path, files)
        return tmp_path

    return make


def assert_sound(check):
    """What holds of every check."""
    assert check.text
    assert "\n" not in check.text + (check.remedy or "")
    assert (check.remedy is None) == (check.level == "good")
    json.dumps(check.facts)


# ---- the whole -----------------------------------------------------------------------------------


def test_a_machine_where_these_tests_run():
    diagnosis = examining.examine()
    assert tuple(check.name for check in diagnosis.checks) == NAMES
    for check in diagnosis.checks:
        assert_sound(check)
    assert diagnosis["self-test"].level == "good"
    assert diagnosis["self-test"].facts["pss_fallen_bytes"] > 32 * syscalls.page_bytes()
    assert diagnosis.exit_status in (0, 1)
    with ksmcore.Engine() as engine:
        assert diagnosis["guard"].facts["in_use"] == engine.stats().guard
    assert diagnosis["mappings"].facts["limit"] == procfs.max_map_count()
    found = json.loads(json.dumps(diagnosis.as_dict()))
    assert set(found) == {"schema", "ksmcore", "health", "exit_status", "checks"}
    assert found["schema"] == 1
    assert set(found["checks"][0]) == {"name", "level", "text", "remedy", "facts"}
    assert str(diagnosis).count("\n") == len(NAMES) - 1


def test_nothing_is_left():
    before = smaps.count_maps(), len(descriptors())
    examining.examine()
    after = smaps.count_maps(), len(descriptors())
    assert after[1] == before[1]
    assert after[0] <= before[0] + 8


@pytest.mark.parametrize(
    ("levels", "health", "status"),
    [
        (["good", "good"], "healthy", 0),
        (["good", "advice"], "healthy", 0),
        (["advice", "weak", "good"], "weak", 1),
        (["weak", "broken", "advice"], "broken", 2),
    ],
)
def test_health_is_that_of_the_worst(levels, health, status):
    diagnosis = Diagnosis(tuple(Check(level, level, "text") for level in levels))
    assert (diagnosis.health, diagnosis.exit_status) == (health, status)
    assert diagnosis[levels[0]].level == levels[0]
    with pytest.raises(KeyError):
        diagnosis["nothing"]


# ---- the self-test -------------------------------------------------------------------------------


def test_bytes_that_change_are_noticed(monkeypatch):
    real = ksmcore.Engine.dedup

    def corrupt(self, memory):
        report = real(self, memory)
        memory[5] ^= 1
        return report

    monkeypatch.setattr(ksmcore.Engine, "dedup", corrupt)
    check, _ = examining.self_test()
    assert (check.level, check.text) == ("broken", "failed: merging changed bytes")
    assert_sound(check)


def test_a_write_that_shows_through_is_noticed(monkeypatch):
    real = ksmcore.Engine.unmerge

    def corrupt(self):
        real(self)
        (region,) = self.regions
        region._view()[-1] ^= 1

    monkeypatch.setattr(ksmcore.Engine, "unmerge", corrupt)
    assert examining.self_test()[0].text == "failed: unmerging changed bytes"


def test_bytes_that_change_are_nobody_elses_fault(monkeypatch):
    monkeypatch.setattr(ksmcore.Engine, "dedup", lambda self, memory: memory.write(b"x"))
    monkeypatch.setattr(limits, "file_size", lambda: Check("file size", "weak", "text", "remedy"))
    assert "please report this" in examining.examine()["self-test"].remedy


def test_a_self_test_that_fails_names_what_it_may_be(monkeypatch):
    weak = Check("file size", "weak", "text", "raise it")
    faults.inject("memfd_create", errno.EMFILE, count=1000)
    assert "please report this" in examining.self_test()[0].remedy
    monkeypatch.setattr(checks, "memory_file", lambda reason: Check("memfd", "good", "text"))
    monkeypatch.setattr(limits, "file_size", lambda: weak)
    found = examining.examine()["self-test"]
    faults.clear()
    assert found.level == "broken"
    assert found.remedy == "it may be this: file size: raise it"


def test_what_cannot_be_looked_at_is_told(monkeypatch):
    def fail():
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(smaps, "count_maps", fail)
    monkeypatch.setattr(examining, "features", fail)
    diagnosis = examining.examine()
    assert tuple(check.name for check in diagnosis.checks) == NAMES
    for name in ("mappings", "memfd", "pagemap", "guard", "tracking"):
        assert diagnosis[name].level == "weak"
        assert "could not be looked at: [Errno 5]" in diagnosis[name].text
        assert_sound(diagnosis[name])
    assert diagnosis["self-test"].level == "good"


def test_merging_that_does_nothing_is_noticed(monkeypatch):
    monkeypatch.setenv("KSMCORE_MAP_BUDGET", "0")
    check, _ = examining.self_test()
    assert check.level == "broken"
    assert "no page was merged (map_budget)" in check.text


def test_merging_that_a_setting_bounds_is_told(monkeypatch):
    monkeypatch.setenv("KSMCORE_MAX_SHARED_PAGES", "10")
    check, _ = examining.self_test()
    assert check.level == "weak"
    assert check.text.startswith("10 of 64 pairs")
    assert "KSMCORE_MAX_SHARED_PAGES" in check.remedy
    assert_sound(check)


@pytest.mark.parametrize(
    ("name", "setting", "check", "in_use"),
    [("GUARD", "mprotect", "guard", "mprotect"), ("DIRTY", "checksum", "tracking", "checksum")],
)
def test_what_is_set_counts_not_what_would_be_possible(monkeypatch, name, setting, check, in_use):
    best = examining.examine()[check]
    if best.level != "good":
        pytest.skip(f"here nothing better can be had: {best.text}")
    monkeypatch.setenv(f"KSMCORE_{name}", setting)
    found = examining.examine()[check]
    assert (found.level, found.facts["in_use"]) == ("advice", in_use)
    assert f"KSMCORE_{name}" in found.remedy
    assert_sound(found)


def test_memory_that_does_not_go_back_is_noticed(monkeypatch):
    monkeypatch.setattr(examining, "_pss_of", lambda pages: 100)
    check, _ = examining.self_test()
    assert check.level == "weak"
    assert_sound(check)


@pytest.mark.parametrize("call", ["memfd_create", "mmap"])
def test_calls_that_the_kernel_refuses(call):
    faults.inject(call, errno.ENOMEM, count=1000)
    check, _ = examining.self_test()
    faults.clear()
    assert check.level == "broken"
    assert_sound(check)
    assert examining.self_test()[0].level == "good"


# ---- guards and trackers -------------------------------------------------------------------------

HERE = dict.fromkeys(GUARDS)
REFUSED = {**HERE, "userfaultfd": "Operation not permitted", "userfaultfd-user": "no"}


@pytest.mark.parametrize(
    ("found", "status", "level", "in_use", "remedy"),
    [
        (HERE, "", "good", "userfaultfd", None),
        (REFUSED, "Seccomp:\t2\n", "advice", "mprotect", "--device /dev/userfaultfd"),
        (REFUSED, "Seccomp:\t0\n", "advice", "mprotect", "vm.unprivileged_userfaultfd=1"),
        ({**HERE, "userfaultfd": "Function not implemented"}, "", "advice", GUARDS[1], "Linux 6.4"),
        (dict.fromkeys(GUARDS, "no"), "", "broken", None, "report"),
    ],
)
def test_guard(root, found, status, level, in_use, remedy):
    check = checks.guard(found, root=root({"proc/self/status": status}))
    assert (check.level, check.facts["in_use"]) == (level, in_use)
    assert remedy is None or remedy in check.remedy
    assert_sound(check)


def test_what_the_kernel_can(root):
    for judge, bad in (
        (checks.memory_file, "broken"),
        (checks.page_map, "weak"),
        (checks.tracking, "advice"),
    ):
        assert judge(None).level == "good"
        check = judge("Operation not permitted")
        assert check.level == bad
        assert_sound(check)
    filtered = root({"proc/self/status": "Seccomp:\t2\n"})
    assert "seccomp" in checks.tracking("no", root=filtered).remedy


@pytest.mark.parametrize(
    ("release", "level"),
    [
        ("6.8.0-31-generic", "good"),
        ("6.18.44", "good"),
        ("7.0", "good"),
        ("6.7.9", "advice"),
        ("5.15.0-1-amd64", "advice"),
        ("strange", "good"),
    ],
)
def test_kernel(release, level):
    check = checks.kernel(release)
    assert (check.level, check.facts["release"]) == (level, release)
    assert_sound(check)


# ---- limits --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("used", "limit", "level"),
    [
        (500, 1_048_576, "good"),
        (500, 65_530, "advice"),
        (59_000, 65_530, "weak"),
        (65_530, 65_530, "weak"),
        (70_000, 65_530, "weak"),
        (950_000, 1_048_576, "weak"),
    ],
)
def test_map_limit(used, limit, level):
    check = checks.map_limit(used, limit)
    assert check.level == level
    free = max(limit - used, 0)
    assert check.facts == {"used": used, "limit": limit, "free": free, "left_out_bytes": 0}
    assert_sound(check)


@pytest.mark.parametrize("limit", [65_530, 1_048_576])
def test_what_is_left_out_for_want_of_mappings_is_told(limit):
    check = checks.map_limit(500, limit, 300 << 20)
    assert check.level == "weak"
    assert "300.0 MiB" in check.text
    assert check.facts["left_out_bytes"] == 300 << 20
    assert_sound(check)


def test_what_an_engine_left_out_is_told(rng):
    # Pairs that lie scattered: two mappings for each page, and there are none.
    pages = rng.integers(1, 256, (64, PAGE), dtype=np.uint8)
    with ksmcore.Engine(map_budget=0) as engine:
        first, second = engine.array(pages), engine.array(pages[rng.permutation(64)])
        engine.dedup(first, second)
        left = engine.stats().pages_left_out
        assert left > 0
        check = examining.examine()["mappings"]
        assert check.level == "weak"
        assert check.facts["left_out_bytes"] == left * PAGE
    assert examining.examine()["mappings"].facts["left_out_bytes"] == 0


MEMINFO = "MemTotal: 8000000 kB\nMemAvailable: {} kB\nSwapFree: 0 kB\n"
MIB = 1 << 20


@pytest.mark.parametrize(
    ("files", "level", "limit"),
    [
        ({}, "good", None),
        ({"memory.max": "max", "memory.current": "5"}, "good", None),
        ({"memory.max": str(1024 * MIB), "memory.current": str(100 * MIB)}, "good", 1024 * MIB),
        ({"memory.max": str(1024 * MIB), "memory.current": str(980 * MIB)}, "weak", 1024 * MIB),
    ],
)
def test_memory_limit_of_version_2(root, files, level, limit):
    made = root(
        {
            "proc/meminfo": MEMINFO.format(4_000_000),
            "proc/self/cgroup": "0::/box\n",
            **{f"sys/fs/cgroup/box/{name}": text for name, text in files.items()},
        }
    )
    check = limits.memory_limit(made)
    assert (check.level, check.facts["limit_bytes"]) == (level, limit)
    assert_sound(check)


def test_memory_limit_of_version_1_is_the_least(root):
    files = {"proc/meminfo": MEMINFO.format(4_000_000), "proc/self/cgroup": "4:memory:/a/b\n0::/\n"}
    for group, limit in (("", 2**63 - 4096), ("a", 512 * MIB), ("a/b", 2048 * MIB)):
        files[f"sys/fs/cgroup/memory/{group}/memory.limit_in_bytes"] = f"{limit}\n"
        files[f"sys/fs/cgroup/memory/{group}/memory.usage_in_bytes"] = "1\n"
    check = limits.memory_limit(root(files))
    assert check.facts["limit_bytes"] == 512 * MIB
    assert check.facts["cgroup"].endswith("/memory/a")
    assert check.level == "good"


def test_a_machine_with_little_memory(root):
    check = limits.memory_limit(root({"proc/meminfo": MEMINFO.format(30_000)}))
    assert check.level == "weak"
    assert_sound(check)


@pytest.mark.parametrize(
    ("mode", "promised", "level"),
    [("0", 90, "good"), ("1", 99, "good"), ("2", 10, "advice"), ("2", 99, "weak")],
)
def test_overcommit(root, mode, promised, level):
    meminfo = f"CommitLimit: 100 kB\nCommitted_AS: {promised} kB\n"
    check = limits.overcommit(
        root({"proc/sys/vm/overcommit_memory": mode, "proc/meminfo": meminfo})
    )
    assert (check.level, check.facts["mode"]) == (level, int(mode))
    assert_sound(check)


@pytest.mark.parametrize(
    ("enabled", "shmem", "level"),
    [
        ("always madvise [never]", "always [never]", "good"),
        ("always [madvise] never", "always within_size advise [never] deny force", "advice"),
        ("[always] madvise never", "always within_size [advise] never deny force", "good"),
        ("[always] madvise never", "", "advice"),
        ("", "", "good"),
    ],
)
def test_huge_pages(root, enabled, shmem, level):
    here = "sys/kernel/mm/transparent_hugepage"
    made = root({f"{here}/enabled": enabled, f"{here}/shmem_enabled": shmem})
    check = checks.huge_pages(made)
    assert check.level == level
    assert_sound(check)


@pytest.mark.parametrize(
    ("run", "joined", "level"),
    [("0", "no", "good"), ("1", "no", "good"), ("0", "yes", "good"), ("1", "yes", "advice")],
)
def test_kernels_own_ksm(root, run, joined, level):
    files = {
        "sys/kernel/mm/ksm/run": f"{run}\n",
        "proc/self/ksm_stat": f"ksm_rmap_items 0\nksm_merge_any: {joined}\n",
    }
    check = checks.kernel_ksm(root(files))
    assert (check.level, check.facts) == (
        level,
        {"run": int(run), "whole_process": joined == "yes"},
    )
    assert_sound(check)


def test_a_kernel_that_shows_nothing(tmp_path):
    """A sandbox without /proc and /sys: no check fails, and none warns of what it does not know."""
    for judge in (
        limits.memory_limit,
        limits.overcommit,
        checks.huge_pages,
        checks.kernel_ksm,
        limits.core_files,
        checks.descriptors,
        lambda root: checks.blocked_signals("mprotect", root),
    ):
        check = judge(tmp_path)
        assert check.level == "good"
        assert_sound(check)
    assert limits.memory_limit(tmp_path).text.startswith("not known")
    check = checks.proc_files(tmp_path)
    assert check.level == "weak"
    assert len(check.facts["missing"]) == 4
    assert_sound(check)


# ---- Python --------------------------------------------------------------------------------------


def test_numpy_allocator():
    assert checks.numpy_allocator().facts["allocator"] == "default_allocator"
    check = checks.numpy_allocator("another")
    assert check.level == "advice"
    assert_sound(check)


def test_address_space(monkeypatch, root):
    files = root({"proc/self/status": "VmSize:\t 1048576 kB\n"})
    for limit, level in (
        (UNLIMITED, "good"),
        (8 << 30, "advice"),
        (3 << 29, "weak"),
        (1 << 20, "weak"),
    ):
        monkeypatch.setattr(checks.resource, "getrlimit", lambda _, n=limit: (n, -1))
        check = limits.address_space(files)
        assert check.level == level
        assert_sound(check)


@pytest.mark.parametrize(
    ("limit", "level"),
    [
        (UNLIMITED, "good"),
        (1 << 40, "advice"),
        (100 << 20, "advice"),
        (1 << 20, "weak"),
        (0, "weak"),
    ],
)
def test_file_size(monkeypatch, limit, level):
    monkeypatch.setattr(checks.resource, "getrlimit", lambda _: (limit, -1))
    check = limits.file_size()
    assert check.level == level
    assert level == "good" or "RLIMIT_FSIZE" in check.remedy
    assert_sound(check)


@pytest.mark.parametrize(
    ("n_bytes", "future", "level", "told"),
    [
        (0, False, "good", "nothing"),
        (None, None, "good", "not known"),
        (5 << 20, False, "advice", "5.0 MiB"),
        (5 << 20, True, "weak", "MCL_FUTURE"),
        (0, True, "weak", "MCL_FUTURE"),
    ],
)
def test_locked(n_bytes, future, level, told):
    check = limits.locked(n_bytes, future)
    assert check.level == level
    assert told in check.text
    assert_sound(check)


@pytest.mark.parametrize(
    ("kinds", "pattern", "limit", "level"),
    [
        ("00000033", "core", -1, "advice"),
        ("00000033", "core", 0, "good"),
        ("00000033", "|/usr/lib/systemd/systemd-coredump %P", 0, "advice"),
        ("00000037", "core", -1, "good"),
        ("0", "core", 1 << 30, "advice"),
    ],
)
def test_core_files(monkeypatch, root, kinds, pattern, limit, level):
    monkeypatch.setattr(checks.resource, "getrlimit", lambda _: (limit, -1))
    files = {"proc/self/coredump_filter": kinds, "proc/sys/kernel/core_pattern": f"{pattern}\n"}
    check = limits.core_files(root(files))
    assert check.level == level
    assert level == "good" or f"echo {int(kinds, 16) | 4:#x} > /proc/self/core" in check.remedy
    assert_sound(check)


BLOCKED = f"Name:\tworker\nSigBlk:\t{1 << 10 | 1 << 2:016x}\n"
OPEN = f"Name:\tworker\nSigBlk:\t{~(1 << 10) & (1 << 64) - 1:016x}\n"


@pytest.mark.parametrize(
    ("guard", "blocked", "level"),
    [
        ("mprotect", 0, "good"),
        ("mprotect", 1, "weak"),
        ("mprotect", 9, "weak"),
        ("userfaultfd", 9, "good"),
        (None, 1, "good"),
    ],
)
def test_threads_that_block_sigsegv(root, guard, blocked, level):
    files = {f"proc/self/task/{100 + n}/status": BLOCKED for n in range(blocked)}
    made = root({**files, "proc/self/task/99/status": OPEN})
    check = checks.blocked_signals(guard, made)
    assert check.level == level
    assert check.facts["threads"] == [str(100 + n) for n in range(blocked)]
    assert ("SIGSEGV is blocked by 100" in check.text) == (blocked > 0)
    assert (" and 5 more" in check.text) == (blocked == 9)
    assert_sound(check)


def test_the_standard_library(tmp_path):
    assert checks.library().level == "good"
    check = checks.library(str(tmp_path / "os.py"))
    assert (check.level, check.facts["readable"]) == ("advice", False)
    assert_sound(check)


@pytest.mark.parametrize(
    ("name", "value", "level", "told"),
    [
        ("PAGES_TO_SCAN", "100", "good", "KSMCORE_PAGES_TO_SCAN=100"),
        ("MAX_CPU", "200", "broken", "max_cpu must be"),
        ("DISABLE", "1", "broken", "unset KSMCORE_DISABLE"),
        ("DISABLE", "0", "good", "KSMCORE_DISABLE=0"),
        ("SLEEP_MILLISEC", "5", "advice", "no such setting: KSMCORE_SLEEP_MILLISEC"),
    ],
)
def test_environment(monkeypatch, name, value, level, told):
    monkeypatch.setenv(f"KSMCORE_{name}", value)
    check = checks.environment()
    assert check.level == level
    assert told in check.text + (check.remedy or "")
    assert_sound(check)
    # The merge itself tells the same.
    assert (examining.self_test()[0].level == "broken") == (level == "broken")


# ---- a process that is refused


def test_guards_that_are_refused_by_injection():
    """All of them but the last, in this process."""
    faults.inject("userfaultfd", errno.EPERM, count=1000)
    diagnosis = examining.examine()
    faults.clear()
    assert diagnosis["guard"].facts["in_use"] == "mprotect"
    assert diagnosis["self-test"].level == "good"
    assert guard.probe("userfaultfd-user") is None or diagnosis["guard"].level == "advice"
