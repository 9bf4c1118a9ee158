"""Owns the answers to "can ksmcore work here at all" and "may it". `ksmcore/__init__.py` asks
before it imports anything else, and setup.py before it compiles anything.
"""

import os
import sys
from collections.abc import Mapping

MACHINES = ("x86_64", "aarch64")


def require_linux() -> None:
    """Raise ImportError unless this is a 64-bit Python on Linux, x86-64 or aarch64."""
    bits = 64 if sys.maxsize > 2**32 else 32
    # Not of the module platform, which takes longer to import than all else here.
    machine = os.uname().machine if hasattr(os, "uname") else ""
    if sys.platform == "linux" and machine in MACHINES and bits == 64:
        return
    raise ImportError(
        "ksmcore needs a 64-bit Python on Linux (x86-64 or aarch64): it works through system calls "
        f"that no other system has; this is a {bits}-bit Python on {sys.platform}, "
        f"{machine or 'unknown machine'}."
    )


def is_disabled(environ: Mapping[str, str] = os.environ) -> bool:
    """Does the environment say that no memory is to be touched?"""
    return environ.get("KSMCORE_DISABLE", "0").lower() not in ("", "0", "no")
