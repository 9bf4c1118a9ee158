"""The one gate that every buffer passes before the engine may touch its pages.

Owns the rules for what can be merged and the texts for what cannot; called by the engine for
`register`, `dedup` and `estimate`. The gate never copies, never writes and never touches the bytes
of a buffer, so a page that was not present stays so. It looks at two things:

1. the buffer: writable, contiguous, free of object references, with a whole page inside;
2. the mappings under its whole pages: plain private anonymous memory, readable and writable, with
   nothing about it that a new mapping in its place would lose.

The export of the buffer is taken first and held from then on. So no bytes can be resized or
unmapped between the answer and the end of the registration.

Cost, measured on Linux 6.18 in a virtual machine with slow page tables: the first part takes 5 us.
The second reads ``/proc/self/smaps`` up to the buffer (see `ksmcore._kernel.smaps` for why nothing
cheaper is honest): 0.3 ms in an interpreter with NumPy, 10-15 ms with 1 GiB of small resident pages
below the buffer's end, 175 ms behind 60,000 mappings. `admit_all` reads it once for any number of
buffers, so 10,000 of them take 12 us each in an ordinary process, 37 us behind 60,000 mappings.
`fresh` spares it for memory that the caller has just mapped: 27 us.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from ksmcore._gate.mapping_rules import MappingTraits, check_mappings, refusal
from ksmcore._kernel import smaps

__all__ = [
    "Admission",
    "admit",
    "admit_all",
    "hold",
]


@dataclass(frozen=True, slots=True, eq=False)  # eq would compare the bytes of the views
class Admission:
    """A buffer that may be merged, and the hold on it.

    The owner calls `release` once; until then the buffer can neither be closed nor resized.
    """

    view: memoryview
    """Holds the buffer export for the whole registration."""
    addr: int
    """Address of the first whole page."""
    n_pages: int
    """Whole pages; at least 1."""
    phase: int
    """Address of the buffer's first byte modulo the page size."""
    len_bytes: int
    """Length of the buffer, head and tail included."""
    must_privatize: bool
    """The pages are shared anonymous memory, to be turned private before the first merge."""
    dontfork: bool
    """MADV_DONTFORK is set on the pages; like the next three, every new mapping needs it again."""
    dontdump: bool
    """MADV_DONTDUMP is set on some of the pages."""
    hugepage: bool
    """MADV_HUGEPAGE is set on some of the pages."""
    nohugepage: bool
    """MADV_NOHUGEPAGE is set on some of the pages."""

    def release(self) -> None:
        """Let go of the buffer; a second call does nothing.

        Arrays and memoryviews made from `view` stay valid, and hold the buffer for themselves.

        Raises:
            BufferError: something else made from `view`, such as a ctypes object, still uses it.
        """
        self.view.release()


def admit(
    buffer: object, *, page_bytes: int, privatize: bool = False, fresh: bool = False
) -> Admission:
    """Decide whether the whole pages inside `buffer` may be merged, and hold the buffer if so.

    Only pages that lie inside the buffer completely are admitted: those in [addr, addr + n_pages *
    page_bytes). Nothing is copied, written or faulted in. Whatever goes wrong, no export is left
    behind.

    Args:
        buffer: any writable, C- or F-contiguous buffer without object references. NumPy arrays
            of every other type are taken, also those that export no buffer (datetime64).
        page_bytes: the system page size.
        privatize: also take shared anonymous memory, with `must_privatize` set.
        fresh: the caller itself has just mapped this memory, private and anonymous, and nobody
            else knows of it; then its mappings are not read again, unless mlockall(2) may have
            locked them.

    Raises:
        TypeError: not a buffer, or it holds Python objects.
        ValueError: the buffer or the memory under it cannot be merged; the text says why and what
            to do.
        OSError: ``/proc/self/smaps`` cannot be read.
    """
    (admission,) = admit_all([buffer], page_bytes=page_bytes, privatize=privatize, fresh=fresh)
    return admission


