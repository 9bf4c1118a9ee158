"""The one gate that every buffer passes before the engine may touch its pages.

Owns the rules for what can be merged and the texts for what cannot. The gate never copies, never
writes and never touches the bytes of a buffer, so a page that was not present stays so. It looks at
two things:

1. the buffer: contiguous, free of object references, with a whole page inside;
2. the mappings under its whole pages: plain private anonymous memory, readable and writable, with
   nothing about it that a new mapping in its place would lose.

Whether the buffer itself may be written does not matter: merging changes no byte, and what is
written through other ways to the same memory is copied by the kernel as ever. Memory that nobody
may write is known by its mapping.

The export of the buffer is taken first and held from then on. So no bytes can be resized or
unmapped between the answer and the end of the registration.

Cost, measured on Linux 6.18 in a virtual machine with slow page tables: the first part takes 5 us.
The second reads ``/proc/self/smaps`` up to the buffer (see `ksmcore._kernel.smaps` for why nothing
cheaper is honest): 0.3 ms in an interpreter with NumPy, 10-15 ms with 1 GiB of small resident pages
below the buffer's end, 175 ms behind 60,000 mappings. It is read once for any number of buffers, so
10,000 of them take 12 us each in an ordinary process, 37 us behind 60,000 mappings.

Where so many come one by one that reading would take most of the time, only the place of a mapping
is asked for (see `_Allowance`), and the engine reads smaps once for all before it merges any of
them. What nothing else tells (a lock, say) then keeps a region from being merged, instead of being
an error.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ksmcore._gate.address import place_of
from ksmcore._gate.mapping_rules import MappingTraits, Refusal, judge_mappings
from ksmcore._gate.memories import Memory, library_of
from ksmcore._kernel import smaps
from ksmcore._kernel.mappings import Mapping, Mappings

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Admission", "Export", "Released", "admit", "admit_some", "not_a_buffer", "release_all"]

# Tells for (address of the first byte, length in bytes) which pages belong to that buffer alone, as
# (address, pages), when more is known of it than that its whole pages do; else None.
Known = Callable[[int, int], tuple[int, int] | None]


class Released:
    """What is let go of by `release`, or at the end of a `with` block."""

    __slots__ = ()

    def release(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class Export(Released):
    """The first half of the gate: one buffer that can be merged as far as itself goes, and the hold
    on it. Until `release`, or the end of a `with` block, it can neither be closed nor resized.

    Raises:
        TypeError: not a buffer, or it holds Python objects.
        ValueError: not contiguous, or no whole page inside.
    """

    __slots__ = (
        "addr",
        "first_byte",
        "len_bytes",
        "library",
        "n_bytes",
        "n_pages",
        "name",
        "phase",
        "settle",
        "view",
    )

    view: memoryview
    """All bytes of the buffer; holds its export."""
    addr: int
    """Address of the first whole page."""
    first_byte: int
    """Address of the buffer's first byte."""
    n_pages: int
    """Whole pages; at least 1."""
    n_bytes: int
    """Their length."""
    phase: int
    """Address of the buffer's first byte modulo the page size."""
    len_bytes: int
    """Length of the buffer, head and tail included."""
    name: str
    """Of what it was made of: the name of a class."""
    library: str
    """Whose memory it is, for advice; "" for that of NumPy and Python."""
    settle: Callable[[], object] | None
    """To be called before it is registered; see `Memory`."""

    def __init__(
        self,
        buffer: object,
        page_bytes: int,
        known: Known | None = None,
        name: str | None = None,
    ) -> None:
        self.name = type(buffer).__name__ if name is None else name
        self.settle = None
        if isinstance(buffer, Memory):
            self.view, self.library, self.settle = buffer.view(), buffer.library, buffer.settle
        else:
            self.view, self.library = _view(buffer), library_of(buffer)
        try:
            self.first_byte = first_byte = place_of(self.view)[0]
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
                    f"{self.phase} bytes into a page of {page_bytes:,} bytes; "
                    f"{_LARGER.get(self.library, _LARGER[''])}"
                )
        except BaseException:
            self.view.release()
            raise

    @property
    def end(self) -> int:
        """Address after the last whole page."""
        return self.addr + self.n_bytes

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """Its pages, as (address, length in bytes)."""
        return [(self.addr, self.n_bytes)]

    def release(self) -> None:
        """Let go of the buffer; a second call does nothing.

        Arrays and memoryviews made from `view` stay valid, and hold the buffer for themselves.

        Raises:
            BufferError: something else made from `view`, such as a ctypes object, still uses it.
        """
        self.view.release()


