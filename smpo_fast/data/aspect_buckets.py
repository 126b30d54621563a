"""From a decoded image of any shape to the pixels that are encoded: aspect-ratio bucket, resizing, cropping.

Sizes are (height, width) in px.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from smpo_fast.data.images import MAX_ASPECT

if TYPE_CHECKING:
    from PIL.Image import Image

Size = tuple[int, int]
BILINEAR = 2  # PIL.Image.Resampling.BILINEAR


class Frame(NamedTuple):
    """Original size of an image and what was cropped of it, for SDXL's conditioning; crops in px after resizing."""

    height: int  # of the original, upright
    width: int
    top: int
    left: int
    right: int  # what is cropped on the left of the mirrored image


def buckets(resolution: int) -> tuple[Size, ...]:
    """The shapes of ``data.buckets``, ascending: no more pixels than resolution^2, at most 4 : 1, sides on a grid.

    The grid is resolution/8, but at most 64 and a multiple of 8. At 1024 px these are SDXL's own buckets except two
    pairs of them (arXiv 2307.01952, appendix I).
    """
    grid = min(64, max(8, resolution // 64 * 8))
    sides = range(-(-resolution // 2 // grid) * grid, 2 * resolution + 1, grid)
    pairs = [(a, resolution**2 // a // grid * grid) for a in sides if a]
    return tuple(sorted({shape for a, b in pairs if b for shape in ((a, b), (b, a))}))


def choose(shapes: Sequence[Size], sizes: Sequence[Size]) -> Size:
    """The bucket for all images of a pair: the nearest to the geometric mean of their aspect ratios.

    The mean, because the bucket is stored in the cache, while a run's settings decide which image wins: the mean
    depends neither on the order of the two images nor on the labels.
    """
    wanted = sum(math.log(width / height) for height, width in sizes) / len(sizes)
    return min(shapes, key=lambda s: (round(abs(math.log(s[1] / s[0]) - wanted), 9), -s[0] * s[1], s))


def fit(image: Image, size: Size) -> tuple[np.ndarray, Frame]:
    """The image resized (bilinear) until it just covers ``size``, then its centre: uint8 [H, W, 3].

    For a square the same numbers as torchvision's Resize and CenterCrop, which the released script uses. An image
    longer than MAX_ASPECT : 1 is cropped to its middle before resizing, which bounds the memory.
    """
    height, width = size
    cut_left, cut_top, middle = _middle(image)
    if middle.width * height > middle.height * width:  # relatively wider than ``size``
        scaled = (height * middle.width // middle.height, height)
    else:
        scaled = (width, width * middle.height // middle.width)
    left, top = round((scaled[0] - width) / 2), round((scaled[1] - height) / 2)
    resized = middle if scaled == middle.size else middle.resize(scaled, BILINEAR)
    pixels = np.array(resized.crop((left, top, left + width, top + height)))
    left += round(cut_left * scaled[0] / middle.width)
    top += round(cut_top * scaled[1] / middle.height)
    whole = round(image.width * scaled[0] / middle.width)
    return pixels, Frame(image.height, image.width, top, left, max(0, whole - left - width))


def _middle(image: Image) -> tuple[int, int, Image]:
    """The middle MAX_ASPECT : 1 of an image, and what is cropped on its left and at its top."""
    width, height = image.size
    longest = MAX_ASPECT * min(width, height)
    if max(width, height) <= longest:
        return 0, 0, image
    left, top = max(0, (width - longest) // 2), max(0, (height - longest) // 2)
    return (left, top, image.crop((left, top, left + min(width, longest), top + min(height, longest))))