def admit_all(
    buffers: Sequence[object], *, page_bytes: int, privatize: bool = False, fresh: bool = False
) -> list[Admission]:
    """`admit` for many buffers at the price of one reading of smaps: all of them or none.

    Raises:
        TypeError, ValueError, OSError: as `admit`, for the first buffer that is refused.
    """
    exports: list[_Export] = []
    try:
        for buffer in buffers:
            exports.append(_Export(buffer, page_bytes))
        traits = _traits_of(exports, page_bytes, privatize, fresh)
    except BaseException:
        # A stored traceback keeps the frames alive, so waiting for the garbage collector is not
        # enough.
        for export in exports:
            export.view.release()
        raise
    return [export.admission(found) for export, found in zip(exports, traits, strict=True)]


# Tells for (address of the first byte, length in bytes) which pages belong to that buffer alone, as
# (address, pages), when more is known of it than that its whole pages do; else None.
Known = Callable[[int, int], tuple[int, int] | None]


@contextmanager
def hold(
    buffer: object, *, page_bytes: int, known: Known | None = None
) -> Iterator[tuple[int, int]]:
    """Only the first half of the gate: (address of the first whole page, whole pages), and the
    buffer held until the block is left. For buffers whose mappings are known, or are not judged.

    Raises:
        TypeError, ValueError: as `admit`, for the buffer itself.
    """
    export = _Export(buffer, page_bytes, known)
    try:
        yield export.addr, export.n_pages
    finally:
        export.view.release()


class _Export:
    """The first half of the gate: one buffer, its view and where it lies."""

    __slots__ = ("addr", "first_byte", "len_bytes", "n_pages", "phase", "view")

    def __init__(self, buffer: object, page_bytes: int, known: Known | None = None) -> None:
        self.view = _writable_view(buffer)
        try:
            self.first_byte = _address_of(self.view)
            self.len_bytes = self.view.nbytes
            self.phase = self.first_byte % page_bytes
            self.addr = self.first_byte + -self.first_byte % page_bytes
            last = self.first_byte + self.len_bytes
            self.n_pages = max((last - last % page_bytes - self.addr) // page_bytes, 0)
            whole = known(self.first_byte, self.len_bytes) if known is not None else None
            if whole is not None:
                self.addr, self.n_pages = whole
            if self.n_pages == 0:
                raise ValueError(
                    f"no whole page inside this buffer: it has {self.len_bytes:,} bytes and begins "
                    f"{self.phase} bytes into a page of {page_bytes:,} bytes; register larger "
                    "buffers, or make page-aligned ones with ksmcore.empty"
                )
        except BaseException:
            self.view.release()
            raise

    def admission(self, traits: MappingTraits) -> Admission:
        return Admission(
            view=self.view,
            addr=self.addr,
            n_pages=self.n_pages,
            phase=self.phase,
            len_bytes=self.len_bytes,
            must_privatize=traits.must_privatize,
            dontfork=traits.dontfork,
            dontdump=traits.dontdump,
            hugepage=traits.hugepage,
            nohugepage=traits.nohugepage,
        )


def _writable_view(buffer: object) -> memoryview:
    """A memoryview that exports `buffer`, known to be writable, contiguous and without objects."""
    if isinstance(buffer, np.ndarray):
        return _view_of_array(buffer)
    try:
        # Any is what memoryview() takes before Buffer has a name in the typing module (3.12).
        exporter: Any = buffer
        view = memoryview(exporter)
    except TypeError:
        raise TypeError(
            f"{type(buffer).__name__!r} is not a buffer; pass an mmap, a NumPy array, a bytearray, "
            "a memoryview or what else exports its memory (for a tensor: its .numpy())"
        ) from None
    try:
        if _holds_objects(view.format):
            raise _object_error(f"format {view.format!r}")
        if view.readonly:
            raise _read_only_error(type(buffer).__name__)
        if not view.contiguous:
            raise _stride_error(type(buffer).__name__)
    except BaseException:
        view.release()
        raise
    return view


def _view_of_array(array: np.ndarray[Any, Any]) -> memoryview:
    """The bytes of an array of any type, also of those that refuse the buffer protocol."""
    name = type(array).__name__
    if array.dtype.hasobject:
        raise _object_error(f"dtype {array.dtype}")
    if not array.flags.writeable:
        raise _read_only_error(name)
    if not array.flags.forc:
        raise _stride_error(name)
    # Without the subclass: matrix refuses one dimension, MaskedArray carries its mask along.
    plain = array.view(np.ndarray)
    if plain.nbytes == 0:
        # A dtype of zero bytes cannot be viewed as bytes; there is nothing to see anyway.
        return memoryview(bytearray())
    # The transpose of an F-ordered array is C-ordered, and reshaping that makes a view, no copy.
    flat = (plain if plain.flags.c_contiguous else plain.T).reshape(-1)
    octets: Any = flat.view(np.uint8)  # Any, as with `exporter` above
    return memoryview(octets)


def _holds_objects(format_text: str | None) -> bool:
    """Whether a buffer format has an "O" (an object reference) outside the names of fields."""
    return "O" in re.sub(r":[^:]*:", "", format_text or "")


def _object_error(what: str) -> TypeError:
    return TypeError(
        f"a buffer with {what} holds references to Python objects, which change all the time; "
        "register arrays of numbers, dates or fixed-size strings instead"
    )


def _read_only_error(name: str) -> ValueError:
    return ValueError(
        f"this {name} is read-only, so ksmcore cannot tell who else relies on its memory; register "
        "the writable object that owns the memory, or a copy made with ksmcore.copy"
    )


def _stride_error(name: str) -> ValueError:
    return ValueError(
        f"this {name} is not contiguous; register the array it is a part of, or a copy made with "
        "ksmcore.copy"
    )


class _PyBuffer(ctypes.Structure):
    """Py_buffer, whose layout CPython has fixed as part of its stable ABI."""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.c_void_p),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


