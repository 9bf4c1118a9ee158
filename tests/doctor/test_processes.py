"""Examinations of processes in worse places: without privileges, filtered, out of mappings."""

import errno
import json
import os
import platform
import shutil
import struct
import subprocess
import sys

import pytest

from helpers.mappings import LIMIT
from helpers.processes import run_python
from ksmcore.doctor import Check

UNPRIVILEGED = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
USERFAULTFD = {"x86_64": 323, "aarch64": 282}[platform.machine()]

EXAMINE = """
    import json
    from ksmcore.doctor import examine
    diagnosis = examine()
    print(json.dumps(diagnosis.as_dict()))
    raise SystemExit(diagnosis.exit_status)
"""


def examined(*, before="", prefix=()):
    """The checks, by name, of a process that did something first; and its exit status."""
    done = run_python(before, EXAMINE, flags=("-W", "error"), prefix=prefix, cwd="/")
    assert done.stderr == ""
    found = json.loads(done.stdout)
    assert found["exit_status"] == done.returncode
    return {check["name"]: Check(**check) for check in found["checks"]}, done.returncode


def can_run(*prefix):
    if os.geteuid() != 0 or shutil.which(prefix[0]) is None:
        return False
    command = [*prefix, sys.executable, "-c", "import ksmcore"]
    return subprocess.run(command, capture_output=True, check=False, cwd="/").returncode == 0


@pytest.mark.skipif(not can_run(*UNPRIVILEGED), reason="takes root, and a Python for all users")
def test_an_unprivileged_user_is_healthy():
    checks, status = examined(prefix=UNPRIVILEGED)
    assert checks["self-test"].level == "good"
    assert checks["guard"].facts["in_use"] != "userfaultfd"
    assert checks["guard"].level == "advice"
    assert "vm.unprivileged_userfaultfd=1" in checks["guard"].remedy
    assert {check.level for check in checks.values()} <= {"good", "advice"}
    assert status == 0


def filter_program():
    """A seccomp filter: userfaultfd(2) is not permitted, everything else is."""
    load_number, jump_if_equal, answer = 0x20, 0x15, 0x06
    steps = [
        (load_number, 0, 0, 0),
        (jump_if_equal, 0, 1, USERFAULTFD),
        (answer, 0, 0, 0x00050000 | errno.EPERM),
        (answer, 0, 0, 0x7FFF0000),
    ]
    return b"".join(struct.pack("HBBI", *step) for step in steps)


# As an ordinary user if it can be, or the device would be a way around.
REFUSE = f"""
    import ctypes
    filter = {filter_program()!r}
    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(38, 1, 0, 0, 0) == 0
    program = Program(len(filter) // 8, filter)
    assert libc.prctl(22, 2, ctypes.byref(program)) == 0, ctypes.get_errno()
"""


def test_a_container_that_refuses_userfaultfd_is_healthy():
    prefix = UNPRIVILEGED if can_run(*UNPRIVILEGED) else ()
    if not prefix and os.access("/dev/userfaultfd", os.R_OK | os.W_OK):
        pytest.skip("the device is a way around the filter")
    checks, status = examined(before=REFUSE, prefix=prefix)
    assert checks["guard"].facts["in_use"] == "mprotect"
    assert checks["guard"].level == checks["tracking"].level == "advice"
    assert "/dev/userfaultfd" in checks["guard"].remedy
    assert "seccomp" in checks["tracking"].remedy
    assert checks["self-test"].level == "good"
    assert {check.level for check in checks.values()} <= {"good", "advice"}
    assert status == 0


TAKE_MAPPINGS = """
    from helpers.mappings import take_all_but
    taken = take_all_but({room})
"""


@pytest.mark.skipif(LIMIT > 200_000, reason="too many mappings to use up")
def test_few_mappings_left_are_a_weakness():
    checks, status = examined(before=TAKE_MAPPINGS.format(room=2000))
    assert checks["mappings"].level == "weak"
    assert checks["mappings"].facts["free"] < 2100
    assert "vm.max_map_count" in checks["mappings"].remedy
    assert checks["self-test"].level == "good"
    assert status == 1


@pytest.mark.skipif(LIMIT > 200_000, reason="too many mappings to use up")
@pytest.mark.skipif(
    sys.version_info >= (3, 15), reason="the interpreter ends itself where it cannot unmap"
)
def test_no_mappings_left_to_speak_of():
    """Whatever comes of it, it is told, and not raised."""
    checks, status = examined(before=f"    import ksmcore.doctor{TAKE_MAPPINGS.format(room=12)}")
    assert checks["mappings"].level == "weak"
    assert status in (1, 2)


def test_a_process_without_a_way_to_make_memory_files():
    before = """
        import errno
        from ksmcore._testing import faults
        faults.inject("memfd_create", errno.EPERM, count=1000)
    """
    checks, status = examined(before=before)
    assert checks["memfd"].level == checks["self-test"].level == "broken"
    assert status == 2


