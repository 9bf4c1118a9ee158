"""Does an installed ksmcore work? Needs nothing but what it depends on: `python tests/smoke.py`.

For wheels and packages, which have no `ksmcore._testing`: pages are merged, written and read again,
and the command line answers.
"""

import json
import subprocess
import sys

import numpy as np

import ksmcore

N_BYTES = 4 << 20


def check_merging():
    source = np.random.default_rng(1).integers(0, 256, N_BYTES, np.uint8)
    with ksmcore.Engine() as engine:
        arrays = [engine.array(source) for _ in range(4)]
        report = engine.dedup()
        assert report.bytes_saved >= 2 * N_BYTES, report
        arrays[0][:] = 7
        assert (arrays[0] == 7).all()
        assert all((array == source).all() for array in arrays[1:])
        with engine.start(sleep_millisecs=1):
            before = engine.stats().full_scans
            while engine.stats().full_scans < before + 2:
                assert engine.scanning
        assert all((array == source).all() for array in arrays[1:])
        engine.unmerge()
        assert engine.stats().bytes_saved == 0
        assert all((array == source).all() for array in arrays[1:])


def check_allocator():
    with ksmcore.allocator():
        arrays = [np.full(N_BYTES, 3, np.uint8) for _ in range(3)]
    assert ksmcore.dedup().bytes_saved > N_BYTES
    assert all((array == 3).all() for array in arrays)


def check_command_line():
    def answer(*arguments, status=(0,)):
        command = [sys.executable, "-m", "ksmcore", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode in status, done
        return done

    diagnosis = json.loads(answer("doctor", "--json", status=(0, 1)).stdout)
    assert diagnosis["health"] in ("healthy", "weak")
    done = answer("run", "-c", "import numpy; print(numpy.ones(9).sum())")
    assert done.stdout == "9.0\n"
    assert done.stderr.startswith("ksmcore: ")
    assert ksmcore.__version__ in answer("--version").stdout


if __name__ == "__main__":
    check_merging()
    check_allocator()
    check_command_line()
    print(f"ksmcore {ksmcore.__version__} works with Python {sys.version.split()[0]}")
