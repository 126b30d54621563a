"""What is minimised: small losses over the pairs' errors and weights.

With ``m`` and ``r`` the policy's and the reference's mean squared errors over C, H, W against the target,
``D = (m_w - m_l) - (r_w - r_l)`` and ``logit = -(beta/2) * weight * D``:

========  =======================================  ==========================================================
smpo      ``-log sigmoid(logit)``                  SmPO-Diffusion, weight = 2*alpha - gamma (docs/labels.md)
dpo       the same with weight 1                   Diffusion-DPO (arXiv 2311.12908), forward noise
inpo      the same with weight 1                   InPO (arXiv 2503.18454), DDIM inversion
sft       ``m_w``                                  fine-tuning on the winners
========  =======================================  ==========================================================

The 1/2 stands in every released script of the family, so a beta means here what it means there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def pair_errors(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each picture in float32: [B, 2, C, H, W] twice -> [B, 2]."""
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
    """Of pairs: loss and logit [B], errors of the policy and of the reference [B, 2] (winner, loser)."""

    loss: Tensor
    logit: Tensor
    policy: Tensor
    reference: Tensor


@dataclass(frozen=True)
class Objective:
    """A loss a pair, [B], from policy errors [B, 2], reference errors [B, 2], weights [B] and beta."""

    pair_loss: Callable[[Tensor, Tensor, Tensor, float], Tensor]
    weighted: bool = True
    needs_reference: bool = True

    def weigh(self, weight: Tensor) -> Tensor:
        """The weights [B] that count: the labels', or 1 for every pair."""
        return weight if self.weighted else torch.ones_like(weight)

    def losses(
        self, prediction: Tensor, reference: Tensor | None, target: Tensor, weight: Tensor, beta: float
    ) -> Losses:
        """From a prediction and its target [B, 2, C, H, W] and the reference's errors (None: it is not needed)."""
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
