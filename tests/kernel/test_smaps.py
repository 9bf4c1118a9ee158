"""ksmcore._kernel.smaps: the kernel's files about mappings, read here and from invented text."""

import ctypes
import mmap
import os

import pytest

from helpers.libc import libc
from helpers.memory import PAGE, private_memory
from ksmcore._kernel import files, procfs, smaps

PROT_NONE = 0

NEW_KERNEL = """\
7f27fc237000-7f27fc337000 rw-p 00000000 00:00 0\x20
Size:               1024 kB
KernelPageSize:        4 kB
MMUPageSize:           4 kB
Rss:                 512 kB
Pss:                 256 kB
Pss_Dirty:             0 kB
Anonymous:           500 kB
Swap:                 12 kB
SwapPss:               0 kB
Locked:                8 kB
THPeligible:           0
ProtectionKey:         3
VmFlags: rd wr mr mw me ac lo dc\x20
7f27fc337000-7f27fc339000 r-xs 00002000 fe:00 260386                     /usr/lib/a b (deleted)
Size:                  8 kB
KernelPageSize:     2048 kB
VmFlags: rd ex sh mr ht\x20
"""

# Linux 2.6.32 prints neither VmFlags nor Anonymous.
OLD_KERNEL = """\
00400000-00452000 rw-p 00000000 08:02 173521      /usr/bin/dbus-daemon
Size:                328 kB
Rss:                  16 kB
"""


def lines_of(text: str) -> list[str]:
    return text.splitlines(keepends=True)


# --- the text of smaps ----------------------------------------------------------------------------


def test_every_field_of_a_record_is_read():
    first, second = smaps.parse_smaps(lines_of(NEW_KERNEL))
    assert first == smaps.Vma(
        start=0x7F27FC237000,
        end=0x7F27FC337000,
        readable=True,
        writable=True,
        executable=False,
        shared=False,
        offset=0,
        inode=0,
        path="",
        flags=frozenset(["rd", "wr", "mr", "mw", "me", "ac", "lo", "dc"]),
        page_bytes=4096,
        protection_key=3,
        rss=512 << 10,
        pss=256 << 10,
        anonymous=500 << 10,
        swap=12 << 10,
        locked=8 << 10,
    )
    assert (second.readable, second.writable, second.executable) == (True, False, True)
    assert second.shared
    assert (second.offset, second.inode) == (0x2000, 260386)
    assert second.path == "/usr/lib/a b (deleted)"
    assert second.page_bytes == 2 << 20


def test_fields_that_an_old_kernel_does_not_print_are_neutral():
    (vma,) = smaps.parse_smaps(lines_of(OLD_KERNEL))
    assert vma.path == "/usr/bin/dbus-daemon"
    assert vma.rss == 16 << 10
    assert vma.flags == frozenset()
    assert vma.page_bytes == PAGE
    assert (vma.protection_key, vma.pss, vma.anonymous, vma.swap, vma.locked) == (0, 0, 0, 0, 0)


def test_lines_may_come_without_newlines():
    assert list(smaps.parse_smaps(NEW_KERNEL.splitlines())) == list(
        smaps.parse_smaps(lines_of(NEW_KERNEL))
    )


def test_unknown_lines_are_passed_over():
    text = NEW_KERNEL.replace("Swap: ", "Quantum:  7 qB\nNonsense\nSwap: ", 1)
    assert list(smaps.parse_smaps(lines_of(text))) == list(smaps.parse_smaps(lines_of(NEW_KERNEL)))


def test_no_text_holds_no_mapping():
    assert list(smaps.parse_smaps([])) == []


def test_text_that_is_not_smaps_is_refused():
    with pytest.raises(ValueError, match="not the text of an smaps file"):
        list(smaps.parse_smaps(["Name:\tpython\n"]))


# --- this process's mappings ----------------------------------------------------------------------


