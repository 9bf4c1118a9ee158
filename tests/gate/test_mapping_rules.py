"""The memory under a buffer: what is refused and why, and which flags a new mapping needs again."""

import ctypes
import fcntl
import mmap
import multiprocessing
import os
import platform
import struct
import tempfile

import numpy as np
import pytest

from helpers.gate import (
    LEN_BYTES,
    N_PAGES,
    PROT_NONE,
    READ_WRITE,
    Mapping,
    admit,
    refused,
    told_advice,
)
from helpers.libc import MAP_FAILED, libc, why_failed
from helpers.memory import PAGE, PRIVATE, private_memory
from ksmcore._gate import mapping_rules
from ksmcore._kernel import numa, smaps

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

libc.shmat.restype = ctypes.c_void_p


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
    assert not admit(private_memory(N_PAGES), privatize=True).traits.must_privatize


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
    libc.munmap(mapping.addr, LEN_BYTES)
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
    if addr == MAP_FAILED:
        pytest.skip(f"no huge page to be had here: {why_failed('mmap')}")
    try:
        buffer = (ctypes.c_char * area_bytes).from_address(addr)
        assert "hugetlb" in refused(buffer)
    finally:
        libc.munmap(addr, area_bytes)


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
