"""System calls that fail when a test orders it."""

from libc.string cimport memset

from ksmcore._kernel.syscalls cimport N_CALLS, sys_ordered, sys_orders

from ksmcore._kernel import syscalls


def inject(str call, int code, int after=0, int count=1):
    """Make `count` calls of `call` fail with errno `code`, once `after` of them have succeeded.

    Raises ValueError naming the calls when `call` is none of them.
    """
    if call not in syscalls.CALL_NAMES[1:]:
        raise ValueError(f"unknown call {call!r}; one of {', '.join(syscalls.CALL_NAMES[1:])}")
    cdef int index = syscalls.CALL_NAMES.index(call)
    sys_ordered.after[index] = after
    sys_ordered.count[index] = count
    sys_ordered.code[index] = code
    sys_ordered.armed = True


def to_succeed(str call):
    """How many more of these calls will succeed before the first that is to fail."""
    return sys_ordered.after[<int>syscalls.CALL_NAMES.index(call)]


def clear():
    """Let every call through again; returns the number of failures that were ordered and not used."""
    cdef int i, unused = 0
    for i in range(<int>N_CALLS):
        unused += sys_ordered.count[i]
    memset(&sys_ordered, 0, sizeof(sys_orders))
    return unused
