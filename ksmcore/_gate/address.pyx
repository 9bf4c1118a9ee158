"""Where a buffer lies. In C, so that no signal handler can run while the buffer is exported for the question."""

from cpython.buffer cimport PyBUF_ANY_CONTIGUOUS, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport uintptr_t


def place_of(buffer):
    """(address of the first byte, length in bytes) of a contiguous buffer; BufferError where it is not so."""
    cdef Py_buffer raw
    PyObject_GetBuffer(buffer, &raw, PyBUF_ANY_CONTIGUOUS)
    cdef uintptr_t addr = <uintptr_t>raw.buf
    cdef Py_ssize_t len_bytes = raw.len
    PyBuffer_Release(&raw)
    return addr, len_bytes
