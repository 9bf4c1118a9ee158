"""Sizes as text, and back."""

import numpy as np
import pytest

from ksmcore.sizes import counted, human_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        (0, 0),
        (4096, 4096),
        (1e6, 1_000_000),
        (np.int64(5), 5),
        ("17", 17),
        ("50 MB", 50_000_000),
        ("1.5GiB", 3 << 29),
        (" 2 kib ", 2048),
        ("3 b", 3),
        ("64k", 65536),
        ("2T", 2 << 40),
    ],
)
def test_sizes(text, n_bytes):
    assert parse_bytes(text) == n_bytes


@pytest.mark.parametrize(
    "text",
    [-1, -1.0, True, 1.5, float("inf"), float("nan"), None, "", "MB", "1 XB", "-3 MB", "1 2 MB"],
)
def test_wrong_sizes(text):
    with pytest.raises(ValueError, match="a size is"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (-1536, "-1.5 KiB"),
        (5 << 20, "5.0 MiB"),
        (3 << 30, "3.0 GiB"),
        (7 << 40, "7.0 TiB"),
        (2048 << 40, "2048.0 TiB"),
    ],
)
def test_human_bytes(size, text):
    assert human_bytes(size) == text


def test_counted():
    assert counted(1, "page") == "1 page"
    assert counted(2000, "page") == "2,000 pages"
    assert counted(0, "pass", "es") == "0 passes"
