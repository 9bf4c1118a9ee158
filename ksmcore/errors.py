"""The one exception of ksmcore's own.

Callers' mistakes are TypeError and ValueError; what the kernel refuses is OSError, or MemoryError
when it is out of memory or of mappings.
"""


class InternalError(RuntimeError):
    """An invariant of ksmcore is broken; please report it. Nothing more should be scanned."""
