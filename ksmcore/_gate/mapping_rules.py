"""The rules for mappings: what must be true of memory so that its pages can be merged.

Pure functions of what smaps says, so that rare flags can be tried with invented text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ksmcore._kernel import smaps

__all__ = ["MappingTraits", "Refusal", "check_mappings", "judge_mappings"]

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


@dataclass(frozen=True, slots=True)
class MappingTraits:
    """What `check_mappings` found out about pages that may be merged."""

    must_privatize: bool = False
    """The pages are shared anonymous memory, to be turned private before the first merge."""
    dontfork: bool = False
    """MADV_DONTFORK is set on the pages; like the next three, every new mapping needs it again."""
    dontdump: bool = False
    """MADV_DONTDUMP is set on some of the pages."""
    hugepage: bool = False
    """MADV_HUGEPAGE is set on some of the pages."""
    nohugepage: bool = False
    """MADV_NOHUGEPAGE is set on some of the pages."""
    unseen: bool = False
    """Only their place was asked for: smaps has to be read before the first merge."""

    @property
    def region_flags(self) -> int:
        """As the enum region_flag has them."""
        return (
            self.dontfork
            | self.dontdump << 1
            | self.hugepage << 2
            | self.nohugepage << 3
            | self.unseen << 9
        )


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why the pages [start, end) cannot be merged, and what the user can do."""

    start: int
    end: int
    why: str
    way_out: str

    def error(self) -> ValueError:
        return ValueError(
            f"cannot register the memory at {self.start:#x}-{self.end:#x}: {self.why}; "
            f"{self.way_out}"
        )


def check_mappings(
    mappings: Sequence[smaps.Vma], start: int, end: int, *, page_bytes: int, privatize: bool = False
) -> MappingTraits:
    """As `judge_mappings`, with the refusal as an error.

    Raises:
        ValueError: the pages cannot be merged.
    """
    found = judge_mappings(mappings, start, end, page_bytes=page_bytes, privatize=privatize)
    if isinstance(found, Refusal):
        raise found.error()
    return found


def judge_mappings(
    mappings: Sequence[smaps.Vma], start: int, end: int, *, page_bytes: int, privatize: bool = False
) -> MappingTraits | Refusal:
    """Judge the pages [start, end) by `mappings`, all that overlap them, lowest first.

    A pure function of what smaps says, so that rare flags can be tried with invented text.
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
            return Refusal(max(start, vma.start), min(end, vma.end), *refused)
    if covered < end:
        return Refusal(
            covered,
            end,
            "not mapped there" if covered == start else "mapped only in part: a hole begins there",
            "the object behind this buffer describes memory that it does not have",
        )
    no_fork = {"dc" in vma.flags for vma in mappings}
    if len(no_fork) > 1:
        return Refusal(
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


def _why_not(vma: smaps.Vma, page_bytes: int) -> tuple[str, str] | None:
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
            f"it is {names[protection]} (mapped so, or by mprotect)",
            f"make it readable and writable first, or {_MAKE_A_COPY}",
        )
    return None if vma.shared else _why_not_private(vma)


def _why_not_private(vma: smaps.Vma) -> tuple[str, str] | None:
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


def _is_shared_anonymous(vma: smaps.Vma) -> bool:
    # The second form is shared anonymous memory that prctl(PR_SET_VMA_ANON_NAME) has named.
    return vma.path == _SHARED_ANONYMOUS or vma.path.startswith("[anon_shmem:")


def _why_not_shared(vma: smaps.Vma) -> tuple[str, str]:
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
