"""Runs the tests, a folder at a time, as many folders side by side as there are processors.

    python tests/side_by_side.py [ARGUMENTS OF PYTEST]

What a folder's run printed is shown once it has ended. The exit status is 0 if every test passed
that the arguments chose, else that of the first run that failed.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

TESTS = Path(__file__).parent
# Some tests need hundreds of MiB, and each of these processes that much.
MOST_AT_A_TIME = 4
NO_TESTS_COLLECTED = 5


def groups() -> list[list[str]]:
    """What one process runs, in paths. The larger ones come first, so that all end at one time."""
    found = [sorted(TESTS.glob("test_*.py"))]
    found += [sorted(path.glob("test_*.py")) for path in TESTS.iterdir() if path.is_dir()]
    found.sort(key=lambda paths: sum(path.stat().st_size for path in paths), reverse=True)
    return [[str(path) for path in paths] for paths in found if paths]


def run_all(arguments: list[str]) -> Iterator[tuple[int, str]]:
    """The exit status and the output of each run, as they end."""
    running: set[subprocess.Popen[str]] = set()

    def run(paths: list[str]) -> tuple[int, str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "pytest", *paths, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        running.add(process)
        output, _ = process.communicate()
        running.discard(process)
        return process.returncode, output

    n_at_a_time = min(len(os.sched_getaffinity(0)), MOST_AT_A_TIME)
    with ThreadPoolExecutor(n_at_a_time) as pool:
        runs = [pool.submit(run, paths) for paths in groups()]
        try:
            for done in as_completed(runs):
                yield done.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(running):
                process.terminate()


def main() -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    statuses = []
    for status, output in run_all(sys.argv[1:]):
        print(output, flush=True)
        statuses.append(status)
    failed = [status for status in statuses if status not in (0, NO_TESTS_COLLECTED)]
    if failed:
        return failed[0]
    return 0 if 0 in statuses else NO_TESTS_COLLECTED


if __name__ == "__main__":
    sys.exit(main())
