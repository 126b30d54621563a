"""The authors' values once more, with the kernels in the inversion, in the loss and, slowly, in the network."""

from __future__ import annotations

import pytest
import torch
from test_golden import (
    BETA,
    CASES,
    GAMMA,
    GOLDEN,
    SCHEDULER,
    as_network,
    assert_close,
    load_case,
    load_denoiser,
    settings_for,
)

from smpo_fast.config import loading
from smpo_fast.method.batch import Conditioning
from smpo_fast.method.inversion import invert
from smpo_fast.method.objective import OBJECTIVES
from smpo_fast.method.schedule import NoiseSchedule
from smpo_fast.models import kernel_patch

pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no golden values at {GOLDEN} (set SMPO_GOLDEN)")


def check(kind: str, method: str, case: int) -> None:
    run, values = settings_for(kind, method), load_case(kind, case)
    run = loading.from_dict({**run.model_dump(), "kernels": {"enabled": ["pair_loss", "renoise_step"]}})
    ops, schedule = kernel_patch.select_ops(run), NoiseSchedule.from_config(SCHEDULER)
    policy, reference = (load_denoiser(kind, which) for which in ("policy", "reference"))
    extra = {k: values[f"in.{k}"][None] for k in ("pooled", "time_ids") if f"in.{k}" in values}
    cond = Conditioning(values["in.prompt_embeds"][None], **extra)
    path, x_0 = schedule.path(int(values["in.t"]), run.inversion), values["in.x0"][None]
    network = as_network(policy, cond)
    x_t, tau = invert(network, x_0, [path], run.inversion, chunk=1, solver=ops.solver)
    assert_close(x_t[0, 0], values[f"{method}.x_t"])
    assert_close(tau[0, 0], values[f"{method}.tau"])

    x_t, tau = x_t[0], tau[0]
    time = torch.tensor([path.at.time])
    with torch.no_grad():
        frozen = ops.pair_errors(reference(x_t, time, cond), tau)
    weight = GAMMA * (2 * values["in.p"][None] - 1) if method == "smpo" else torch.ones(1)
    weight = OBJECTIVES[run.objective.name].weigh(weight)
    out = ops.pair_loss(policy(x_t, time, cond), frozen, tau, weight, BETA)
    assert_close(out.policy[0], values[f"{method}.model_mse"])
    assert_close(out.reference[0], values[f"{method}.ref_mse"])
    assert abs(out.logit.item() - values[f"{method}.inside"].item()) < 2e-5
    assert_close(out.loss.mean(), values[f"{method}.loss"])
    policy.unet.zero_grad()
    out.loss.mean().backward()
    gradients = [p.grad for p in policy.unet.parameters() if p.grad is not None]
    assert_close(torch.stack([g.norm() for g in gradients]).norm(), values[f"{method}.grad_norm"])
    assert_close(policy.unet.conv_out.weight.grad, values[f"{method}.grad_conv_out"])


@pytest.mark.parametrize("case", CASES[::3])
@pytest.mark.parametrize("method", ["smpo", "ddiminpo"])
@pytest.mark.parametrize("kind", ["sdxl", "sd15"])
def test_golden_release_through_the_kernels_of_the_step(kind: str, method: str, case: int) -> None:
    check(kind, method, case)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sdxl", "sd15"])
def test_golden_release_through_all_kernels(kind: str) -> None:
    """The shortest trajectory: each network call takes the interpreter seconds."""
    case = min(CASES, key=lambda c: int(load_case(kind, c)["in.t"]))
    networks = [load_denoiser(kind, which).unet for which in ("policy", "reference")]
    try:
        for unet in networks:
            kernel_patch.patch(unet, kernel_patch.MODULES)
        check(kind, "smpo", case)
    finally:
        for unet in networks:
            kernel_patch.unpatch(unet)
