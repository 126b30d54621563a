"""What travels through a step: pairs of latents with their prompts and weights.

Shapes: B pairs, 2 pictures a pair (winner, then loser), C H W latent, S D prompt tokens, E pooled prompt.
Pictures of a pair stand next to each other, so a prefix of pairs is a contiguous prefix of pictures.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """What the UNet is told beside the latent and the timestep, one row a pair."""

    prompt: Tensor  # [B, S, D]
    pooled: Tensor | None = None  # [B, E], SDXL
    time_ids: Tensor | None = None  # [B, 6], SDXL; or [B, 2, 6] where the pictures of a pair differ

    def take(self, rows: slice) -> Conditioning:
        """Some of the rows."""
        return self.map(lambda t: t[rows])

    def map(self, change: Callable[[Tensor], Tensor]) -> Conditioning:
        """The same with every tensor changed."""
        pooled, time_ids = (None if x is None else change(x) for x in (self.pooled, self.time_ids))
        return Conditioning(change(self.prompt), pooled, time_ids)


@dataclass(frozen=True)
class Pairs:
    """Some preference pairs, ready for a step."""

    ids: tuple[int, ...]  # row of each pair in its table, for reports
    latents: Tensor  # [B, 2, C, H, W] float32, in the units the UNet sees
    cond: Conditioning
    weight: Tensor  # [B] float32, 2*alpha - gamma >= 0
    places: tuple[int, ...]  # place of each pair among this rank's pairs of the step

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: slice) -> Pairs:
        """Some of the pairs."""
        return Pairs(self.ids[rows], self.latents[rows], self.cond.take(rows), self.weight[rows], self.places[rows])

    def map(self, change: Callable[[Tensor], Tensor]) -> Pairs:
        """The same with every tensor changed, e.g. moved."""
        return Pairs(self.ids, change(self.latents), self.cond.map(change), change(self.weight), self.places)

    def tensors(self) -> list[Tensor]:
        """All that lies on a device."""
        found = [self.latents, self.weight, self.cond.prompt, self.cond.pooled, self.cond.time_ids]
        return [t for t in found if t is not None]