@dataclass(frozen=True, slots=True, eq=False)
class Admission:
    """A buffer that may be merged: the hold on it, and what was found out about its mappings."""

    export: Export
    traits: MappingTraits

    def release(self) -> None:
        """As `Export.release`."""
        self.export.release()


def admit(
    exports: Sequence[Export], *, page_bytes: int, privatize: bool = False
) -> list[Admission]:
    """The second half of the gate: decide whether the whole pages inside these buffers may be
    merged. All of them are admitted, or all are let go.

    Only pages that lie inside a buffer completely are admitted: those in [addr, end). Nothing is
    copied, written or faulted in, and smaps is read once.

    Args:
        exports: the buffers, held.
        page_bytes: the system page size.
        privatize: also take shared anonymous memory, with `must_privatize` set.

    Raises:
        ValueError: the memory under the first buffer that is refused cannot be merged; the text
            says why and what to do.
        OSError: ``/proc/self/smaps`` cannot be read.
    """
    admissions: list[Admission] = []
    try:
        for export, found in zip(exports, _judge(exports, page_bytes, privatize), strict=True):
            if isinstance(found, Refusal):
                raise found.error()
            admissions.append(Admission(export, found))
    except BaseException:
        release_all(exports)
        raise
    return admissions


def admit_some(
    exports: Sequence[Export], *, page_bytes: int, privatize: bool = False
) -> tuple[list[Admission], list[tuple[str, Refusal]]]:
    """As `admit`, except that what cannot be merged is let go, and told by the name of its class.

    Raises OSError as that does; all are let go then.
    """
    admissions: list[Admission] = []
    refused: list[tuple[str, Refusal]] = []
    try:
        for export, found in zip(exports, _judge(exports, page_bytes, privatize), strict=True):
            if isinstance(found, Refusal):
                export.release()
                refused.append((export.name, found))
            else:
                admissions.append(Admission(export, found))
    except BaseException:
        release_all(exports)
        raise
    return admissions, refused


def release_all(held: Iterable[Export | Admission]) -> None:
    """Let go of all of them. A stored traceback keeps the frames alive that hold a buffer, so after
    an error waiting for the garbage collector is not enough."""
    for one in held:
        one.release()


# What to do about buffers that are too small, by whose they are.
_LARGER = {
    "": "register larger buffers, or make page-aligned ones with ksmcore.empty",
    "torch": "small tensors share their pages with strangers; keep many of them in one large "
    "tensor, as views, or make them with torch.from_numpy(ksmcore.empty(...))",
    "jax": "small arrays share their pages with strangers; stack many of them into one",
    "pyarrow": "combine chunks (combine_chunks), so that there are fewer and larger buffers",
    "polars": "rechunk(), so that there are fewer and larger buffers",
}


def not_a_buffer(thing: object) -> TypeError:
    """For what holds no memory that there is a way to."""
    return TypeError(
        f"{type(thing).__name__!r} is not a buffer, and holds none; pass an mmap, a NumPy array, a "
        "bytearray, a tensor, or an object that is made of such: a model, a data frame, a dict"
    )


def _view(buffer: object) -> memoryview:
    """A memoryview that exports `buffer`, known to be contiguous and without objects."""
    if isinstance(buffer, np.ndarray):
        return _view_of_array(buffer)
    try:
        # Any is what memoryview() takes before Buffer has a name in the typing module (3.12).
        exporter: Any = buffer
        view = memoryview(exporter)
    except TypeError:
        raise not_a_buffer(buffer) from None
    try:
        if _holds_objects(view.format):
            raise _object_error(f"format {view.format!r}")
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


