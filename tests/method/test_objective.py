"""The losses: identities of the method, gradients against float64 closed forms."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from smpo_fast.method.objective import OBJECTIVES, logit, pair_errors

SHAPE = (3, 2, 4, 8, 8)
BETA = 5000.0


def draw(seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


WEIGHT = torch.tensor([0.3, 1.0, 2.5])


def test_equal_networks_give_margin_zero_and_log_two() -> None:
    errors = pair_errors(draw(0), draw(1))
    assert (logit(errors, errors.clone(), WEIGHT, BETA) == 0).all()
    loss = OBJECTIVES["smpo"].pair_loss(errors, errors.clone(), WEIGHT, BETA)
    assert torch.equal(loss, torch.full((3,), math.log(2)))


def test_weight_one_is_diffusion_dpo() -> None:
    """Against the published formula, written out."""
    policy, reference = pair_errors(draw(0), draw(1)), pair_errors(draw(2), draw(1))
    inside = -0.5 * 2.0 * ((policy[:, 0] - policy[:, 1]) - (reference[:, 0] - reference[:, 1]))
    wanted = -F.logsigmoid(inside)
    for name, weight in (("smpo", torch.ones(3)), ("dpo", WEIGHT), ("inpo", WEIGHT)):
        objective = OBJECTIVES[name]
        assert torch.allclose(objective.pair_loss(policy, reference, objective.weigh(weight), 2.0), wanted)


def test_swapping_the_pair_and_the_sign_changes_nothing() -> None:
    policy, reference = pair_errors(draw(0), draw(1)), pair_errors(draw(2), draw(1))
    a = OBJECTIVES["smpo"].pair_loss(policy, reference, WEIGHT, BETA)
    b = OBJECTIVES["smpo"].pair_loss(policy.flip(1), reference.flip(1), -WEIGHT, BETA)
    assert torch.equal(a, b)


def test_equal_rewards_give_no_gradient() -> None:
    prediction = draw(0).requires_grad_()
    errors = pair_errors(prediction, draw(1))
    OBJECTIVES["smpo"].pair_loss(errors, pair_errors(draw(2), draw(1)), torch.zeros(3), BETA).sum().backward()
    assert (prediction.grad == 0).all()


@pytest.mark.parametrize("name", ["smpo", "dpo"])
def test_gradient_against_the_closed_form_in_float64(name: str) -> None:
    """d loss / d eps_w = sigmoid(-logit) (beta/2) weight * 2 / (CHW) (eps_w - tau_w), minus for the loser."""
    beta, tau = 20.0, draw(1, torch.float64)
    prediction = draw(0, torch.float64).requires_grad_()
    weight = OBJECTIVES[name].weigh(WEIGHT.double())
    assert (weight == 1).all() == (name == "dpo")

    def errors(x: Tensor) -> Tensor:
        return (x - tau).square().mean(dim=(2, 3, 4))

    policy, reference = errors(prediction), errors(draw(2, torch.float64))
    OBJECTIVES[name].pair_loss(policy, reference, weight, beta).sum().backward()
    u = logit(policy, reference, weight, beta).detach()
    sign = torch.tensor([1.0, -1.0], dtype=torch.float64)
    slope = (torch.sigmoid(-u) * 0.5 * beta * weight)[:, None] * sign
    wanted = slope[:, :, None, None, None] * 2 / (4 * 8 * 8) * (prediction.detach() - tau)
    assert (prediction.grad - wanted).norm() / wanted.norm() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_errors_of_half_predictions_are_taken_in_float32(dtype: torch.dtype) -> None:
    prediction, tau = draw(0).to(dtype), draw(1).to(dtype)
    exact = (prediction.double() - tau.double()).square().mean(dim=(2, 3, 4))
    assert ((pair_errors(prediction, tau) - exact).abs() / exact).max() < 1e-6


def test_loss_is_finite_far_out() -> None:
    policy, reference = torch.tensor([[1e3, 0.0], [0.0, 1e3]]), torch.zeros(2, 2)
    loss = OBJECTIVES["dpo"].pair_loss(policy, reference, torch.ones(2), BETA)
    assert loss.isfinite().all() and loss[0] == 0.5 * BETA * 1e3 and loss[1] == 0


def test_sft_is_the_winners_error_and_needs_no_reference() -> None:
    policy = pair_errors(draw(0), draw(1))
    assert torch.equal(OBJECTIVES["sft"].pair_loss(policy, policy, WEIGHT, BETA), policy[:, 0])
    assert not OBJECTIVES["sft"].needs_reference
