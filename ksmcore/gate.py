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
The second reads ``/proc/self/smaps`` up to the buffer (see `ksmcore.vmas` for why nothing cheaper
is honest): 0.3 ms in an interpreter with NumPy, 10-15 ms with 1 GiB of small resident pages below
the buffer's end, 175 ms behind 60,000 mappings. `admit_all` reads it once for any number of
buffers, so 10,000 of them take 12 us each in an ordinary process, 37 us behind 60,000 mappings.
`fresh` spares it for memory that the caller has just mapped: 27 us.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from ksmcore import vmas

__all__ = [
    "Admission",
    "MappingTraits",
    "admit",
    "admit_all",
    "check_mappings",
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


@dataclass(frozen=True, slots=True)
class MappingTraits:
    """What `check_mappings` found out about pages that may be merged; see `Admission`."""

    must_privatize: bool = False
    dontfork: bool = False
    dontdump: bool = False
    hugepage: bool = False
    nohugepage: bool = False


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


@contextmanager
def hold(buffer: object, *, page_bytes: int) -> Iterator[tuple[int, int]]:
    """Only the first half of the gate: (address of the first whole page, whole pages), and the
    buffer held until the block is left. For buffers whose mappings are known, or are not judged.

    Raises:
        TypeError, ValueError: as `admit`, for the buffer itself.
    """
    export = _Export(buffer, page_bytes)
    try:
        yield export.addr, export.n_pages
    finally:
        export.view.release()


class _Export:
    """The first half of the gate: one buffer, its view and where it lies."""

    __slots__ = ("addr", "first_byte", "len_bytes", "n_pages", "phase", "view")

    def __init__(self, buffer: object, page_bytes: int) -> None:
        self.view = _writable_view(buffer)
        try:
            self.first_byte = _address_of(self.view)
            self.len_bytes = self.view.nbytes
            self.phase = self.first_byte % page_bytes
            self.addr = self.first_byte + -self.first_byte % page_bytes
            last = self.first_byte + self.len_bytes
            self.n_pages = max((last - last % page_bytes - self.addr) // page_bytes, 0)
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
    if fresh and vmas.locked_bytes() == 0:
        return [MappingTraits()] * len(exports)
    lowest = min(export.addr for export in exports)
    highest = max(export.addr + export.n_pages * page_bytes for export in exports)
    snapshot = vmas.Snapshot(lowest, highest)
    found: list[MappingTraits] = []
    # By address, as many buffers can lie in one mapping.
    judged: dict[int, vmas.Vma] = {}
    for export in exports:
        start, end = export.addr, export.addr + export.n_pages * page_bytes
        mappings = snapshot.vmas_in(start, end)
        found.append(
            check_mappings(mappings, start, end, page_bytes=page_bytes, privatize=privatize)
        )
        judged.update((vma.start, vma) for vma in mappings)
    # Last and once for all, because it can cost another reading of a file as slow as smaps.
    own_policy = vmas.own_numa_policy(list(judged.values()))
    if own_policy is not None:
        vma, policy = own_policy
        raise _refusal(
            max(lowest, vma.start),
            min(highest, vma.end),
            f"its pages have the NUMA policy {policy!r}, which merged pages cannot keep",
            "set it back to MPOL_DEFAULT with mbind(2)",
        )
    return found


def _refusal(start: int, end: int, why: str, way_out: str) -> ValueError:
    """Error for the pages [start, end): why they cannot be merged, and what the user can do."""
    return ValueError(f"cannot register the memory at {start:#x}-{end:#x}: {why}; {way_out}")


_SHARED_ANONYMOUS = "/dev/zero (deleted)"
_OWN_STORE = "/memfd:ksmcore-store"
_MAKE_A_COPY = "register a copy made with ksmcore.copy"

# VmFlags that forbid merging whatever else holds: code, why, way out. Looked up in this order, the
# most telling one first.
_FORBIDDEN_FLAGS = (
    ("io", "it is device memory (VM_IO)", _MAKE_A_COPY),
    ("pf", "a driver has mapped it without pages of its own (VM_PFNMAP)", _MAKE_A_COPY),
    ("mm", "a driver has put pages of its own into it (VM_MIXEDMAP)", _MAKE_A_COPY),
    ("ss", "it is a shadow stack", "register only memory for data"),
    ("gd", "it is a stack", "register only memory for data"),
    (
        "ht",
        "it is made of huge pages (hugetlb), which have no small pages to merge",
        "allocate it without MAP_HUGETLB or hugetlbfs; transparent huge pages are fine",
    ),
    (
        "lo",
        "it is locked (mlock or mlockall), and memory that was merged is no longer kept resident",
        "unlock it with munlock(2) or munlockall(2) first",
    ),
    (
        "wf",
        "it is wiped on fork (MADV_WIPEONFORK), which merged pages are not",
        "take that back with madvise(MADV_KEEPONFORK), or leave secrets unregistered",
    ),
    (
        "dp",
        "it is droppable (MAP_DROPPABLE): the kernel may throw its bytes away at any time",
        "register memory that keeps its bytes",
    ),
    ("sl", "it is sealed (mseal), so nothing can be mapped over it", _MAKE_A_COPY),
    ("mt", "it has memory tags (PROT_MTE), which merged pages cannot carry", _MAKE_A_COPY),
)
# The three modes of userfaultfd registration: missing, write-protect, minor.
_USERFAULTFD_FLAGS = frozenset({"um", "uw", "ui"})


def check_mappings(
    mappings: Sequence[vmas.Vma], start: int, end: int, *, page_bytes: int, privatize: bool = False
) -> MappingTraits:
    """Judge the pages [start, end) by `mappings`, all that overlap them, lowest first.

    A pure function of what smaps says, so that rare flags can be tried with invented text.

    Raises:
        ValueError: the pages cannot be merged.
    """
    covered = start
    must_privatize = False
    for vma in mappings:
        if vma.start > covered:
            break
        # A mapping that grew while smaps was read can appear twice, the second time longer.
        covered = max(covered, vma.end)
        refused = _why_not(vma, page_bytes)
        if refused is None and vma.shared:
            must_privatize = True
            if not (privatize and _is_shared_anonymous(vma)):
                refused = _why_not_shared(vma)
        if refused is not None:
            raise _refusal(max(start, vma.start), min(end, vma.end), *refused)
    if covered < end:
        raise _refusal(
            covered,
            end,
            "not mapped there" if covered == start else "mapped only in part: a hole begins there",
            "the object behind this buffer describes memory that it does not have",
        )
    no_fork = {"dc" in vma.flags for vma in mappings}
    if len(no_fork) > 1:
        raise _refusal(
            start,
            end,
            "a part of it has MADV_DONTFORK and a part has not",
            "give all of it the same advice, or register the parts one by one",
        )

    def any_has(flag: str) -> bool:
        return any(flag in vma.flags for vma in mappings)

    # Dump and huge page advice may be mixed: giving either to the whole buffer harms nothing but
    # a core dump or some speed.
    return MappingTraits(
        must_privatize=must_privatize,
        dontfork=any_has("dc"),
        dontdump=any_has("dd"),
        hugepage=any_has("hg"),
        nohugepage=any_has("nh"),
    )


def _why_not(vma: vmas.Vma, page_bytes: int) -> tuple[str, str] | None:
    """Why `vma` cannot be merged, whether shared or private, and the way out; None if it can."""
    for flag, why, way_out in _FORBIDDEN_FLAGS:
        if flag in vma.flags:
            return why, way_out
    if vma.page_bytes != page_bytes:
        return (
            f"its pages have {vma.page_bytes:,} bytes instead of {page_bytes:,} (hugetlb)",
            "allocate it without MAP_HUGETLB or hugetlbfs; transparent huge pages are fine",
        )
    if vma.flags & _USERFAULTFD_FLAGS:
        return (
            "a userfaultfd watches it, of other software or of another ksmcore engine",
            "register it with one engine only, or end the other watch (UFFDIO_UNREGISTER) first",
        )
    if vma.protection_key:
        return (
            f"it has the memory protection key {vma.protection_key}, which merged pages would lose",
            "set it back to key 0 with pkey_mprotect(2)",
        )
    if vma.executable:
        return "it is executable", "register only memory for data"
    if not (vma.readable and vma.writable):
        protection = "r" if vma.readable else "w" if vma.writable else "neither"
        names = {"r": "only readable", "w": "only writable", "neither": "not accessible"}
        return (
            f"it is {names[protection]} (mprotect), though its buffer says writable",
            "make it readable and writable first",
        )
    return None if vma.shared else _why_not_private(vma)


def _why_not_private(vma: vmas.Vma) -> tuple[str, str] | None:
    """Why the private mapping `vma` is not plain anonymous memory, and the way out."""
    if vma.path.startswith(_OWN_STORE):
        return (
            "still mapped to a ksmcore store of another engine or of the parent process before "
            "fork",
            f"unregister it from that engine first; in a forked child, {_MAKE_A_COPY}",
        )
    if vma.path == "/dev/zero":
        # The old way to ask for anonymous memory, and nothing else than that.
        return None
    if vma.inode != 0 or vma.path.startswith("/"):
        return (
            f"it is a private mapping of the file {vma.path!r}, whose untouched pages already are "
            "shared through the page cache",
            f"leave it, or {_MAKE_A_COPY}",
        )
    if vma.path in ("", "[heap]") or vma.path.startswith("[anon:"):
        return None
    return f"it is the kernel's own mapping {vma.path}", "register only memory for data"


def _is_shared_anonymous(vma: vmas.Vma) -> bool:
    # The second form is shared anonymous memory that prctl(PR_SET_VMA_ANON_NAME) has named.
    return vma.path == _SHARED_ANONYMOUS or vma.path.startswith("[anon_shmem:")


def _why_not_shared(vma: vmas.Vma) -> tuple[str, str]:
    """Why the shared mapping `vma` is refused, and the way out."""
    if _is_shared_anonymous(vma):
        return (
            "it is shared anonymous memory (MAP_SHARED, the default of mmap.mmap(-1, n)), and "
            "merging would change what a forked child sees",
            "create it with flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, or use ksmcore.empty(...)"
            ", or turn it private in place with register(buf, privatize=True)",
        )
    if vma.path.startswith("/memfd:"):
        kind = "the memory file"
    elif vma.path.startswith("/dev/shm/"):
        kind = "the POSIX shared memory (also of multiprocessing)"
    elif vma.path.startswith("/SYSV"):
        kind = "the System V shared memory"
    else:
        kind = "the file"
    return (
        f"it is a shared mapping of {kind} {vma.path!r}: what is written there must reach everyone "
        "who maps it",
        f"{_MAKE_A_COPY} (privatize=True is for shared memory without a file only)",
    )