_PYBUF_ANY_CONTIGUOUS_WRITABLE = 0x0080 | 0x0010 | 0x0008 | 0x0001
_get_buffer = ctypes.pythonapi.PyObject_GetBuffer
_get_buffer.argtypes = (ctypes.py_object, ctypes.POINTER(_PyBuffer), ctypes.c_int)
_get_buffer.restype = ctypes.c_int
_release_buffer = ctypes.pythonapi.PyBuffer_Release
_release_buffer.argtypes = (ctypes.POINTER(_PyBuffer),)
_release_buffer.restype = None


def _address_of(view: memoryview) -> int:
    """Address of the first byte of a contiguous view.

    Asked of the buffer protocol itself, because ctypes' from_buffer() refuses F-contiguous views
    and NumPy's frombuffer() empty ones.
    """
    raw = _PyBuffer()
    _get_buffer(view, ctypes.byref(raw), _PYBUF_ANY_CONTIGUOUS_WRITABLE)
    try:
        return raw.buf or 0
    finally:
        _release_buffer(ctypes.byref(raw))


def _traits_of(
    exports: Sequence[_Export], page_bytes: int, privatize: bool, fresh: bool
) -> list[MappingTraits]:
    if not exports:
        return []
    if fresh and smaps.locked_bytes() == 0:
        return [MappingTraits()] * len(exports)
    lowest = min(export.addr for export in exports)
    highest = max(export.addr + export.n_pages * page_bytes for export in exports)
    snapshot = smaps.Snapshot(lowest, highest)
    found: list[MappingTraits] = []
    # By address, as many buffers can lie in one mapping.
    judged: dict[int, smaps.Vma] = {}
    for export in exports:
        start, end = export.addr, export.addr + export.n_pages * page_bytes
        mappings = snapshot.vmas_in(start, end)
        found.append(
            check_mappings(mappings, start, end, page_bytes=page_bytes, privatize=privatize)
        )
        judged.update((vma.start, vma) for vma in mappings)
    # Last and once for all, because it can cost another reading of a file as slow as smaps.
    own_policy = smaps.own_numa_policy(list(judged.values()))
    if own_policy is not None:
        vma, policy = own_policy
        raise refusal(
            max(lowest, vma.start),
            min(highest, vma.end),
            f"its pages have the NUMA policy {policy!r}, which merged pages cannot keep",
            "set it back to MPOL_DEFAULT with mbind(2)",
        )
    return found
