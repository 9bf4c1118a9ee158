"""Python processes of their own, for tests whose memory nobody else should share."""

import os
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
STRICT = ("-X", "dev", "-W", "error")

# Threads allocate while the program forks, and each child finds the arena whole. Called with the
# threads, what ends them, and how many forks.
FORK_OFTEN = """
    import os, warnings
    import numpy as np
    from ksmcore._arrays import arena
    from ksmcore._testing.arena import check_arena

    def fork_often(threads, end, n_forks):
        warnings.simplefilter("ignore", DeprecationWarning)  # 3.12: of forks with threads
        for thread in threads:
            thread.start()
        statuses = []
        for _ in range(n_forks):
            pid = os.fork()
            if pid == 0:
                ok = all((np.full(100_000, i, np.uint8) == i).all() for i in range(5))
                arena.give_back()
                os._exit(0 if ok and check_arena() == 0 else 1)
            statuses.append(os.waitpid(pid, 0)[1])
        end()
        for thread in threads:
            thread.join()
        assert statuses == [0] * n_forks, statuses
"""


def with_helpers(**env: str) -> dict[str, str]:
    """The environment in which a program finds `helpers`."""
    paths = [*filter(None, [os.environ.get("PYTHONPATH")]), str(TESTS)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **env}


def run_python(
    *parts: str,
    flags: Sequence[str] = STRICT,
    arguments: Sequence[str | os.PathLike] = (),
    prefix: Sequence[str] = (),
    cwd: str | None = None,
    timeout_seconds: float = 120,
    **env: str,
) -> subprocess.CompletedProcess[str]:
    """Run a program, of these parts, to its end, and catch what it writes. It may import `helpers`.

    `prefix` is a command that runs it; what else is given by name is added to the environment.
    """
    code = "\n".join(map(textwrap.dedent, parts))
    return subprocess.run(
        [*prefix, sys.executable, *flags, "-c", code, *arguments],
        env=with_helpers(**env),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout_seconds,
        check=False,
    )