def _stride_error(name: str) -> ValueError:
    return ValueError(
        f"this {name} is not contiguous; register the array it is a part of, or a copy made with "
        "ksmcore.copy"
    )


class _Allowance:
    """How long smaps may be read for registrations: for as much time as goes by without, of which
    MOST_SECONDS are kept. So many registrations one by one take twice their own time at most, and
    all but those that come by the thousand are told of everything at once."""

    MOST_SECONDS = 1.0

    def __init__(self) -> None:
        self._left_seconds = self.MOST_SECONDS
        self._since = time.monotonic()

    def is_used_up(self) -> bool:
        now = time.monotonic()
        self._left_seconds = min(self._left_seconds + now - self._since, self.MOST_SECONDS)
        self._since = now
        return self._left_seconds <= 0

    def use(self) -> None:
        """What has been done since is_used_up was reading."""
        now = time.monotonic()
        self._left_seconds -= now - self._since
        self._since = now


_allowance = _Allowance()


def _judge_places(
    exports: Sequence[Export], page_bytes: int
) -> list[MappingTraits | Refusal] | None:
    """As `_judge`, by what is told without smaps; None where that needs smaps."""
    mappings = Mappings()
    found: list[MappingTraits | Refusal] = []
    for export in exports:
        there = [_without_flags(one) for one in mappings.overlapping(export.addr, export.end)]
        verdict = judge_mappings(there, export.addr, export.end, page_bytes=page_bytes)
        if isinstance(verdict, Refusal) or smaps.own_numa_policy(there) is not None:
            return None
        found.append(replace(verdict, unseen=True))
    return found


def _without_flags(mapping: Mapping) -> smaps.Vma:
    return smaps.Vma(
        start=mapping.start,
        end=mapping.end,
        readable="r" in mapping.permissions,
        writable="w" in mapping.permissions,
        executable="x" in mapping.permissions,
        shared="s" in mapping.permissions,
        offset=mapping.offset,
        inode=mapping.inode,
        path=mapping.path,
        flags=frozenset(),
        page_bytes=mapping.page_bytes,
        protection_key=0,
        rss=0,
        pss=0,
        anonymous=0,
        swap=0,
        locked=0,
    )


def _judge(
    exports: Sequence[Export], page_bytes: int, privatize: bool
) -> list[MappingTraits | Refusal]:
    """What the mappings under each of them say."""
    if not exports:
        return []
    if _allowance.is_used_up() and (places := _judge_places(exports, page_bytes)) is not None:
        return places
    try:
        return _judge_all(exports, page_bytes, privatize)
    finally:
        _allowance.use()


def _judge_all(
    exports: Sequence[Export], page_bytes: int, privatize: bool
) -> list[MappingTraits | Refusal]:
    snapshot = smaps.Snapshot(
        min(export.addr for export in exports), max(export.end for export in exports)
    )
    found: list[MappingTraits | Refusal] = []
    # By address, as many buffers can lie in one mapping.
    judged: dict[int, smaps.Vma] = {}
    for export in exports:
        mappings = snapshot.vmas_in(export.addr, export.end)
        verdict = judge_mappings(
            mappings, export.addr, export.end, page_bytes=page_bytes, privatize=privatize
        )
        found.append(verdict)
        if not isinstance(verdict, Refusal):
            judged.update((vma.start, vma) for vma in mappings)
    # Last and once for all, because it can cost another reading of a file as slow as smaps.
    rest = list(judged.values())
    while (own_policy := smaps.own_numa_policy(rest)) is not None:
        vma, policy = own_policy
        del rest[: rest.index(vma) + 1]
        for n, export in enumerate(exports):
            if vma.start < export.end and vma.end > export.addr:
                found[n] = Refusal(
                    max(export.addr, vma.start),
                    min(export.end, vma.end),
                    f"its pages have the NUMA policy {policy!r}, which merged pages cannot keep",
                    "set it back to MPOL_DEFAULT with mbind(2)",
                )
    return found
