"""What a reward does not see: how colourful and varied the images are, and how many of them failed.

A gain in reward that is bought by saturated colours or by images that are all alike shows here.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
from PIL import Image

_SIDE = 32  # px; for the distance of images
MEASURES = ("saturation", "contrast", "failed")
DIVERSITY = "diversity"


def measure(image: Image.Image) -> dict[str, float]:
    """Of one image: mean saturation (HSV) and standard deviation of the luma, both from 0 to 1; 1 if it failed.

    A failed image has one colour only: networks that produce NaN, and safety checkers, make such.
    """
    pixels = np.asarray(image.convert("RGB"), np.float64) / 255
    largest, smallest = pixels.max(axis=2), pixels.min(axis=2)
    saturation = np.divide(largest - smallest, largest, out=np.zeros_like(largest), where=largest > 0)
    luma = pixels @ np.array([0.299, 0.587, 0.114])
    one_colour = bool((pixels == pixels[0, 0]).all())
    return {"saturation": float(saturation.mean()), "contrast": float(luma.std()), "failed": float(one_colour)}


def diversity(images: Sequence[Image.Image]) -> float:
    """Mean distance of the images of a prompt: the root mean square difference of each two, at 32 x 32 px, 0 to 1."""
    small = [
        np.asarray(i.convert("RGB").resize((_SIDE, _SIDE), Image.Resampling.BOX), np.float64) / 255 for i in images
    ]
    return float(np.mean([np.sqrt(((a - b) ** 2).mean()) for a, b in combinations(small, 2)]))
