"""Stand-ins for the networks that encode pairs, and the images they are given."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor


class FakeEncoders:
    """Latents are 8 x 8 means of the pixels, embeddings a function of the prompt's hash."""

    kind, identity = "sdxl", "fake"
    channels, factor = 4, 8

    def __init__(self) -> None:
        self.calls: list[int] = []

    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        self.calls.append(len(pixels))
        assert pixels.min() >= -1
        assert pixels.max() <= 1
        mean = torch.nn.functional.avg_pool2d(pixels, 8)
        mean = torch.cat([mean, mean.mean(1, keepdim=True)], dim=1)
        return mean, mean.abs() + 0.01

    def encode_prompts(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        seeds = [int.from_bytes(hashlib.sha256(p.encode()).digest()[:4], "little") for p in prompts]
        states = torch.stack([torch.randn(3, 8, generator=torch.Generator().manual_seed(s)) for s in seeds])
        return states, states.mean(1)

    def truncated(self, prompts: Sequence[str]) -> int:
        return sum(len(p) > 200 for p in prompts)


def png(value: int, size: tuple[int, int] = (40, 32)) -> bytes:
    """A picture whose left half is dark and whose right half is ``value``."""
    array = np.zeros((size[1], size[0], 3), np.uint8)
    array[:, size[0] // 2 :] = value
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()