def test_mappings_are_split_where_the_protection_differs(three_mappings):
    addr = three_mappings
    found = smaps.vmas_in(addr, addr + 12 * PAGE)
    assert [vma.writable for vma in found] == [True, False, True]
    assert found[0].start <= addr
    assert (found[1].start, found[1].end) == (addr + 4 * PAGE, addr + 8 * PAGE)
    assert found[2].end >= addr + 12 * PAGE
    assert all(vma.readable and not vma.shared and vma.inode == 0 for vma in found)
    assert all({"rd", "mr", "mw"} <= vma.flags for vma in found)


@pytest.mark.parametrize(
    ("first", "last", "expected"),
    [(0, 4, [True]), (4, 8, [False]), (3, 5, [True, False]), (5, 7, [False]), (8, 9, [True])],
)
def test_only_overlapping_mappings_are_given(three_mappings, first, last, expected):
    addr = three_mappings
    found = smaps.vmas_in(addr + first * PAGE, addr + last * PAGE)
    assert [vma.writable for vma in found] == expected


def test_nothing_is_mapped_at_the_first_page():
    assert smaps.vmas_in(0, PAGE) == []


def test_an_empty_range_has_no_mapping(three_mappings):
    assert smaps.Snapshot().vmas_in(three_mappings + 4 * PAGE, three_mappings + 4 * PAGE) == []


def test_sizes_follow_what_is_touched():
    with private_memory(16) as area:
        addr = ctypes.addressof(ctypes.c_char.from_buffer(area))
        before = sum(vma.anonymous for vma in smaps.vmas_in(addr, addr + 16 * PAGE))
        area.madvise(mmap.MADV_NOHUGEPAGE)
        area[: 4 * PAGE] = b"x" * (4 * PAGE)
        (vma,) = smaps.vmas_in(addr, addr + 16 * PAGE)
        assert "nh" in vma.flags
        # The neighbour that the mapping was merged with, if any, is no longer a part of it.
        assert vma.anonymous == vma.rss == 4 * PAGE or vma.anonymous > before


def test_a_snapshot_of_everything_agrees_with_the_file():
    with open("/proc/self/maps", encoding="utf-8") as lines:
        names = [line.split(maxsplit=5)[5].strip() for line in lines if line.count(" ") > 5]
    found = smaps.Snapshot().vmas_in(0, 1 << 64)
    assert [vma.start for vma in found] == sorted(vma.start for vma in found)
    assert {"[stack]", "[heap]"} & set(names) <= {vma.path for vma in found}


def test_a_snapshot_finds_each_mapping_from_its_own_pages():
    snapshot = smaps.Snapshot()
    everything = snapshot.vmas_in(0, 1 << 64)
    assert len(everything) > 10
    for vma in everything:
        assert snapshot.vmas_in(vma.start, vma.end) == [vma]
        assert snapshot.vmas_in(vma.end - 1, vma.end) == [vma]


@pytest.mark.parametrize("read_bytes", [1, 7, 100, 250, 1000, 1 << 20])
def test_pieces_of_the_file_may_end_anywhere(tmp_path, monkeypatch, read_bytes):
    record = NEW_KERNEL[: NEW_KERNEL.index("7f27fc337000-7f27fc339000")]
    text = "".join(
        record.replace("7f27fc237000-7f27fc337000", f"{n << 12:08x}-{(n + 1) << 12:08x}")
        for n in range(1, 40)
    )
    file = tmp_path / "smaps"
    file.write_text(text)
    monkeypatch.setattr(smaps, "_SMAPS_READ_BYTES", read_bytes)
    chunks = list(smaps._chunks_of(os.fspath(file)))
    assert b"".join(chunk for _, chunk in chunks) == text.encode()
    for first, chunk in chunks:
        assert chunk.startswith(f"{first:08x}-".encode())


def test_reading_stops_behind_the_range(monkeypatch):
    asked = []

    def chunks(path):
        for n in range(10):
            asked.append(n)
            yield n << 12, f"{n << 12:08x}-{(n + 1) << 12:08x} rw-p 00000000 00:00 0 \n".encode()

    monkeypatch.setattr(smaps, "_chunks_of", chunks)
    found = smaps.vmas_in(3 << 12, 5 << 12)
    assert [vma.start >> 12 for vma in found] == [3, 4]
    assert asked == [0, 1, 2, 3, 4, 5]


