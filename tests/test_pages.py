"""_pages: published vectors, a plain Python lookup3, and agreement of all kernels."""

import ctypes
import random
import struct
import sys

import mmh3
import pytest

from ksmcore import _pages

MASK = 0xFFFFFFFF
KERNELS = ["avx512", "avx2", "generic", "scalar"]


def rotl(x, k):
    return (x << k | x >> (32 - k)) & MASK


def lookup3(data, initval=0):
    """hashlittle, written for reading rather than for speed."""
    a = b = c = (0xDEADBEEF + len(data) + initval) & MASK
    if not data:
        return c
    while len(data) > 12:
        x, y, z = struct.unpack("<III", data[:12])
        a, b, c = (a + x) & MASK, (b + y) & MASK, (c + z) & MASK
        for k in (4, 6, 8, 16, 19, 4):
            a = ((a - c) & MASK) ^ rotl(c, k)
            c = (c + b) & MASK
            a, b, c = b, c, a
        data = data[12:]
    x, y, z = struct.unpack("<III", data.ljust(12, b"\0"))
    a, b, c = (a + x) & MASK, (b + y) & MASK, (c + z) & MASK
    for k in (14, 11, 25, 16, 4, 14, 24):
        c = ((c ^ b) - rotl(b, k)) & MASK
        a, b, c = b, c, a
    # Seven turns of (a, b, c) leave what was computed last in b.
    return b


def require(kernel):
    if kernel not in _pages.kernels():
        pytest.skip(f"this machine has no kernel {kernel!r}, only {_pages.kernels()}")


def pages_of(data, page_bytes):
    return [data[at : at + page_bytes] for at in range(0, len(data), page_bytes)]


def at_offset(data, offset):
    """A view of a copy of `data` that starts `offset` bytes after a 64-byte boundary."""
    raw = bytearray(len(data) + 128)
    address = ctypes.addressof(ctypes.c_char.from_buffer(raw))
    start = -address % 64 + offset
    raw[start : start + len(data)] = data
    return memoryview(raw)[start : start + len(data)]


@pytest.mark.parametrize(
    ("data", "initval", "digest"),
    [
        (b"", 0, 0xDEADBEEF),
        (b"", 0xDEADBEEF, 0xBD5B7DDE),
        (b"Four score and seven years ago", 0, 0x17770551),
        (b"Four score and seven years ago", 1, 0xCD628161),
    ],
)
def test_published_vectors(data, initval, digest):
    assert lookup3(data, initval) == digest
    assert _pages.jhash(data, initval) == digest


@pytest.mark.parametrize("initval", [0, 1, 17, MASK])
def test_jhash_every_short_length(initval):
    data = random.Random(initval).randbytes(101)
    for n in range(101):
        assert _pages.jhash(data[:n], initval) == lookup3(data[:n], initval), n


def test_kernels_are_named_best_first():
    names = _pages.kernels()
    assert names[-1] == "scalar"
    assert [name for name in KERNELS if name in names] == list(names)
    assert ("generic" in names) == (sys.byteorder == "little")


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel_every_short_length(kernel):
    require(kernel)
    rng = random.Random(1)
    for n in range(1, 160):
        data = rng.randbytes(9 * n)
        expected = [lookup3(page, 17) for page in pages_of(data, n)]
        assert _pages.jhash_many(data, n, kernel) == expected, n


@pytest.mark.parametrize("kernel", [*KERNELS, "auto"])
@pytest.mark.parametrize("page_bytes", [4096, 16384, 65536])
def test_kernel_whole_pages(kernel, page_bytes):
    if kernel != "auto":
        require(kernel)
    data = random.Random(page_bytes).randbytes(11 * page_bytes)
    expected = [_pages.jhash(page, 17) for page in pages_of(data, page_bytes)]
    assert _pages.jhash_many(data, page_bytes, kernel) == expected
    assert expected[0] == lookup3(data[:page_bytes], 17)


