"""Policies of mappings, asked of the kernel and read from invented text."""

import errno
import os
from dataclasses import replace

import pytest

from helpers.memory import PAGE
from ksmcore._kernel import numa, procfs, smaps

NUMA_MAPS = """\
00400000 default file=/usr/bin/python3 mapped=3 N0=3
7f0000000000 default anon=4 dirty=4 N0=4 kernelpagesize_kB=4
7f0000010000 bind:0 anon=4 dirty=4 N0=4 kernelpagesize_kB=4
7f0000020000 prefer (many):0 anon=4 dirty=4 N0=4 kernelpagesize_kB=4
"""


@pytest.mark.parametrize(
    ("starts", "expected"),
    [
        ([], None),
        ([0x7F0000000000], None),
        ([0x7F0000010000], (0x7F0000010000, "bind:0")),
        ([0x7F0000020000], (0x7F0000020000, "prefer")),
        ([0x7F0000020000, 0x7F0000000000, 0x7F0000010000], (0x7F0000010000, "bind:0")),
        ([0x1000], None),
    ],
)
def test_policy_in_the_text_of_numa_maps(starts, expected):
    assert numa.parse_numa_maps(NUMA_MAPS.splitlines(), starts) == expected


def test_the_policy_of_the_process_is_not_one_of_a_mapping():
    text = NUMA_MAPS.replace(" default ", " interleave:0-1 ")
    assert numa.parse_numa_maps(text.splitlines(), [0x7F0000000000]) is None
    assert numa.parse_numa_maps(text.splitlines(), [0x7F0000010000]) == (0x7F0000010000, "bind:0")


def test_plain_memory_has_no_policy(three_mappings):
    mappings = smaps.vmas_in(three_mappings, three_mappings + 12 * PAGE)
    assert numa.own_numa_policy(mappings) is None


# What the filter of a container may have been told to answer.
ANSWERS = (errno.EPERM, errno.ENOSYS, errno.EACCES, errno.EINVAL, errno.EIO, errno.ENOMEM)


@pytest.mark.parametrize("answer", ANSWERS, ids=errno.errorcode.get)
def test_numa_maps_answers_where_the_call_fails(three_mappings, monkeypatch, answer):
    def fail(addr):
        raise OSError(answer, os.strerror(answer))

    addr = three_mappings
    (middle,) = smaps.vmas_in(addr + 4 * PAGE, addr + 8 * PAGE)
    monkeypatch.setattr(numa, "_policy_at", fail)
    if os.path.exists("/proc/self/numa_maps"):
        assert numa.own_numa_policy([middle]) is None
    text = f"00400000 default\n{middle.start:x} interleave:0 anon=1\n"
    monkeypatch.setattr(procfs, "read", lambda path: text)
    assert numa.own_numa_policy([middle]) == (middle, "interleave:0")


def test_a_kernel_without_numa_has_no_policy(three_mappings, monkeypatch):
    (middle,) = smaps.vmas_in(three_mappings + 4 * PAGE, three_mappings + 8 * PAGE)

    def unknown(addr):
        raise OSError(38, "get_mempolicy: Function not implemented")

    def missing(*args, **kwargs):
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(numa, "_policy_at", unknown)
    monkeypatch.setattr(procfs, "read", missing)
    assert numa.own_numa_policy([middle]) is None


def test_a_file_that_cannot_be_read_now_is_told(three_mappings, monkeypatch):
    (middle,) = smaps.vmas_in(three_mappings + 4 * PAGE, three_mappings + 8 * PAGE)

    def fail(*args, **kwargs):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(numa, "_policy_at", fail)
    monkeypatch.setattr(procfs, "read", fail)
    with pytest.raises(OSError, match="Too many open files"):
        numa.own_numa_policy([middle])


def test_an_address_without_mapping_has_no_policy(three_mappings):
    vma, *_ = smaps.vmas_in(three_mappings, three_mappings + PAGE)
    assert numa.own_numa_policy([replace(vma, start=0, end=PAGE)]) is None
