"""ksmcore._kernel.maps reads of smaps what the rules for registration read of it."""

import os

import pytest

from ksmcore._gate import mapping_rules
from ksmcore._kernel import smaps
from ksmcore._testing.maps import traits

KEPT = {"dc": 1, "dd": 2, "hg": 4, "nh": 8, "sr": 32, "rr": 64, "mg": 128, "lo": 256}
HARMLESS = ["rd", "wr", "mr", "mw", "me", "ac", "nr", "sd", "zz"]


def told(flags, key=0, extra=""):
    """Of the second of three mappings, written to a file as the kernel does."""
    record = (
        "{start}-{end} rw-p 00000000 00:00 0 {name}\nSize: 4 kB\nKernelPageSize: 4 kB\n"
        "ProtectionKey: {key}\n{extra}VmFlags: {flags} \n"
    )
    text = "".join(
        record.format(start=start, end=end, name="/a file\\012", flags=f, key=k, extra=extra)
        for start, end, f, k in (
            ("1000", "2000", "rd wr wf um", 3),
            ("2000", "5000", flags, key),
            ("9000", "a000", "rd wr", 0),
        )
    )
    fd = os.memfd_create("smaps")
    try:
        os.write(fd, text.encode())
        os.lseek(fd, 0, os.SEEK_SET)
        before, one, after = traits(fd, 1 << 63)
    finally:
        os.close(fd)
    assert before == (0x1000, 0x2000, 3 << 12, True, True)
    assert after == (0x9000, 0xA000, 0, False, False)
    assert one[:2] == (0x2000, 0x5000)
    return one[2:]


@pytest.mark.parametrize("code", [code for code, _, _ in mapping_rules._FORBIDDEN_FLAGS])
def test_what_registration_refuses_is_barred(code):
    assert told(f"rd wr mr {code} ac") == (KEPT.get(code, 0), True, False)
    assert told(code) == (KEPT.get(code, 0), True, False)


@pytest.mark.parametrize("code", sorted(mapping_rules._USERFAULTFD_FLAGS))
def test_what_a_userfaultfd_watches_is_told(code):
    assert told(f"rd wr {code}") == (0, False, True)


@pytest.mark.parametrize("code", KEPT.keys() - {"lo"})
def test_what_a_new_mapping_can_be_given_is_kept(code):
    assert told(f"rd {code} ac") == (KEPT[code], False, False)


def test_several_at_once():
    assert told("rd wr dc dd nh uw", key=5) == (1 | 2 | 8 | 5 << 12, False, True)


@pytest.mark.parametrize("code", HARMLESS)
def test_other_flags_say_nothing(code):
    assert told(code) == (0, False, False)


def test_a_record_longer_than_what_is_read_at_once():
    assert told("rd dd", extra="Quantum: " + "7" * 40_000 + "\n") == (2, False, False)


def test_this_process():
    fd = os.open("/proc/self/smaps", os.O_RDONLY)
    try:
        found = traits(fd, 1 << 63)
    finally:
        os.close(fd)
    by_python = {(vma.start, vma.end) for vma in smaps.Snapshot().vmas_in(0, 1 << 63)}
    assert len(found) > 20
    assert len(by_python & {one[:2] for one in found}) > 0.9 * len(found)