@pytest.mark.parametrize("kernel", [*KERNELS, "auto"])
@pytest.mark.parametrize("n_pages", range(21))
def test_kernel_every_number_of_pages(kernel, n_pages):
    if kernel != "auto":
        require(kernel)
    data = random.Random(n_pages).randbytes(n_pages * 4096)
    expected = [_pages.jhash(page, 17) for page in pages_of(data, 4096)]
    assert _pages.jhash_many(data, 4096, kernel) == expected


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel_at_any_alignment(kernel):
    require(kernel)
    data = random.Random(2).randbytes(9 * 4096)
    expected = [_pages.jhash(page, 17) for page in pages_of(data, 4096)]
    for offset in [*range(17), 31, 33, 63]:
        assert _pages.jhash_many(at_offset(data, offset), 4096, kernel) == expected, offset


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel_page_of_lane(kernel):
    """A change in one page changes the digest of that page only."""
    require(kernel)
    blank = bytes(16 * 4096)
    before = _pages.jhash_many(blank, 4096, kernel)
    for page in range(16):
        for byte in (0, 1, 47, 48, 2048, 4079, 4080, 4095):
            changed = bytearray(blank)
            changed[page * 4096 + byte] = 1
            after = _pages.jhash_many(changed, 4096, kernel)
            assert [i for i in range(16) if after[i] != before[i]] == [page], byte


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel_more_pages_than_one_span(kernel):
    require(kernel)
    data = random.Random(3).randbytes(64 * 9001)
    expected = [_pages.jhash(page, 17) for page in pages_of(data, 64)]
    assert _pages.jhash_many(data, 64, kernel) == expected


def test_absent_kernel_names_those_there():
    with pytest.raises(ValueError, match="scalar"):
        _pages.jhash_many(b"", 4096, "avx1024")


def test_checksum_jhash():
    data = random.Random(4).randbytes(13 * 4096)
    assert _pages.checksum_many(data, 4096) == _pages.jhash_many(data, 4096, "scalar")


@pytest.mark.parametrize("page_bytes", [1, 15, 16, 17, 100, 4096, 65536])
def test_checksum_mmh3(page_bytes):
    data = random.Random(page_bytes).randbytes(9 * page_bytes)
    expected = [
        int.from_bytes(mmh3.mmh3_x64_128_digest(page, 0)[:4], "little")
        for page in pages_of(data, page_bytes)
    ]
    assert _pages.checksum_many(data, page_bytes, "mmh3") == expected


def test_unknown_checksum_names_the_valid_ones():
    with pytest.raises(ValueError, match=r"'jhash', 'mmh3'"):
        _pages.checksum_many(b"", 4096, "md5")


@pytest.mark.parametrize("function", [_pages.jhash_many, _pages.checksum_many])
def test_pages_must_be_whole(function):
    with pytest.raises(ValueError, match="whole number"):
        function(bytes(4097), 4096)
    for page_bytes in (0, -4096):
        with pytest.raises(ValueError, match="positive"):
            function(bytes(4096), page_bytes)


def test_wrong_arguments():
    with pytest.raises(TypeError):
        _pages.jhash("text")
    with pytest.raises(TypeError):
        _pages.is_zero(3)
    with pytest.raises(TypeError):
        _pages.compare(b"", None)
    with pytest.raises(ValueError, match="contiguous"):
        _pages.jhash(memoryview(bytes(10))[::2])
    for initval in (-1, 1 << 32):
        with pytest.raises(ValueError, match="initval"):
            _pages.jhash(b"", initval)


def test_buffers_are_given_back():
    data = bytearray(4096)
    _pages.jhash(data)
    _pages.jhash_many(data, 64)
    _pages.is_zero(data)
    _pages.compare(data, data)
    with pytest.raises(ValueError, match="lengths"):
        _pages.compare(data, b"")
    data.append(0)  # raises BufferError while an export is held


@pytest.mark.parametrize("len_bytes", [0, 1, 7, 63, 64, 65, 127, 128, 1000, 4096])
def test_is_zero_finds_every_single_byte(len_bytes):
    data = bytearray(len_bytes)
    assert _pages.is_zero(data)
    for value in (1, 0x80):
        for i in range(len_bytes):
            data[i] = value
            assert not _pages.is_zero(data), i
            data[i] = 0
    assert _pages.is_zero(data)


def test_is_zero_looks_at_its_bytes_only():
    data = bytearray(b"\xff" * 300)
    data[100:170] = bytes(70)
    assert _pages.is_zero(memoryview(data)[100:170])
    assert not _pages.is_zero(memoryview(data)[99:170])
    assert not _pages.is_zero(memoryview(data)[100:171])


def test_compare_is_the_order_of_bytes():
    rng = random.Random(5)
    for _ in range(2000):
        n = rng.choice([0, 1, 8, 33, 64])
        a = bytes(rng.choice([0, 1, 127, 128, 255]) for _ in range(n))
        b = bytearray(a)
        if n and rng.random() < 0.7:
            b[rng.randrange(n)] = rng.randrange(256)
        assert _pages.compare(a, b) == (a > b) - (a < b)
        assert _pages.compare(b, a) == (a < b) - (a > b)


def test_compare_sees_every_byte():
    base = random.Random(6).randbytes(4096)
    for i in range(4096):
        changed = bytearray(base)
        changed[i] ^= 0x80
        assert _pages.compare(base, changed) == (1 if base[i] > changed[i] else -1)
