"""Python processes of their own, for tests whose memory nobody else should share."""

import os
import subprocess
import sys
import textwrap

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


def run_python(*parts, **env):
    """Run a program, of these parts, to its end, warnings as errors, and catch what it writes."""
    code = "\n".join(map(textwrap.dedent, parts))
    return subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", code],
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
