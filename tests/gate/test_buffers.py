"""The gate: which buffers are taken, which refused and why, and that it leaves no trace."""

import array
import ctypes
import datetime
import mmap
import os
import random
import sys

import numpy as np
import pytest

from helpers.gate import (
    LEN_BYTES,
    N_PAGES,
    admit,
    admit_all,
    refused,
    told_advice,
)
from helpers.kernels_view import descriptors, present_pages
from helpers.libc import libc, why_failed
from helpers.memory import PAGE, PRIVATE, private_memory
from ksmcore._kernel import smaps

# --- what is taken --------------------------------------------------------------------------------


def test_private_anonymous_mmap():
    area = private_memory(N_PAGES)
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
    assert admit(values).export.len_bytes == LEN_BYTES


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
        lambda: memoryview(private_memory(N_PAGES))[PAGE:],
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
    area = private_memory(N_PAGES)
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


def test_read_only_buffers_are_judged_by_their_mapping():
    frozen = np.zeros(LEN_BYTES, np.uint8)
    frozen.flags.writeable = False
    for buffer in (
        bytes(LEN_BYTES),
        memoryview(bytearray(LEN_BYTES)).toreadonly(),
        frozen,
        np.frombuffer(bytes(LEN_BYTES)),
    ):
        admission = admit(buffer)
        assert admission.export.len_bytes == LEN_BYTES
        assert admission.export.view.readonly
        admission.release()
    with mmap.mmap(-1, LEN_BYTES, flags=PRIVATE, prot=mmap.PROT_READ) as nobody_writes:
        text = refused(nobody_writes)
    assert "only readable" in text
    assert "ksmcore.copy" in text


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
    area = private_memory(N_PAGES)
    area.close()
    assert "closed" in refused(area)
    view = memoryview(bytearray(LEN_BYTES))
    view.release()
    assert "released" in refused(view)


# --- the hold on the buffer -----------------------------------------------------------------------


def test_mmap_is_held_until_release():
    area = private_memory(N_PAGES)
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
    area = private_memory(N_PAGES)
    admission = admit(area)
    del admission
    area.close()


def test_a_view_of_the_view_keeps_the_hold():
    area = private_memory(N_PAGES)
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
    area, values, shared = private_memory(N_PAGES), np.zeros(LEN_BYTES), mmap.mmap(-1, LEN_BYTES)
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
    private, shared = private_memory(N_PAGES), mmap.mmap(-1, LEN_BYTES)
    before = descriptors()
    for _ in range(5):
        admit(private).release()
        refused(shared)
    assert descriptors() == before
    shared.close()


# --- many at once ------------------------------------------------------------------------------


def test_many_buffers_cost_one_reading(monkeypatch):
    made = []
    snapshot = smaps.Snapshot
    monkeypatch.setattr(smaps, "Snapshot", lambda *args: made.append(args) or snapshot(*args))
    areas = [private_memory(N_PAGES) for _ in range(20)]
    arrays = [np.zeros(LEN_BYTES + 8 * n) for n in range(20)]
    admissions = admit_all([*areas, *arrays])
    assert len(made) == 1
    assert [admission.export.len_bytes for admission in admissions] == [
        memoryview(buffer).nbytes for buffer in [*areas, *arrays]
    ]
    assert len({admission.export.addr for admission in admissions}) == 40


@pytest.mark.parametrize("culprit", ["shared", "small", "nothing"])
def test_all_of_many_buffers_or_none(culprit):
    areas = [private_memory(N_PAGES) for _ in range(5)]
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