def test_neither_click_nor_rich_is_needed():
    before = """
        import sys
        sys.modules["click"] = sys.modules["rich"] = None
    """
    checks, _ = examined(before=before)
    assert checks["self-test"].level == "good"


JAIL = """
    import ctypes, json, os, tempfile
    import ksmcore.doctor
    libc = ctypes.CDLL(None, use_errno=True)
    root = tempfile.mkdtemp()
    if {has_proc}:
        CLONE_NEWNS, MS_REC, MS_PRIVATE, MS_BIND = 0x20000, 0x4000, 0x40000, 0x1000
        os.mkdir(root + "/proc")
        assert libc.unshare(CLONE_NEWNS) == 0
        assert libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None) == 0
        assert libc.mount(b"/proc", (root + "/proc").encode(), None, MS_BIND | MS_REC, None) == 0
    os.chroot(root)
    os.chdir("/")
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may chroot")
def test_a_chroot_without_proc():
    checks, status = examined(before=JAIL.format(has_proc=False))
    assert checks["proc"].level == checks["mappings"].level == "weak"
    assert "mount --bind /proc" in checks["proc"].remedy
    assert not checks["python"].facts["readable"]
    if checks["self-test"].level != "good":
        assert "mount --bind /proc" in checks["self-test"].remedy
    assert status == 1 + (checks["self-test"].level == "broken")


@pytest.mark.skipif(not can_run("unshare", "-m"), reason="takes root")
def test_a_chroot_with_proc_and_without_a_library():
    checks, status = examined(before=JAIL.format(has_proc=True))
    assert checks["python"].level == "advice"
    assert checks["self-test"].level == checks["proc"].level == "good"
    assert status == 0


@pytest.mark.skipif(not can_run("unshare", "-m"), reason="takes root")
def test_the_command_line_without_proc(tmp_path):
    """What is printed is all that there is: no traceback."""
    pytest.importorskip("click")
    pytest.importorskip("rich")
    script = 'mount -t tmpfs none /proc && exec "$0" -m ksmcore doctor'
    command = ["unshare", "-m", "sh", "-c", script, sys.executable]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.stderr == ""
    assert done.returncode in (1, 2)
    assert "proc         WEAK" in done.stdout


def test_a_limit_of_files_is_named():
    before = """
        import resource
        _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, most))
    """
    checks, status = examined(before=before)
    assert checks["file size"].level == "weak"
    assert checks["file size"].facts["limit_bytes"] == 8192
    assert checks["self-test"].level in ("weak", "broken")
    assert "RLIMIT_FSIZE" in checks["self-test"].remedy
    assert "report" not in checks["self-test"].remedy
    assert status in (1, 2)


def test_locked_memory_is_named():
    before = """
        import ctypes
        import ksmcore.doctor
        MCL_FUTURE = 2
        if ctypes.CDLL(None).mlockall(MCL_FUTURE) != 0:
            print("{}")
            raise SystemExit
    """
    if run_python(before).stdout:
        pytest.skip("mlockall is not allowed")
    checks, status = examined(before=before)
    assert checks["locked"].level == "weak"
    assert checks["locked"].facts["future"] is True
    assert checks["self-test"].level == "good" or "munlockall" in checks["self-test"].remedy
    assert status in (1, 2)


@pytest.mark.parametrize("guard", ["mprotect", None])
def test_threads_that_block_sigsegv_are_named(monkeypatch, guard):
    if guard is not None:
        monkeypatch.setenv("KSMCORE_GUARD", guard)
    # The engine that tries out what works says so too, in the log.
    before = """
        import logging, signal, threading
        logging.getLogger("ksmcore").setLevel(logging.ERROR)
        blocked, end = threading.Barrier(3), threading.Event()
        def work():
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
            blocked.wait()
            end.wait()
        for number in range(2):
            threading.Thread(target=work, name=f"worker-{number}", daemon=True).start()
        blocked.wait()
    """
    checks, _ = examined(before=before)
    assert sorted(checks["signals"].facts["threads"]) == ["worker-0", "worker-1"]
    expected = "weak" if checks["guard"].facts["in_use"] == "mprotect" else "good"
    assert checks["signals"].level == expected
    assert guard is None or expected == "weak"


@pytest.mark.parametrize("free", [0, 3, 10])
def test_a_process_without_descriptors_is_told_so(free):
    before = f"""
        import json, os, resource
        import ksmcore.doctor
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, most))
        taken = []
        try:
            while True:
                taken.append(os.open("/dev/null", os.O_RDONLY))
        except OSError:
            for fd in taken[:{free}]:
                os.close(fd)
    """
    checks, status = examined(before=before)
    assert checks["descriptors"].level == "weak"
    assert checks["descriptors"].facts["limit"] == 64
    assert checks["self-test"].level == "good" or "ulimit -n" in checks["self-test"].remedy
    assert status in (1, 2)
