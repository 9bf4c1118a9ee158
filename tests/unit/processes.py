"""Python processes of their own, for tests whose memory nobody else should share."""

import os
import subprocess
import sys
import textwrap


def run_python(code, **env):
    """Run a program to its end, warnings as errors, and catch what it writes."""
    return subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", textwrap.dedent(code)],
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
