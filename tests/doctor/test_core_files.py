"""What the doctor says of core files is what the kernel writes."""

import resource
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from ksmcore._kernel import procfs

LEN_BYTES = 1 << 20
# Equal arrays, merged and not written since.
PROGRAM = f"""
    import os, sys
    import numpy as np
    import ksmcore
    from ksmcore.doctor import limits
    with open("/proc/self/coredump_filter", "w") as kinds:
        kinds.write(sys.argv[1])
    arrays = [ksmcore.empty({LEN_BYTES}, np.uint8) for _ in range(2)]
    for array in arrays:
        array[:] = np.arange({LEN_BYTES}) // ksmcore.Engine.page_bytes % 251 + 1
    ksmcore.dedup(*arrays)
    assert ksmcore.stats().pages_sharing > 0
    print(limits.core_files().level, arrays[1].ctypes.data, flush=True)
    os.abort()
"""


def stretches(core):
    """(address, bytes) of what of the memory is in a core file."""
    with open(core, "rb") as file:
        head = file.read(64)
        (table,) = struct.unpack_from("<Q", head, 32)
        entry_bytes, n_entries = struct.unpack_from("<HH", head, 54)
        file.seek(table)
        for _ in range(n_entries):
            kind, _, _, addr, _, in_file = struct.unpack_from("<IIQQQQ", file.read(entry_bytes))
            if kind == 1:
                yield addr, in_file


@pytest.mark.parametrize(("kinds", "level", "share"), [(0x33, "advice", 0), (0x37, "good", 1)])
def test_merged_memory_is_in_core_files_if_the_filter_has_it(tmp_path, kinds, level, share):
    if procfs.text_of("/proc/sys/kernel/core_pattern") != "core":
        pytest.skip("core files go elsewhere")
    if resource.getrlimit(resource.RLIMIT_CORE)[1] != resource.RLIM_INFINITY:
        pytest.skip("no core files may be written")

    def allow():
        resource.setrlimit(resource.RLIMIT_CORE, (resource.RLIM_INFINITY,) * 2)

    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), hex(kinds)],
        cwd=tmp_path,
        preexec_fn=allow,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == -6, done.stderr
    found, addr = done.stdout.split()
    (core,) = Path(tmp_path).glob("core*")
    end = int(addr) + LEN_BYTES
    there = sum(
        max(min(end, start + n_bytes) - max(int(addr), start), 0)
        for start, n_bytes in stretches(core)
    )
    core.unlink()
    assert (found, there) == (level, share * LEN_BYTES)