def test_a_file_name_that_is_not_utf8(tmp_path):
    path = os.fsencode(tmp_path) + b"/\xff \nx"
    with open(path, "w+b") as file:
        file.write(b"x" * PAGE)
        file.flush()
        with mmap.mmap(file.fileno(), PAGE) as area:
            addr = ctypes.addressof(ctypes.c_char.from_buffer(area))
            (vma,) = smaps.vmas_in(addr, addr + PAGE)
    assert os.fsencode(vma.path).endswith(b"/\xff \\012x")


def test_a_missing_smaps_raises_oserror(monkeypatch):
    def refuse(path):
        raise FileNotFoundError(2, "No such file or directory", path)

    monkeypatch.setattr(files, "open_read", refuse)
    with pytest.raises(FileNotFoundError, match="smaps"):
        smaps.vmas_in(0, PAGE)


# --- counts and sums ------------------------------------------------------------------------------


def test_count_maps_follows_the_mappings(three_mappings):
    before = smaps.count_maps()
    for n in (0, 2, 9):
        addr = ctypes.c_void_p(three_mappings + n * PAGE)
        assert libc.mprotect(addr, ctypes.c_size_t(PAGE), PROT_NONE) == 0
    during = smaps.count_maps()
    whole = ctypes.c_void_p(three_mappings), ctypes.c_size_t(12 * PAGE)
    assert libc.mprotect(*whole, mmap.PROT_READ | mmap.PROT_WRITE) == 0
    # Page 0, page 2 and what lies between them and behind; page 9 in the middle of the last third.
    assert during == before + 6
    assert smaps.count_maps() < during


def test_sums_leave_out_what_is_no_sum(tmp_path):
    (tmp_path / "smaps_rollup").write_text(NEW_KERNEL * 2)
    assert smaps.smaps_rollup(tmp_path) == {
        "Rss": 1024 << 10,
        "Pss": 512 << 10,
        "Pss_Dirty": 0,
        "Anonymous": 1000 << 10,
        "Swap": 24 << 10,
        "SwapPss": 0,
        "Locked": 16 << 10,
    }


def test_rollup_follows_what_is_touched():
    n = 4096
    with private_memory(n) as area:
        before = smaps.smaps_rollup()
        for offset in range(0, n * PAGE, PAGE):
            area[offset] = 1
        after = smaps.smaps_rollup()
    # Without files: the share of a library grows when another process that has it mapped ends.
    for totals in (before, after):
        totals["Pss"] -= totals.get("Pss_File", 0)
    for key in ("Rss", "Pss", "Anonymous"):
        assert after[key] - before[key] == pytest.approx(n * PAGE, rel=0.1)


def test_rollup_is_summed_up_where_the_kernel_has_none(monkeypatch):
    read = procfs.read

    def without_rollup(path):
        if path == "/proc/self/smaps_rollup":
            raise FileNotFoundError(2, "No such file or directory", path)
        return read(path)

    expected = smaps.smaps_rollup()
    monkeypatch.setattr(procfs, "read", without_rollup)
    summed = smaps.smaps_rollup()
    assert set(summed) >= {"Rss", "Pss", "Anonymous"}
    assert summed["Rss"] == pytest.approx(expected["Rss"], rel=0.2)


def test_mappings_of_a_path_are_found_among_many():
    fds = [os.memfd_create(name) for name in ("ksmcore-test-a", "ksmcore-test-b", "other")]
    maps = []
    try:
        for fd in fds:
            os.ftruncate(fd, 8 * PAGE)
            maps += [mmap.mmap(fd, 8 * PAGE) for _ in range(40)]
        snapshot = smaps.Snapshot()
        for path, n in (("/memfd:ksmcore-test-", 80), ("/memfd:ksmcore-test-b", 40), ("none", 0)):
            found = snapshot.vmas_of(path)
            assert sum(vma.end - vma.start for vma in found) == n * 8 * PAGE
            assert found == [
                vma for vma in snapshot.vmas_in(0, 1 << 64) if vma.path.startswith(path)
            ]
    finally:
        for one in maps:
            one.close()
        for fd in fds:
            os.close(fd)
