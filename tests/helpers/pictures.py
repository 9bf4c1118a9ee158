"""Pictures as they are drawn, pixel by pixel."""

import io

import numpy as np
import pytest

from ksmcore._show.page_maps import rgb


def pixels(png: bytes) -> np.ndarray:
    """The colours of a picture, row by row; the test is skipped without Pillow."""
    image = pytest.importorskip("PIL.Image")
    return np.array(image.open(io.BytesIO(png)).convert("RGB"))


def n_pixels(drawn: np.ndarray, colour: str) -> int:
    """How many pixels have exactly this colour."""
    return int((drawn == rgb(colour)).all(axis=2).sum())
