"""Encoded images for the tests."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image


def encoded(array: np.ndarray, kind: str = "PNG", **options: object) -> bytes:
    """uint8 [H, W] or [H, W, C] (uint16 [H, W] for 16-bit grey) in an image format."""
    file = io.BytesIO()
    Image.fromarray(array).save(file, kind, **options)
    return file.getvalue()


def noise(seed: int = 0, size: tuple[int, int] = (24, 16), kind: str = "PNG") -> bytes:
    """Noise of width, height ``size``."""
    return encoded(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8), kind)
