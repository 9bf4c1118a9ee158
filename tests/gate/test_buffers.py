"""The gate: what is taken, what is refused and why, and that it leaves no trace."""

import array
import ctypes
import datetime
import fcntl
import mmap
import multiprocessing
import os
import platform
import random
import struct
import sys
import tempfile
import warnings

import numpy as np
import pytest

from helpers.kernels_view import present_pages
from ksmcore._gate import buffers, mapping_rules, phase
from ksmcore._kernel import numa, smaps

PAGE = mmap.PAGESIZE
N_PAGES = 16
LEN_BYTES = N_PAGES * PAGE

PROT_NONE = 0
MAP_FIXED = 0x10
MAP_HUGETLB = 0x40000
MADV_WIPEONFORK = 18
MPOL_BIND = 2
UFFD_USER_MODE_ONLY = 1
UFFDIO_API = 3 << 30 | 24 << 16 | 0xAA << 8 | 0x3F
UFFDIO_REGISTER = 3 << 30 | 32 << 16 | 0xAA << 8 | 0x00
UFFDIO_REGISTER_MODE_MISSING = 1

MACHINE = platform.machine()
NR_USERFAULTFD = {"x86_64": 323, "aarch64": 282}.get(MACHINE)
NR_MBIND = {"x86_64": 237, "aarch64": 235}.get(MACHINE)

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
)
libc.shmat.restype = ctypes.c_void_p
for _name in ("munmap", "mprotect", "mlock", "munlock", "madvise"):
    getattr(libc, _name).argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE


def admit(buffer, **options):
    return admit_all([buffer], **options)[0]


def admit_all(given, *, page_bytes=PAGE, **options):
    """Both halves of the gate, as registration takes them."""
    held = []
    try:
        for buffer in given:
            held.append(buffers.Export(buffer, page_bytes))
    except BaseException:
        buffers.release_all(held)
        raise
    return buffers.admit(held, page_bytes=page_bytes, **options)


def refused(buffer, error=ValueError, **options):
    """Text of the error with which `buffer` is refused."""
    with pytest.raises(error) as caught:
        admit(buffer, **options)
    return str(caught.value)


def why_failed(call):
    return f"{call}: {os.strerror(ctypes.get_errno())}"


class Mapping:
    """Memory from mmap(2) itself, between two inaccessible pages so that no neighbour joins it."""

    def __init__(self, n_pages=N_PAGES, prot=READ_WRITE, flags=PRIVATE, fd=-1):
        self.len_bytes = n_pages * PAGE
        self.fence = libc.mmap(None, self.len_bytes + 2 * PAGE, PROT_NONE, PRIVATE, -1, 0)
        self.addr = libc.mmap(self.fence + PAGE, self.len_bytes, prot, flags | MAP_FIXED, fd, 0)
        if self.addr == ctypes.c_void_p(-1).value:
            reason = why_failed("mmap")
            self.close()
            pytest.skip(reason)
        self.buffer = (ctypes.c_char * self.len_bytes).from_address(self.addr)

    def call(self, name, argument=0, first=0, n_pages=None):
        """Call a libc function on a stretch of pages; skip the test where it is not allowed."""
        len_bytes = self.len_bytes - first * PAGE if n_pages is None else n_pages * PAGE
        if getattr(libc, name)(self.addr + first * PAGE, len_bytes, argument) != 0:
            pytest.skip(why_failed(name))

    def close(self):
        libc.munmap(self.fence, self.len_bytes + 2 * PAGE, 0)


@pytest.fixture
def mapped():
    """Makes `Mapping`s that are unmapped at the end of the test."""
    made = []

    def make(*args, **options):
        mapping = Mapping(*args, **options)
        made.append(mapping)
        return mapping

    yield make
    for mapping in made:
        mapping.close()


def private_mmap(len_bytes=LEN_BYTES):
    return mmap.mmap(-1, len_bytes, flags=PRIVATE)


def told_advice(admission):
    names = ("dontfork", "dontdump", "hugepage", "nohugepage")
    return {name for name in names if getattr(admission.traits, name)}


# --- what is taken --------------------------------------------------------------------------------


def test_private_anonymous_mmap():
    area = private_mmap()
    admission = admit(area)
    assert admission.export.addr == ctypes.addressof(
        ctypes.c_char.from_buffer(admission.export.view)
    )
    assert admission.export.phase == 0
    assert admission.export.n_pages == N_PAGES
    assert admission.export.len_bytes == LEN_BYTES == admission.export.view.nbytes
    assert not admission.traits.must_privatize
    assert told_advice(admission) == set()


BFLOAT_LIKE = np.dtype([("raw", "u2")])

