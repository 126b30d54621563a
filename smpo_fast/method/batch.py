"""The data of a training step: pairs of latents with their prompts and weights.

Shapes: B pairs, 2 images per pair (winner, then loser), C H W latent, S D prompt tokens, E pooled prompt.
The two images of a pair are adjacent in memory, so the first n pairs are also the first 2n images.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """The UNet's inputs other than latent and timestep, one row per pair."""

    prompt: Tensor  # [B, S, D]
    pooled: Tensor | None = None  # [B, E], SDXL
    time_ids: Tensor | None = None  # [B, 6], SDXL; or [B, 2, 6] where the two images of a pair differ

    def take(self, rows: slice) -> Conditioning:
        """Some of the rows."""
        return self.map(lambda t: t[rows])

    def map(self, change: Callable[[Tensor], Tensor]) -> Conditioning:
        """A copy with ``change`` applied to every tensor, of any shape."""
        pooled, time_ids = (None if x is None else change(x) for x in (self.pooled, self.time_ids))
        return Conditioning(change(self.prompt), pooled, time_ids)


@dataclass(frozen=True)
class Pairs:
    """Some preference pairs, ready for a step."""

    ids: tuple[int, ...]  # row of each pair in its table, for reports
    latents: Tensor  # [B, 2, C, H, W] float32, scaled as the UNet expects them
    cond: Conditioning
    weight: Tensor  # [B] float32, 2*alpha - gamma >= 0
    places: tuple[int, ...]  # index of each pair among this rank's pairs of the step

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: slice) -> Pairs:
        """Some of the pairs."""
        return Pairs(self.ids[rows], self.latents[rows], self.cond.take(rows), self.weight[rows], self.places[rows])

    def map(self, change: Callable[[Tensor], Tensor]) -> Pairs:
        """A copy with ``change`` applied to every tensor, of any shape, e.g. to move them."""
        return Pairs(self.ids, change(self.latents), self.cond.map(change), change(self.weight), self.places)

    def tensors(self) -> list[Tensor]:
        """All tensors of these pairs."""
        found = [self.latents, self.weight, self.cond.prompt, self.cond.pooled, self.cond.time_ids]
        return [t for t in found if t is not None]


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """A host tensor of any shape on a device, copied through pinned memory so that the host does not wait."""
    if device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)
