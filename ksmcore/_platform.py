"""Owns the answer to "can ksmcore work here at all"; `ksmcore/__init__.py` asks before it imports
anything else, and setup.py asks before it compiles anything.
"""

import platform
import sys

MACHINES = ("x86_64", "aarch64")


def require_linux() -> None:
    """Raise ImportError unless this is a 64-bit Python on Linux, x86-64 or aarch64."""
    bits = 64 if sys.maxsize > 2**32 else 32
    if sys.platform == "linux" and platform.machine() in MACHINES and bits == 64:
        return
    raise ImportError(
        "ksmcore needs a 64-bit Python on Linux (x86-64 or aarch64): it works through system calls "
        f"that no other system has; this is a {bits}-bit Python on {sys.platform}, "
        f"{platform.machine() or 'unknown machine'}."
    )