ARRAYS = {
    "float64": np.zeros(LEN_BYTES // 8),
    "c-ordered": np.zeros((64, LEN_BYTES // 256), np.float32),
    "f-ordered": np.zeros((64, LEN_BYTES // 256), np.float32, order="F"),
    "three dimensions, f-ordered": np.zeros((8, 8, LEN_BYTES // 64), np.uint8, order="F"),
    "one long row": np.zeros((1, LEN_BYTES), np.uint8)[:, :],
    "bool": np.zeros(LEN_BYTES, bool),
    "complex": np.zeros(LEN_BYTES // 16, complex),
    "float16": np.zeros(LEN_BYTES // 2, np.float16),
    "longdouble": np.zeros(LEN_BYTES // 16, np.longdouble),
    "big-endian": np.zeros(LEN_BYTES // 4, ">i4"),
    "datetime64": np.zeros(LEN_BYTES // 8, "M8[us]"),
    "timedelta64": np.zeros(LEN_BYTES // 8, "m8[s]"),
    "bytes": np.zeros(LEN_BYTES // 7, "S7"),
    "str": np.zeros(LEN_BYTES // 20, "U5"),
    "void": np.zeros(LEN_BYTES // 5, "V5"),
    "structured": np.zeros(LEN_BYTES // 12, [("Object", "i4"), ("time", "M8[s]")]),
    "bfloat-like": np.zeros(LEN_BYTES // 2, BFLOAT_LIKE),
    "zero dimensions": np.zeros((), f"V{LEN_BYTES}"),
    "matrix": np.zeros((4, LEN_BYTES), np.uint8).view(np.matrix),
    "masked": np.ma.zeros(LEN_BYTES, np.uint8),
    "record array": np.zeros(LEN_BYTES // 8, [("x", "f8")]).view(np.recarray),
    "part of an array": np.zeros(3 * LEN_BYTES, np.uint8)[100 : 100 + LEN_BYTES],
    "rows of an array": np.zeros((30, LEN_BYTES), np.uint8)[3:7],
    "columns of an f-ordered array": np.zeros((LEN_BYTES, 30), np.uint8, order="F")[:, 3:7],
}


@pytest.mark.parametrize("name", ARRAYS)
def test_array(name):
    values = ARRAYS[name]
    admission = admit(values)
    first_byte = values.ctypes.data
    assert admission.export.len_bytes == values.nbytes
    assert admission.export.phase == first_byte % PAGE
    assert admission.export.addr % PAGE == 0
    assert 0 <= admission.export.addr - first_byte < PAGE
    left = first_byte + values.nbytes - (admission.export.addr + admission.export.n_pages * PAGE)
    assert 0 <= left < PAGE
    # A view of the very same bytes, not of a copy.
    octets = np.frombuffer(admission.export.view, np.uint8)
    octets[-1] = 7
    assert values.tobytes("A")[-1] == 7
    octets[-1] = 0
    del octets
    admission.release()


def test_array_of_a_foreign_type():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    values = np.zeros(LEN_BYTES // 2, ml_dtypes.bfloat16)
    assert admit(values).len_bytes == LEN_BYTES


@pytest.mark.parametrize(
    "make",
    [
        lambda: bytearray(LEN_BYTES),
        lambda: array.array("d", bytes(LEN_BYTES)),
        lambda: (ctypes.c_int * (LEN_BYTES // 4))(),
        lambda: ((ctypes.c_double * 4) * (LEN_BYTES // 32))(),
        lambda: memoryview(bytearray(LEN_BYTES)),
        lambda: memoryview(bytearray(2 * LEN_BYTES))[77:-1],
        lambda: memoryview(bytearray(LEN_BYTES)).cast("d", (4, LEN_BYTES // 32)),
        lambda: memoryview(np.zeros((LEN_BYTES // 64, 8), order="F")),
        lambda: memoryview(private_mmap())[PAGE:],
        lambda: memoryview(np.zeros(LEN_BYTES // 8, [("Oh", "f8")])),
    ],
    ids=[
        "bytearray",
        "array.array",
        "ctypes array",
        "nested ctypes array",
        "memoryview",
        "part of a memoryview",
        "memoryview with two dimensions",
        "f-ordered memoryview",
        "memoryview of an mmap",
        "field name with an O",
    ],
)
def test_other_buffers(make):
    buffer = make()
    admission = admit(buffer)
    assert admission.export.len_bytes == memoryview(buffer).nbytes
    assert admission.export.n_pages in (
        admission.export.len_bytes // PAGE,
        admission.export.len_bytes // PAGE - 1,
    )
    assert admission.export.addr % PAGE == 0
    admission.release()


@pytest.mark.parametrize(
    ("offset", "len_bytes", "first_page", "n_pages"),
    [
        (0, PAGE, 0, 1),
        (0, 2 * PAGE - 1, 0, 1),
        (1, 2 * PAGE - 1, 1, 1),
        (PAGE - 1, 3 * PAGE, 1, 2),
        (PAGE, 3 * PAGE + 1, 1, 3),
        (16, 4 * PAGE - 16, 1, 3),
    ],
)
def test_only_whole_pages_are_admitted(mapped, offset, len_bytes, first_page, n_pages):
    mapping = mapped()
    admission = admit(memoryview(mapping.buffer)[offset : offset + len_bytes])
    assert admission.export.addr == mapping.addr + first_page * PAGE
    assert admission.export.n_pages == n_pages
    assert admission.export.phase == offset % PAGE
    assert admission.export.len_bytes == len_bytes


def test_whole_pages_of_random_slices(mapped):
    mapping = mapped()
    numbers = random.Random(1)
    everything = memoryview(mapping.buffer)
    for _ in range(200):
        first, last = sorted(numbers.sample(range(LEN_BYTES + 1), 2))
        inside = [n for n in range(N_PAGES) if first <= n * PAGE and (n + 1) * PAGE <= last]
        if not inside:
            assert "no whole page" in refused(everything[first:last])
            continue
        with_slice = admit(everything[first:last])
        assert with_slice.export.addr == mapping.addr + inside[0] * PAGE
        assert with_slice.export.n_pages == len(inside)


def test_memory_of_several_mappings(mapped):
    mapping = mapped()
    mapping.call("madvise", mmap.MADV_NOHUGEPAGE, 4, 4)
    assert len(smaps.vmas_in(mapping.addr, mapping.addr + LEN_BYTES)) == 3
    assert admit(mapping.buffer).export.n_pages == N_PAGES


def test_the_page_size_is_the_callers():
    # As seen by a system of larger pages: alignment follows; the mappings do not match it.
    area = private_mmap()
    with pytest.raises(ValueError, match=f"pages have .* instead of {4 * PAGE:,}"):
        admit(area, page_bytes=4 * PAGE)


def test_heap_memory_is_private_anonymous():
    # Small blocks come from the heap, whose mapping has a name in brackets.
    blocks = [bytearray(5 * PAGE) for _ in range(50)]
    for block in blocks:
        admit(block).release()


def test_memory_with_a_name(mapped):
    mapping = mapped()
    name = ctypes.create_string_buffer(b"cache")
    pr_set_vma = 0x53564D41
    args = (0, ctypes.c_ulong(mapping.addr), ctypes.c_ulong(LEN_BYTES), name)
    if libc.prctl(pr_set_vma, *args) != 0:
        pytest.skip(why_failed("prctl(PR_SET_VMA)"))
    assert smaps.vmas_in(mapping.addr, mapping.addr + PAGE)[0].path == "[anon:cache]"
    assert admit(mapping.buffer).export.n_pages == N_PAGES


def test_private_mapping_of_dev_zero_is_anonymous(mapped):
    fd = os.open("/dev/zero", os.O_RDWR)
    try:
        mapping = mapped(flags=mmap.MAP_PRIVATE, fd=fd)
    finally:
        os.close(fd)
    admission = admit(mapping.buffer)
    assert admission.export.n_pages == N_PAGES
    assert not admission.traits.must_privatize


# --- flags that a new mapping needs again ---------------------------------------------------------


@pytest.mark.parametrize(
    ("advice", "field"),
    [
        (mmap.MADV_DONTFORK, "dontfork"),
        (mmap.MADV_DONTDUMP, "dontdump"),
        (mmap.MADV_HUGEPAGE, "hugepage"),
        (mmap.MADV_NOHUGEPAGE, "nohugepage"),
    ],
)
def test_memory_advice_is_told(mapped, advice, field):
    mapping = mapped()
    mapping.call("madvise", advice)
    admission = admit(mapping.buffer)
    assert told_advice(admission) == {field}


def test_advice_outside_the_whole_pages_is_not_told(mapped):
    mapping = mapped()
    mapping.call("madvise", mmap.MADV_DONTDUMP, 0, 1)
    mapping.call("madvise", mmap.MADV_DONTFORK, N_PAGES - 1, 1)
    admission = admit(memoryview(mapping.buffer)[5:-5])
    assert admission.export.n_pages == N_PAGES - 2
    assert not admission.traits.dontdump
    assert not admission.traits.dontfork


def test_dump_advice_on_a_part_counts_for_all(mapped):
    mapping = mapped()
    mapping.call("madvise", mmap.MADV_DONTDUMP, 4, 1)
    assert admit(mapping.buffer).traits.dontdump


def test_fork_advice_on_a_part_is_refused(mapped):
    mapping = mapped()
    mapping.call("madvise", mmap.MADV_DONTFORK, 4, 1)
    assert "MADV_DONTFORK" in refused(mapping.buffer)


# --- refused: the buffer --------------------------------------------------------------------------


@pytest.mark.parametrize("value", [None, 7, "text", [1, 2], {}, object(), datetime.date.min])
def test_not_a_buffer(value):
    text = refused(value, TypeError)
    assert type(value).__name__ in text
    assert "mmap" in text


def test_arrays_of_objects():
    assert "dtype object" in refused(np.zeros(LEN_BYTES, object), TypeError)
    structured = np.zeros(LEN_BYTES, [("x", "i8"), ("nested", [("o", object)])])
    assert "objects" in refused(structured, TypeError)


def test_variable_strings_hold_references():
    if not hasattr(getattr(np, "dtypes", None), "StringDType"):
        pytest.skip("this NumPy has no StringDType")
    assert "references" in refused(np.zeros(LEN_BYTES, np.dtypes.StringDType()), TypeError)


def test_memoryviews_of_objects():
    assert "'O'" in refused(memoryview(np.zeros(LEN_BYTES, object)), TypeError)
    structured = memoryview(np.zeros(LEN_BYTES, [("x", "i8"), ("y", object)]))
    assert "objects" in refused(structured, TypeError)
    assert "objects" in refused((ctypes.py_object * LEN_BYTES)(), TypeError)


def test_read_only_buffers():
    frozen = np.zeros(LEN_BYTES, np.uint8)
    frozen.flags.writeable = False
    file_view = mmap.mmap(-1, LEN_BYTES, prot=mmap.PROT_READ)
    for buffer in (
        bytes(LEN_BYTES),
        memoryview(bytearray(LEN_BYTES)).toreadonly(),
        frozen,
        np.frombuffer(bytes(LEN_BYTES)),
        file_view,
    ):
        text = refused(buffer)
        assert "read-only" in text
        assert "ksmcore.copy" in text
    file_view.close()


def test_non_contiguous_buffers():
    square = np.zeros((512, 512))
    for buffer in (
        square[:, :-1],
        square[::2],
        square[::-1],
        np.zeros((64, 64, 64)).transpose(1, 0, 2),
        memoryview(bytearray(2 * LEN_BYTES))[::2],
        memoryview(square)[::2],
    ):
        text = refused(buffer)
        assert "not contiguous" in text
        assert "ksmcore.copy" in text


@pytest.mark.parametrize(
    "buffer",
    [
        bytearray(),
        bytearray(PAGE - 1),
        np.zeros(0),
        np.zeros((0, 5), "M8[s]"),
        np.zeros(5, "V0"),
        np.zeros((3, 0), order="F"),
        np.array(1.5),
        (ctypes.c_int * 0)(),
        memoryview(bytearray(100))[50:50],
    ],
    ids=lambda buffer: type(buffer).__name__,
)
def test_too_small_for_a_page(buffer):
    text = refused(buffer)
    assert "no whole page" in text
    assert f"page of {PAGE:,} bytes" in text


def test_the_message_gives_size_phase_and_page_size(mapped):
    mapping = mapped()
    text = refused(memoryview(mapping.buffer)[100 : 2 * PAGE - 1])
    assert f"{2 * PAGE - 101:,} bytes" in text
    assert "begins 100 bytes into a page" in text
    assert f"{PAGE:,} bytes" in text


def test_closed_and_released_buffers():
    area = private_mmap()
    area.close()
    assert "closed" in refused(area)
    view = memoryview(bytearray(LEN_BYTES))
    view.release()
    assert "released" in refused(view)


# --- refused: the memory --------------------------------------------------------------------------


def test_the_default_mmap_is_shared():
    with mmap.mmap(-1, LEN_BYTES) as area:
        text = refused(area)
    assert "flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS" in text
    assert "ksmcore.empty(...)" in text
    assert "register(buf, privatize=True)" in text


def test_shared_anonymous_memory_can_be_made_private():
    area = mmap.mmap(-1, LEN_BYTES)
    admission = admit(area, privatize=True)
    assert admission.traits.must_privatize
    assert admission.export.n_pages == N_PAGES


def test_shared_anonymous_memory_with_a_name(mapped):
    mapping = mapped(flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
    name = ctypes.create_string_buffer(b"cache")
    args = (0, ctypes.c_ulong(mapping.addr), ctypes.c_ulong(LEN_BYTES), name)
    if libc.prctl(0x53564D41, *args) != 0:
        pytest.skip(why_failed("prctl(PR_SET_VMA)"))
    assert smaps.vmas_in(mapping.addr, mapping.addr + PAGE)[0].path == "[anon_shmem:cache]"
    assert "privatize=True" in refused(mapping.buffer)
    assert admit(mapping.buffer, privatize=True).must_privatize


def test_privatize_does_no_harm_to_private_memory():
    assert not admit(private_mmap(), privatize=True).traits.must_privatize


@pytest.mark.parametrize("privatize", [False, True])
def test_shared_file(tmp_path, privatize):
    with open(tmp_path / "data", "w+b") as file:
        file.truncate(LEN_BYTES)
        with mmap.mmap(file.fileno(), LEN_BYTES) as area:
            text = refused(area, privatize=privatize)
    assert "shared mapping of the file" in text
    assert os.fspath(tmp_path / "data") in text
    assert "ksmcore.copy" in text


@pytest.mark.parametrize("privatize", [False, True])
def test_private_file(tmp_path, privatize):
    with open(tmp_path / "data", "w+b") as file:
        file.truncate(LEN_BYTES)
        with mmap.mmap(file.fileno(), LEN_BYTES, access=mmap.ACCESS_COPY) as area:
            text = refused(area, privatize=privatize)
    assert "private mapping of the file" in text
    assert os.fspath(tmp_path / "data") in text


@pytest.mark.parametrize("mode", ["r+", "c"])
def test_numpy_memmap(tmp_path, mode):
    np.zeros(LEN_BYTES, np.uint8).tofile(tmp_path / "data")
    values = np.memmap(tmp_path / "data", np.uint8, mode)
    assert "the file" in refused(values)


def test_a_file_name_that_no_terminal_can_print(tmp_path):
    path = os.fsencode(tmp_path) + b"/\xff"
    with open(path, "w+b") as file:
        file.truncate(LEN_BYTES)
        with mmap.mmap(file.fileno(), LEN_BYTES) as area:
            refused(area).encode("utf-8")


@pytest.mark.parametrize("privatize", [False, True])
@pytest.mark.parametrize("flags", [mmap.MAP_SHARED, mmap.MAP_PRIVATE])
def test_memfd(flags, privatize):
    fd = os.memfd_create("frames")
    try:
        os.ftruncate(fd, LEN_BYTES)
        with mmap.mmap(fd, LEN_BYTES, flags=flags) as area:
            text = refused(area, privatize=privatize)
    finally:
        os.close(fd)
    assert "/memfd:frames" in text
    assert ("shared mapping of the memory file" in text) == (flags == mmap.MAP_SHARED)


def test_posix_shared_memory():
    if not os.access("/dev/shm", os.W_OK):
        pytest.skip("no /dev/shm to write to")
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        file.truncate(LEN_BYTES)
        with mmap.mmap(file.fileno(), LEN_BYTES) as area:
            assert "POSIX shared memory" in refused(area, privatize=True)


@pytest.mark.parametrize("privatize", [False, True])
def test_multiprocessing_array(privatize):
    values = multiprocessing.RawArray("b", LEN_BYTES)
    assert "shared mapping of" in refused(values, privatize=privatize)


def test_system_v_shared_memory():
    ipc_private, ipc_rmid = 0, 0
    segment = libc.shmget(ipc_private, ctypes.c_size_t(LEN_BYTES), 0o600)
    if segment < 0:
        pytest.skip(why_failed("shmget"))
    addr = libc.shmat(segment, None, 0)
    libc.shmctl(segment, ipc_rmid, None)
    buffer = (ctypes.c_char * LEN_BYTES).from_address(addr)
    text = refused(buffer, privatize=True)
    libc.shmdt(ctypes.c_void_p(addr))
    assert "System V shared memory" in text


def test_pages_of_another_store(mapped):
    fd = os.memfd_create("ksmcore-store")
    try:
        os.ftruncate(fd, LEN_BYTES)
        mapping = mapped(flags=mmap.MAP_PRIVATE, fd=fd)
    finally:
        os.close(fd)
    text = refused(mapping.buffer)
    assert (
        "still mapped to a ksmcore store of another engine or of the parent process before fork"
        in text
    )


def test_memory_that_is_not_mapped():
    mapping = Mapping()
    libc.munmap(mapping.addr, LEN_BYTES, 0)
    try:
        assert "not mapped there" in refused(mapping.buffer)
    finally:
        mapping.close()


@pytest.mark.parametrize(("first", "n_pages"), [(0, 1), (7, 2), (N_PAGES - 1, 1)])
def test_memory_with_a_hole(mapped, first, n_pages):
    mapping = mapped()
    mapping.call("munmap", 0, first, n_pages)
    text = refused(mapping.buffer)
    assert "not mapped" in text or "a hole begins there" in text
    assert f"{mapping.addr + first * PAGE:#x}" in text


@pytest.mark.parametrize(
    ("prot", "text"),
    [(mmap.PROT_READ, "only readable"), (PROT_NONE, "not accessible")],
)
@pytest.mark.parametrize("n_pages", [1, N_PAGES - 3])
def test_protection_against_writing(mapped, prot, text, n_pages):
    mapping = mapped()
    mapping.call("mprotect", prot, 3, n_pages)
    told = refused(mapping.buffer)
    assert text in told
    first = mapping.addr + 3 * PAGE
    assert f"{first:#x}-{first + n_pages * PAGE:#x}" in told


def test_executable_memory(mapped):
    mapping = mapped()
    mapping.call("mprotect", READ_WRITE | mmap.PROT_EXEC, 0, 1)
    assert "executable" in refused(mapping.buffer)


def test_locked_memory(mapped):
    mapping = mapped()
    mapping.call("mlock", 0, 2, 1)
    assert "locked" in refused(mapping.buffer)
    mapping.call("munlock")
    assert admit(mapping.buffer).export.n_pages == N_PAGES


def test_memory_that_is_wiped_on_fork(mapped):
    mapping = mapped()
    mapping.call("madvise", MADV_WIPEONFORK, 2, 1)
    assert "MADV_WIPEONFORK" in refused(mapping.buffer)


def test_huge_pages_of_hugetlb():
    area_bytes = 2 << 20
    addr = libc.mmap(None, area_bytes, READ_WRITE, PRIVATE | MAP_HUGETLB, -1, 0)
    if addr == ctypes.c_void_p(-1).value:
        pytest.skip(f"no huge page to be had here: {why_failed('mmap')}")
    try:
        buffer = (ctypes.c_char * area_bytes).from_address(addr)
        assert "hugetlb" in refused(buffer)
    finally:
        libc.munmap(addr, area_bytes, 0)


def test_memory_that_a_userfaultfd_watches(mapped):
    if NR_USERFAULTFD is None:
        pytest.skip(f"the number of userfaultfd is not known for {MACHINE}")
    mapping = mapped()
    fd = libc.syscall(NR_USERFAULTFD, os.O_CLOEXEC | UFFD_USER_MODE_ONLY)
    if fd < 0:
        pytest.skip(why_failed("userfaultfd"))
    try:
        fcntl.ioctl(fd, UFFDIO_API, bytearray(struct.pack("=3Q", 0xAA, 0, 0)))
        request = struct.pack(
            "=4Q", mapping.addr + 4 * PAGE, 2 * PAGE, UFFDIO_REGISTER_MODE_MISSING, 0
        )
        fcntl.ioctl(fd, UFFDIO_REGISTER, bytearray(request))
        assert "userfaultfd" in refused(mapping.buffer)
        assert admit(memoryview(mapping.buffer)[: 4 * PAGE]).export.n_pages == 4
    finally:
        os.close(fd)
    assert admit(mapping.buffer).export.n_pages == N_PAGES


def test_memory_with_a_numa_policy(mapped):
    if NR_MBIND is None:
        pytest.skip(f"the number of mbind is not known for {MACHINE}")
    mapping = mapped()
    nodes = ctypes.c_ulong(1)
    result = libc.syscall(
        NR_MBIND,
        ctypes.c_void_p(mapping.addr + PAGE),
        ctypes.c_ulong(PAGE),
        MPOL_BIND,
        ctypes.byref(nodes),
        ctypes.c_ulong(64),
        0,
    )
    if result != 0:
        pytest.skip(why_failed("mbind"))
    assert "NUMA policy 'bind'" in refused(mapping.buffer)
    first, *others = smaps.vmas_in(mapping.addr, mapping.addr + LEN_BYTES)
    assert numa.own_numa_policy([first]) is None
    assert numa.own_numa_policy([first, *others]) == (others[0], "bind")
    if os.path.exists("/proc/self/numa_maps"):
        with open("/proc/self/numa_maps", encoding="utf-8") as lines:
            found = numa.parse_numa_maps(lines, [mapping.addr + PAGE])
        assert found == (mapping.addr + PAGE, "bind:0")


def test_memory_with_a_protection_key(mapped):
    mapping = mapped()
    if not hasattr(libc, "pkey_alloc"):
        pytest.skip("this C library has no pkey_alloc")
    key = libc.pkey_alloc(0, 0)
    if key < 0:
        pytest.skip(why_failed("pkey_alloc"))
    args = ctypes.c_void_p(mapping.addr), ctypes.c_size_t(PAGE), READ_WRITE
    assert libc.pkey_mprotect(*args, key) == 0
    text = refused(mapping.buffer)
    assert libc.pkey_mprotect(*args, 0) == 0
    libc.pkey_free(key)
    assert f"protection key {key}" in text


# --- refused: what can be had only as text --------------------------------------------------------


def judge(head="10000-20000 rw-p 00000000 00:00 0", flags="rd wr mr mw me ac", extra="", **options):
    """Judge the pages 0x10000-0x20000 by the text of one smaps record."""
    text = f"{head}\n{extra}KernelPageSize: 4 kB\nVmFlags: {flags} \n"
    found = list(smaps.parse_smaps(text.splitlines()))
    return mapping_rules.check_mappings(found, 0x10000, 0x20000, page_bytes=4096, **options)


def test_plain_text_is_taken():
    assert judge() == mapping_rules.MappingTraits()
    assert judge(flags="") == mapping_rules.MappingTraits()


@pytest.mark.parametrize(
    ("flag", "text"),
    [
        ("io", "VM_IO"),
        ("pf", "VM_PFNMAP"),
        ("mm", "VM_MIXEDMAP"),
        ("ht", "hugetlb"),
        ("lo", "locked"),
        ("wf", "MADV_WIPEONFORK"),
        ("dp", "MAP_DROPPABLE"),
        ("sl", "mseal"),
        ("mt", "PROT_MTE"),
        ("gd", "a stack"),
        ("ss", "shadow stack"),
        ("um", "userfaultfd"),
        ("uw", "userfaultfd"),
        ("ui", "userfaultfd"),
    ],
)
@pytest.mark.parametrize("privatize", [False, True])
def test_flags_that_forbid(flag, text, privatize):
    with pytest.raises(ValueError, match=text) as caught:
        judge(flags=f"rd wr mr mw me {flag} ac", privatize=privatize)
    assert "0x10000-0x20000" in str(caught.value)
    assert "; " in str(caught.value)
    # Shared memory is no way around.
    with pytest.raises(ValueError, match=text):
        judge(
            "10000-20000 rw-s 00000000 00:01 1234 /dev/zero (deleted)",
            flags=f"rd wr sh {flag}",
            privatize=True,
        )


@pytest.mark.parametrize("flag", ["nr", "ac", "sd", "mg", "hg", "nh", "dd", "dc", "rr", "sr", "zz"])
def test_flags_that_do_no_harm(flag):
    judge(flags=f"rd wr mr mw me {flag}")


@pytest.mark.parametrize(
    ("head", "text"),
    [
        ("10000-20000 rwxp 00000000 00:00 0", "executable"),
        ("10000-20000 -w-p 00000000 00:00 0", "only writable"),
        ("10000-20000 r--p 00000000 00:00 0", "only readable"),
        ("10000-20000 rw-p 00000000 00:00 0 [vvar]", r"kernel's own mapping \[vvar\]"),
        ("10000-20000 rw-p 00000000 00:00 0 [stack]", r"kernel's own mapping \[stack\]"),
        ("10000-20000 rw-p 00000000 00:0e 11 anon_inode:[perf]", "private mapping of the file"),
        ("10000-20000 rw-s 00000000 00:0e 11 anon_inode:[perf]", "shared mapping of the file"),
        ("10000-20000 rw-s 00000000 00:01 1 /dev/zero (deleted)", "privatize"),
        ("11000-20000 rw-p 00000000 00:00 0", "not mapped there"),
        ("10000-1f000 rw-p 00000000 00:00 0", "a hole begins there"),
        ("20000-30000 rw-p 00000000 00:00 0", "not mapped there"),
    ],
)
def test_heads_that_forbid(head, text):
    with pytest.raises(ValueError, match=text):
        judge(head)


@pytest.mark.parametrize("path", ["", "[heap]", "[anon:arena 1]"])
def test_names_of_anonymous_memory(path):
    judge(f"8000-40000 rw-p 00000000 00:00 0 {path}")


def test_protection_key_as_text():
    with pytest.raises(ValueError, match="protection key 5"):
        judge(extra="ProtectionKey: 5\n")
    judge(extra="ProtectionKey: 0\n")


def test_huge_kernel_pages_without_a_flag():
    text = "10000-20000 rw-p 00000000 00:00 0\nKernelPageSize: 2048 kB\n"
    found = list(smaps.parse_smaps(text.splitlines()))
    with pytest.raises(ValueError, match=r"2,097,152 bytes instead of 4,096 \(hugetlb\)"):
        mapping_rules.check_mappings(found, 0x10000, 0x20000, page_bytes=4096)


def test_no_mapping_at_all():
    with pytest.raises(ValueError, match="not mapped there"):
        mapping_rules.check_mappings([], 0x10000, 0x20000, page_bytes=4096)


def test_a_mapping_that_grew_while_it_was_read():
    text = "8000-18000 rw-p 0 0:0 0\n8000-30000 rw-p 0 0:0 0\n"
    found = list(smaps.parse_smaps(text.splitlines()))
    mapping_rules.check_mappings(found, 0x10000, 0x20000, page_bytes=mmap.PAGESIZE)


def test_a_gap_between_two_mappings():
    text = "8000-14000 rw-p 0 0:0 0\n18000-30000 rw-p 0 0:0 0\n"
    found = list(smaps.parse_smaps(text.splitlines()))
    with pytest.raises(ValueError, match="0x14000-0x20000: mapped only in part"):
        mapping_rules.check_mappings(found, 0x10000, 0x20000, page_bytes=mmap.PAGESIZE)


# --- the hold on the buffer -----------------------------------------------------------------------


def test_mmap_is_held_until_release():
    area = private_mmap()
    admission = admit(area)
    with pytest.raises(BufferError):
        area.close()
    admission.release()
    admission.release()
    area.close()


def test_bytearray_is_held_until_release():
    buffer = bytearray(LEN_BYTES)
    admission = admit(buffer)
    with pytest.raises(BufferError):
        buffer.append(1)
    admission.release()
    buffer.append(1)


def test_array_is_held_until_release():
    values = np.zeros(LEN_BYTES, np.uint8)
    admission = admit(values)
    with pytest.raises(ValueError, match="resize"):
        values.resize(2 * LEN_BYTES)
    admission.release()
    values.resize(2 * LEN_BYTES)


def test_memory_of_an_array_outlives_the_array():
    values = np.full(LEN_BYTES, 9, np.uint8)
    admission = admit(values)
    del values
    assert admission.export.view[LEN_BYTES // 2] == 9
    admission.release()


def test_the_callers_memoryview_may_go():
    buffer = bytearray(LEN_BYTES)
    view = memoryview(buffer)
    admission = admit(view)
    view.release()
    assert admission.export.view.nbytes == LEN_BYTES
    with pytest.raises(BufferError):
        buffer.append(1)
    admission.release()
    buffer.append(1)


def test_an_admission_that_is_dropped_lets_go():
    area = private_mmap()
    admission = admit(area)
    del admission
    area.close()


def test_a_view_of_the_view_keeps_the_hold():
    area = private_mmap()
    admission = admit(area)
    view = np.frombuffer(admission.export.view, np.uint8)
    admission.release()
    with pytest.raises(BufferError):
        area.close()
    del view
    area.close()


# The error is kept, with the frames in its traceback, while the buffer is tried.


def test_a_refused_mmap_can_be_closed():
    area = mmap.mmap(-1, LEN_BYTES)
    with pytest.raises(ValueError, match="MAP_SHARED") as kept:
        admit(area)
    area.close()
    assert kept.value.__traceback__ is not None


def test_a_refused_bytearray_can_grow(monkeypatch):
    small = bytearray(10)
    with pytest.raises(ValueError, match="no whole page"):
        admit(small)
    small.append(1)

    large = bytearray(LEN_BYTES)
    monkeypatch.setattr(smaps, "Snapshot", missing_smaps)
    with pytest.raises(OSError, match="smaps") as kept:
        admit(large)
    large.append(1)
    assert kept.value.__traceback__ is not None


def missing_smaps(*args):
    raise FileNotFoundError(2, "No such file or directory", "/proc/self/smaps")


def test_a_refused_memoryview_leaves_its_buffer_free():
    for part in (slice(None, None, 2), slice(0, 10)):
        buffer = bytearray(4 * LEN_BYTES)
        view = memoryview(buffer)[part]
        with pytest.raises(ValueError, match=r"contiguous|whole page") as kept:
            admit(view)
        view.release()
        buffer.append(1)
        assert kept.value.__traceback__ is not None
    objects = (ctypes.py_object * 4)()
    with pytest.raises(TypeError):
        admit(objects)
    ctypes.resize(objects, ctypes.sizeof(objects) * 2)


def test_a_refused_array_can_be_resized():
    def try_to_admit(values, **options):
        # A function of its own: a kept traceback would hold the array itself, as in any caller.
        try:
            admit(values, **options)
        except (TypeError, ValueError, OSError) as error:
            return type(error)

    values = np.zeros(100, np.uint8)
    assert try_to_admit(values) is ValueError
    values.resize(200)
    values = np.zeros(LEN_BYTES, np.uint8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(smaps, "Snapshot", missing_smaps)
        assert try_to_admit(values) is FileNotFoundError
    values.resize(2 * LEN_BYTES)
    values = np.zeros(100, object)
    assert try_to_admit(values) is TypeError
    values.resize(200)


def test_references_are_given_back():
    area, values, shared = private_mmap(), np.zeros(LEN_BYTES), mmap.mmap(-1, LEN_BYTES)
    before = [sys.getrefcount(thing) for thing in (area, values, shared)]
    for _ in range(100):
        admit(area).release()
        admit(values).release()
        with pytest.raises(ValueError, match="MAP_SHARED"):
            admit(shared)
    assert [sys.getrefcount(thing) for thing in (area, values, shared)] == before
    shared.close()


# --- no trace -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mmap", "shared mmap", "ndarray", "f-ordered", "ctypes"])
def test_nothing_is_faulted_in(kind):
    n_pages = 256
    flags = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS if kind == "shared mmap" else PRIVATE
    area = mmap.mmap(-1, n_pages * PAGE, flags=flags)
    area.madvise(mmap.MADV_NOHUGEPAGE)
    for n in (3, 77, 200):
        area[n * PAGE] = 1
    octets = np.frombuffer(area, np.uint8)
    buffer = {
        "ndarray": octets.view("M8[s]"),
        "f-ordered": octets.reshape((n_pages, PAGE), order="F"),
        "ctypes": (ctypes.c_char * (n_pages * PAGE)).from_buffer(area),
    }.get(kind, area)
    addr = octets.ctypes.data
    before = present_pages(addr, n_pages)
    assert [n for n, present in enumerate(before) if present] == [3, 77, 200]
    admission = admit(buffer, privatize=True)
    repr(admission)
    assert admission != admit(buffer, privatize=True)
    assert present_pages(addr, n_pages) == before
    admission.release()
    if kind == "shared mmap":
        refused(buffer)
    assert present_pages(addr, n_pages) == before


def test_no_mapping_is_made_or_split(mapped):
    mapping = mapped()
    admit(mapping.buffer).release()
    before = smaps.vmas_in(mapping.addr, mapping.addr + LEN_BYTES)
    admissions = [admit(mapping.buffer) for _ in range(20)]
    assert smaps.vmas_in(mapping.addr, mapping.addr + LEN_BYTES) == before
    assert len(admissions) == 20


def test_no_descriptor_is_left_open(mapped):
    private, shared = private_mmap(), mmap.mmap(-1, LEN_BYTES)
    before = sorted(os.listdir("/proc/self/fd"))
    for _ in range(5):
        admit(private).release()
        refused(shared)
    assert sorted(os.listdir("/proc/self/fd")) == before
    shared.close()


# --- many at once ------------------------------------------------------------------------------


def test_many_buffers_cost_one_reading(monkeypatch):
    made = []
    snapshot = smaps.Snapshot
    monkeypatch.setattr(smaps, "Snapshot", lambda *args: made.append(args) or snapshot(*args))
    areas = [private_mmap() for _ in range(20)]
    arrays = [np.zeros(LEN_BYTES + 8 * n) for n in range(20)]
    admissions = admit_all([*areas, *arrays])
    assert len(made) == 1
    assert [admission.export.len_bytes for admission in admissions] == [
        memoryview(buffer).nbytes for buffer in [*areas, *arrays]
    ]
    assert len({admission.export.addr for admission in admissions}) == 40


@pytest.mark.parametrize("culprit", ["shared", "small", "nothing"])
def test_all_of_many_buffers_or_none(culprit):
    areas = [private_mmap() for _ in range(5)]
    shared = mmap.mmap(-1, LEN_BYTES)
    bad = {"shared": shared, "small": bytearray(1), "nothing": None}[culprit]
    with pytest.raises((TypeError, ValueError)) as kept:
        admit_all([*areas[:3], bad, *areas[3:]])
    for area in [*areas, shared]:
        area.close()
    assert kept.value.__traceback__ is not None


def test_no_buffers_are_no_work(monkeypatch):
    monkeypatch.setattr(smaps, "Snapshot", missing_smaps)
    assert admit_all([]) == []


# --- phase ----------------------------------------------------------------------------------------


def test_phase_advice_names_both_phases_and_the_way_out():
    text = phase.phase_advice(8_000_000, 16, 1856)
    assert "8,000,000 bytes" in text
    assert "begins 16 bytes into a page" in text
    assert "1856 bytes" in text
    assert "ksmcore.empty" in text
    assert "ksmcore.rows(" in text


def test_phase_warning_is_a_user_warning():
    assert issubclass(phase.PhaseWarning, UserWarning)
    with pytest.warns(phase.PhaseWarning, match="share pages only"):
        warnings.warn(phase.phase_advice(1, 2, 3), phase.PhaseWarning, stacklevel=1)
