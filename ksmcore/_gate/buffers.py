"""The one gate that every buffer passes before the engine may touch its pages.

Owns the rules for what can be merged and the texts for what cannot. The gate never copies, never
writes and never touches the bytes of a buffer, so a page that was not present stays so. It looks at
two things:

1. the buffer: writable, contiguous, free of object references, with a whole page inside;
2. the mappings under its whole pages: plain private anonymous memory, readable and writable, with
   nothing about it that a new mapping in its place would lose.

The export of the buffer is taken first and held from then on. So no bytes can be resized or
unmapped between the answer and the end of the registration.

Cost, measured on Linux 6.18 in a virtual machine with slow page tables: the first part takes 5 us.
The second asks for the buffer's mapping, and is content with one in which a buffer that was let in
lies (see `ksmcore._gate.admitted`): 25 us. Where there is none it reads ``/proc/self/smaps`` up to
the buffer (see `ksmcore._kernel.smaps` for why nothing cheaper is honest): 0.3 ms in an interpreter
with NumPy, 10-25 ms with 1 GiB of small resident pages below the buffer's end, 175 ms behind 60,000
mappings. It is read once for any number of buffers, so 10,000 of them take 12 us each in an
ordinary process, 37 us behind 60,000 mappings.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ksmcore._gate.address import address_of
from ksmcore._gate.admitted import Admitted
from ksmcore._gate.mapping_rules import MappingTraits, check_mappings, refusal
from ksmcore._kernel import smaps

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

__all__ = ["Admission", "Export", "admit", "release_all"]

# Tells for (address of the first byte, length in bytes) which pages belong to that buffer alone, as
# (address, pages), when more is known of it than that its whole pages do; else None.
Known = Callable[[int, int], tuple[int, int] | None]


class Export:
    """The first half of the gate: one buffer that can be merged as far as itself goes, and the hold
    on it. Until `release`, or the end of a `with` block, it can neither be closed nor resized.

    Raises:
        TypeError: not a buffer, or it holds Python objects.
        ValueError: read-only, not contiguous, or no whole page inside.
    """

    __slots__ = ("addr", "len_bytes", "n_bytes", "n_pages", "phase", "view")

    view: memoryview
    """All bytes of the buffer; holds its export."""
    addr: int
    """Address of the first whole page."""
    n_pages: int
    """Whole pages; at least 1."""
    n_bytes: int
    """Their length."""
    phase: int
    """Address of the buffer's first byte modulo the page size."""
    len_bytes: int
    """Length of the buffer, head and tail included."""

    def __init__(self, buffer: object, page_bytes: int, known: Known | None = None) -> None:
        self.view = _writable_view(buffer)
        try:
            first_byte = address_of(self.view)
            self.len_bytes = self.view.nbytes
            self.phase = first_byte % page_bytes
            self.addr = first_byte + -first_byte % page_bytes
            last = first_byte + self.len_bytes
            self.n_pages = max((last - last % page_bytes - self.addr) // page_bytes, 0)
            whole = known(first_byte, self.len_bytes) if known is not None else None
            if whole is not None:
                self.addr, self.n_pages = whole
            self.n_bytes = self.n_pages * page_bytes
            if self.n_pages == 0:
                raise ValueError(
                    f"no whole page inside this buffer: it has {self.len_bytes:,} bytes and begins "
                    f"{self.phase} bytes into a page of {page_bytes:,} bytes; register larger "
                    "buffers, or make page-aligned ones with ksmcore.empty"
                )
        except BaseException:
            self.view.release()
            raise

    @property
    def end(self) -> int:
        """Address after the last whole page."""
        return self.addr + self.n_bytes

    @property
    def is_held(self) -> bool:
        """False once it was released."""
        try:
            return self.view.nbytes >= 0
        except ValueError:
            return False

    def release(self) -> None:
        """Let go of the buffer; a second call does nothing.

        Arrays and memoryviews made from `view` stay valid, and hold the buffer for themselves.

        Raises:
            BufferError: something else made from `view`, such as a ctypes object, still uses it.
        """
        self.view.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()


@dataclass(frozen=True, slots=True, eq=False)
class Admission:
    """A buffer that may be merged: the hold on it, and what was found out about its mappings."""

    export: Export
    traits: MappingTraits
    in_one_mapping: bool
    """All its pages lie in one mapping, so what is true of one is true of all."""

    def release(self) -> None:
        """As `Export.release`."""
        self.export.release()


def admit(
    exports: Sequence[Export],
    *,
    page_bytes: int,
    privatize: bool = False,
    admitted: Admitted | None = None,
) -> list[Admission]:
    """The second half of the gate: decide whether the whole pages inside these buffers may be
    merged. All of them are admitted, or all are let go.

    Only pages that lie inside a buffer completely are admitted: those in [addr, end). Nothing is
    copied, written or faulted in, and smaps is read once at most.

    Args:
        exports: the buffers, held.
        page_bytes: the system page size.
        privatize: also take shared anonymous memory, with `must_privatize` set.
        admitted: what was let in before. Its neighbours are let in without reading smaps.

    Raises:
        ValueError: the memory under the first buffer that is refused cannot be merged; the text
            says why and what to do.
        OSError: ``/proc/self/smaps`` cannot be read.
    """
    try:
        known: dict[Export, MappingTraits] = {}
        if admitted is not None:
            known = admitted.traits_of(sorted(exports, key=lambda export: export.addr))
        unknown = [export for export in exports if export not in known]
        looked_at = dict(zip(unknown, _look(unknown, page_bytes, privatize), strict=True))
        return [
            Admission(export, known[export], True)
            if export in known
            else Admission(export, *looked_at[export])
            for export in exports
        ]
    except BaseException:
        release_all(exports)
        raise


def release_all(held: Iterable[Export | Admission]) -> None:
    """Let go of all of them. A stored traceback keeps the frames alive that hold a buffer, so after
    an error waiting for the garbage collector is not enough."""
    for one in held:
        one.release()


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


def _look(
    exports: Sequence[Export], page_bytes: int, privatize: bool
) -> list[tuple[MappingTraits, bool]]:
    """What smaps says of these buffers, and whether each lies in one mapping."""
    if not exports:
        return []
    lowest = min(export.addr for export in exports)
    highest = max(export.end for export in exports)
    snapshot = smaps.Snapshot(lowest, highest)
    found: list[tuple[MappingTraits, bool]] = []
    # By address, as many buffers can lie in one mapping.
    judged: dict[int, smaps.Vma] = {}
    for export in exports:
        start, end = export.addr, export.end
        mappings = snapshot.vmas_in(start, end)
        traits = check_mappings(mappings, start, end, page_bytes=page_bytes, privatize=privatize)
        found.append((traits, len(mappings) == 1))
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
