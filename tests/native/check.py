"""Runs the sanitized modules under AddressSanitizer, UBSan and LeakSanitizer.

    make sanitize    the tests: any report ends them, and fails
    make leaks       lives.py: leaks of ksmcore fail, those of Python and its libraries are left out

The modules are those of build/sanitize, which make builds. LeakSanitizer rather than valgrind: it
needs nothing but gcc and the same build, and any memory can be registered under it, whereas
valgrind's heap is executable memory, which the gate refuses.
"""

import ctypes
import os
import re
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "sanitize"
LIB = BUILD / "lib"
HERE = Path(__file__).parent

# What says nothing about the modules under AddressSanitizer, or takes too long.
LEFT_OUT = {
    "its own memory is part of what they measure": (
        "arrays/test_allocator.py::test_zeros_touches_no_page_also_where_other_arrays_were_before",
        "arrays/test_allocator.py::test_the_memory_of_collected_arrays_goes_back_merged_or_not",
        "arrays/test_allocator.py::test_without_address_space_numpy_says_no_and_the_next_array_is_made",
        "core/test_copy.py::test_the_first_copy_shares_as_well",
        "core/test_copy.py::test_the_second_copy_takes_no_memory_and_copies_nothing",
        "cli/test_demo.py",
        "guard/test_merge.py::test_pss_falls_by_what_bytes_saved_says",
        "guard/test_merge.py::test_zero_pages_are_given_back_and_count",
        "guard/test_merge.py::test_extra_memory_while_merging_is_bounded",
        "engine/test_stats.py::TestMemoryInfo",
        "kernel/test_smaps.py",
    ),
    "it ends the process where malloc would say no": (
        "arrays/test_memory.py::test_absurd_sizes_are_refused_as_before",
    ),
    "it turns mlock into nothing": (
        "core/test_altered.py::test_mlock",
        "gate/test_mapping_rules.py::test_locked_memory",
    ),
    "it writes no core files": ("doctor/test_core_files.py",),
    "it needs a mapping where none are left": (
        "doctor/test_processes.py::test_no_mappings_left_to_speak_of",
    ),
    "they count what happens in a few seconds, and everything is slower here": (
        "stress/test_lost_writes.py::test_no_word_is_lost[",
    ),
    "the size is the test, and a smaller tree has the same code": (
        "test_trees.py::test_a_million_nodes",
    ),
}

ADDR_NO_RANDOMIZE = 0x0040000  # of <sys/personality.h>
# The size of a leak on purpose; when it is not found, nothing is.
PLANTED_BYTES = 12345

REPORT = re.compile(r"runtime error: |ERROR: AddressSanitizer|AddressSanitizer:DEADLYSIGNAL")
LEAK = re.compile(r"leak of (\d+) byte")
OF_KSMCORE = re.compile(r"^ +#\d+ .*build/sanitize/(cython|lib)/ksmcore/", re.MULTILINE)


def preload() -> str:
    """The runtime that must be in the process before any module that needs it."""
    module = LIB / "ksmcore" / "_kernel" / f"syscalls{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not module.exists():
        raise SystemExit(f"{module} is not built: use make")
    needed = subprocess.run(["ldd", module], capture_output=True, text=True, check=True).stdout
    found = re.search(r"libasan\S* => (/\S+)", needed)
    if found is None:
        raise SystemExit("the modules name no libasan: build them with gcc (make CC=gcc)")
    return found[1]


def environment(**asan_options: object) -> dict[str, str]:
    asan_options["handle_segv"] = 0  # SIGSEGV belongs to the guard, and to Python
    options = ":".join(f"{name}={value}" for name, value in asan_options.items())
    return {
        **os.environ,
        "LD_PRELOAD": preload(),
        "PYTHONPATH": str(LIB),
        "PYTHONMALLOC": "malloc",  # each object is an allocation of its own, with its own bounds
        "ASAN_OPTIONS": options,
        "UBSAN_OPTIONS": "print_stacktrace=1:abort_on_error=1",
    }


def start(args: list[str | Path], env: dict[str, str], **how: object) -> subprocess.Popen[str]:
    """A sanitized Python. Not in ROOT: there, `import ksmcore` finds that of the checkout."""
    command = [sys.executable, *map(str, args)]
    return subprocess.Popen(command, cwd=BUILD, env=env, text=True, errors="replace", **how)


def how_it_ended(code: int) -> str:
    return f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"


def sanitize(args: list[str]) -> int:
    # Aborted, so that faulthandler tells which test it was.
    env = environment(detect_leaks=0, abort_on_error=1, detect_stack_use_after_return=1)
    left_out = [f"--deselect=tests/{test}" for tests in LEFT_OUT.values() for test in tests]
    # Nothing captured (-s): a report must get out, also that of a forked child.
    options = ["-q", "-s", "-p", "no:cacheprovider", *left_out]
    reported = False
    with start(
        ["-m", "pytest", ROOT / "tests", *options, *args],
        env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as tests:
        for line in tests.stdout:
            print(line, end="", flush=True)
            reported = reported or REPORT.search(line) is not None
    if reported or tests.returncode != 0:
        why = "a report, see above" if reported else "no report, but tests failed"
        print(f"sanitize: FAILED ({why}; {how_it_ended(tests.returncode)})")
        return 1
    print("sanitize: no report")
    return 0


def leaks() -> int:
    env = environment(
        detect_leaks=1,
        exitcode=0,  # for what LeakSanitizer finds: that is judged here
        abort_on_error=1,  # for all else
        fast_unwind_on_malloc=0,  # Python has no frame pointers, so only this sees who called it
        malloc_context_size=15,
        quarantine_size_mb=0,  # the size of the process must tell something
    )
    with start([HERE / "lives.py", PLANTED_BYTES], env, stderr=subprocess.PIPE) as lives:
        report = lives.stderr.read()
    found = [block for block in report.split("\n\n") if LEAK.search(block)]
    planted = [block for block in found if int(LEAK.search(block)[1]) % PLANTED_BYTES == 0]
    ours = [block for block in found if OF_KSMCORE.search(block)]
    if lives.returncode not in (0, 1) or not planted:
        print(report)
        what = how_it_ended(lives.returncode)
        print(f"leaks: FAILED (no end, or the leak planted there was not found; {what})")
        return 1
    if ours:
        print(*ours, sep="\n\n")
    others = len(found) - len(ours) - len(planted)
    print(f"leaks: {len(ours)} of ksmcore; left out: {others} of Python and its libraries")
    if ours or lives.returncode != 0:
        print("leaks: FAILED" + (" (see GROWS above)" if lives.returncode != 0 else ""))
        return 1
    return 0


def main(args: list[str]) -> int:
    # Where the kernel spreads addresses widely (vm.mmap_rnd_bits above 28), the older runtimes do
    # not find the room they need every time. Inherited by what is started here.
    ctypes.CDLL(None).personality(ADDR_NO_RANDOMIZE)
    if args[:1] == ["sanitize"]:
        return sanitize(args[1:])
    if args == ["leaks"]:
        return leaks()
    raise SystemExit("usage: check.py sanitize [ARGUMENT OF PYTEST ...] | leaks")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
