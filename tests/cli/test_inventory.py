"""`ksmcore estimate --pid` and `--whole`: equal pages of whole processes, seen from outside."""

import json
import os
import re
import subprocess
import sys

import pytest

from helpers.cli import ksmcore, running, write

PAGE = os.sysconf("SC_PAGE_SIZE")
# A mapping of its own, which the kernel makes one with no other (they are dumped); then it says so,
# and waits.
HOLDER = f"""
    import mmap, sys
    import random
    page = random.Random(int(sys.argv[1])).randbytes({PAGE})
    memory = mmap.mmap(-1, 600 * {PAGE}, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_DONTDUMP)
    memory[: 400 * {PAGE}] = page * 400
    memory[400 * {PAGE} : 500 * {PAGE}] = bytes(100 * {PAGE})
    print("ready", flush=True)
    sys.stdin.read(1)
"""


def held(tmp_path, seed):
    return running(write(tmp_path, HOLDER, "holder.py"), seed)


def looked_at(tmp_path, *pids, status=0):
    options = [word for pid in pids for word in ("--pid", pid)]
    done = ksmcore("estimate", *options, "--json", "out.json", cwd=tmp_path)
    assert done.returncode == status, done.stderr
    return done, json.loads((tmp_path / "out.json").read_text())["inventory"]


def test_one_process(tmp_path):
    with held(tmp_path, 1) as process:
        assert process.stdout.readline() == b"ready\n"
        done, found = looked_at(tmp_path, process.pid)
    (one,) = found["processes"]
    assert one["pid"] == process.pid
    assert one["command"][-1] == "1"
    assert not one["ended"]
    place = one["places"][0]
    # With huge pages, what was not written is there as well, and zero.
    assert 500 * PAGE <= place["bytes"] <= 600 * PAGE
    assert 499 * PAGE <= place["inside_bytes"] <= place["equal_bytes"]
    assert place["kind"] == "anonymous"
    assert 100 * PAGE <= place["zero_bytes"] <= 200 * PAGE
    assert found["saveable_bytes"] == one["saveable_bytes"] >= 499 * PAGE
    assert one["across_bytes"] == 0
    assert one["elsewhere_bytes"] > 0
    assert {"library", "heap"} <= {place["kind"] for place in one["places"]}
    assert done.stdout.startswith(f"Process {process.pid}  ")
    assert "could be saved" in done.stdout
    assert "elsewhere" not in done.stdout
    assert done.stderr == ""


def test_across_processes(tmp_path):
    """Those that hold the same, and one that does not."""
    with held(tmp_path, 1) as a, held(tmp_path, 1) as b, held(tmp_path, 2) as c:
        for process in (a, b, c):
            assert process.stdout.readline() == b"ready\n"
        done, found = looked_at(tmp_path, a.pid, b.pid, c.pid, a.pid)
    assert [one["pid"] for one in found["processes"]] == [a.pid, b.pid, c.pid]
    across = [one["places"][0]["across_bytes"] // PAGE for one in found["processes"]]
    assert across[0] == across[1] == 400
    assert across[2] == 0
    within = sum(one["saveable_bytes"] for one in found["processes"])
    assert found["within_bytes"] == within
    assert found["saveable_bytes"] > within
    assert re.search(r"^All 3  .* within and across them", done.stdout, re.MULTILINE)


def test_what_a_fork_left_in_common_is_no_gain(tmp_path):
    """Neither child nor parent writes: it is the same memory."""
    forker = HOLDER.replace(
        'print("ready", flush=True)',
        "import os; os.fork(); os.write(1, b'%d\\n' % os.getpid())",
    )
    with running(write(tmp_path, forker), 1) as parent:
        pids = [int(parent.stdout.readline()) for _ in range(2)]
        _, found = looked_at(tmp_path, *pids)
        parent.stdin.close()
        parent.wait()
    each = [one["bytes"] for one in found["processes"]]
    assert found["bytes"] < sum(each) - 450 * PAGE
    # All of one page, and zeros, in both together.
    assert found["saveable_bytes"] < sum(each) - 900 * PAGE


def test_processes_that_are_not_there_or_end(tmp_path):
    done, found = looked_at(tmp_path, 2**22 + 1, status=1)
    assert "there is no process 4194305" in done.stderr
    assert found["processes"] == []
    with subprocess.Popen([sys.executable, "-c", "pass"]) as ended:
        os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
        done, _ = looked_at(tmp_path, ended.pid, os.getpid(), status=1)
    assert f"process {ended.pid} has no memory" in done.stderr
    # And the other is shown.
    assert f"Process {os.getpid()}  " in done.stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be another user")
def test_processes_of_others_tell_what_helps(tmp_path):
    # As a user who may look at nobody else's; the module is loaded before.
    program = f"""
        import os, sys
        from ksmcore.cli.commands import cli
        from ksmcore._engine.inventory import take_inventory
        os.setgroups([]); os.setgid(65534); os.setuid(65534)
        print(take_inventory([{os.getpid()}]).failures)
    """
    done = subprocess.run(
        [sys.executable, write(tmp_path, program)], capture_output=True, text=True, check=True
    )
    assert "it is of user 0" in done.stdout
    assert "sudo" in done.stdout


def test_the_whole_memory_of_a_program(tmp_path):
    write(tmp_path, HOLDER.replace("sys.stdin.read(1)", "sys.exit(3)"))
    done = ksmcore("estimate", "--whole", "--json", "out.json", "program.py", "1", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (3, "ready\n")
    assert "of the program's whole memory could be saved at the best moment" in done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["best"]["saveable_bytes"] >= 499 * PAGE
    assert found["end"]["processes"][0]["places"][0]["inside_bytes"] >= 499 * PAGE
    again = ksmcore("report", "out.json", cwd=tmp_path)
    assert again.stdout.splitlines() == [*done.stderr.splitlines(), "  Exit     status 3"]


@pytest.mark.parametrize("arguments", [["program.py"], ["--whole"], ["-m", "module"]])
def test_either_processes_or_a_program(tmp_path, arguments):
    done = ksmcore("estimate", "--pid", os.getpid(), *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert "no program can be run too" in done.stderr
    done = ksmcore("estimate", cwd=tmp_path)
    assert done.returncode == 2
    assert "Name a SCRIPT, or a process with --pid" in done.stderr
