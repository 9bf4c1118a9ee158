"""Mappings by single questions and by the text of maps: both tell what smaps tells."""

import ctypes
import errno
import mmap

import pytest

from ksmcore._kernel import mappings, smaps
from ksmcore._kernel.mappings import Mappings
from ksmcore._kernel.syscalls import page_bytes


@pytest.fixture(params=[None, errno.ENOTTY, errno.EPERM, errno.ENOENT], ids=lambda code: str(code))
def there(request, monkeypatch):
    """Asked one by one; or read, as the question is refused by the kernel or by a filter."""
    if request.param is not None:

        def refuse(*_):
            raise OSError(request.param, "refused")

        monkeypatch.setattr(mappings.fcntl, "ioctl", refuse)
    return Mappings()


def test_all_mappings_are_those_of_smaps(there, tmp_path):
    (tmp_path / "a name (odd)").write_bytes(bytes(page_bytes()))
    with open(tmp_path / "a name (odd)", "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ)
    expected = [
        (
            vma.start,
            vma.end,
            *(vma.readable, vma.writable, vma.executable, vma.shared),
            *(vma.offset, vma.inode, vma.path, vma.page_bytes),
        )
        for vma in smaps.vmas_in(0, 1 << 47)
    ]
    found = [
        (
            one.start,
            one.end,
            *(letter in one.permissions for letter in "rwxs"),
            *(one.offset, one.inode, one.path, one.page_bytes),
        )
        for one in there.overlapping(0, 1 << 47)
    ]
    # What this test itself allocates meanwhile changes a few.
    assert len(set(expected) & set(found)) >= len(expected) - 8
    assert any(one[-2].endswith("a name (odd)") for one in found)
    mapped.close()


def test_a_range_has_what_overlaps_it(there):
    memory = mmap.mmap(-1, 8 * page_bytes(), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    addr = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    found = there.overlapping(addr + page_bytes(), addr + 2 * page_bytes())
    assert len(found) == 1
    assert found[0].start <= addr
    assert found[0].end >= addr + 8 * page_bytes()
    assert found[0].permissions == "rw-p"
