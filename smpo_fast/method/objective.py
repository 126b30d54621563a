"""The objectives: losses of a pair, as functions of the networks' errors and the pair's weight.

With ``m`` and ``r`` the policy's and the reference's mean squared errors over C, H, W against the target,
``D = (m_w - m_l) - (r_w - r_l)`` for winner w and loser l, and ``logit = -(beta/2) * weight * D``:

====  =========================  ===============================================================================
smpo  ``-log sigmoid(logit)``    SmPO (arXiv 2506.02698), weight = 2*alpha - gamma (docs/labels.md)
dpo   the same with weight 1     Diffusion-DPO (arXiv 2311.12908), forward noise
inpo  the same with weight 1     InPO (arXiv 2503.18454), DDIM inversion
sft   ``m_w``                    supervised fine-tuning on the winners
====  =========================  ===============================================================================

The factor 1/2 is in every released script of this family, though not in the papers' printed losses; with it, a beta
means the same here as there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def pair_errors(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each image in float32: [B, 2, C, H, W] twice -> [B, 2]."""
    return (prediction.float() - target.float()).square().mean(dim=(2, 3, 4))


def logit(policy: Tensor, reference: Tensor, weight: Tensor, beta: float) -> Tensor:
    """The argument of log sigmoid, [B], from errors [B, 2] (winner, loser) and weights [B]."""
    difference = (policy[:, 0] - policy[:, 1]) - (reference[:, 0] - reference[:, 1])
    return -0.5 * beta * weight * difference


def _log_sigmoid(policy: Tensor, reference: Tensor, weight: Tensor, beta: float) -> Tensor:
    return F.softplus(-logit(policy, reference, weight, beta))


def _sft(policy: Tensor, reference: Tensor, weight: Tensor, beta: float) -> Tensor:
    return policy[:, 0]


class Losses(NamedTuple):
    """Losses and logits of pairs, [B], and the errors of policy and reference, [B, 2] (winner, loser)."""

    loss: Tensor
    logit: Tensor
    policy: Tensor
    reference: Tensor


@dataclass(frozen=True)
class Objective:
    """A pair's loss, [B], as a function of policy errors [B, 2], reference errors [B, 2], weights [B] and beta."""

    pair_loss: Callable[[Tensor, Tensor, Tensor, float], Tensor]
    weighted: bool = True
    needs_reference: bool = True

    def weigh(self, weight: Tensor) -> Tensor:
        """The weights [B] that the loss uses: those of the labels, or 1 for every pair."""
        return weight if self.weighted else torch.ones_like(weight)

    def losses(
        self, prediction: Tensor, reference: Tensor | None, target: Tensor, weight: Tensor, beta: float
    ) -> Losses:
        """From a prediction and its target [B, 2, C, H, W], the reference's errors [B, 2] (None if not needed) and
        weights [B].
        """
        policy = pair_errors(prediction, target)
        frozen = policy.detach() if reference is None else reference
        loss = self.pair_loss(policy, frozen, weight, beta)
        return Losses(loss, logit(policy, frozen, weight, beta), policy, frozen)


OBJECTIVES: dict[str, Objective] = {
    "smpo": Objective(_log_sigmoid),
    "dpo": Objective(_log_sigmoid, weighted=False),
    "inpo": Objective(_log_sigmoid, weighted=False),
    "sft": Objective(_sft, weighted=False, needs_reference=False),
}
