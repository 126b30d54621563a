"""The golden values of the authors' release, with kernels in inversion and loss and, in the slow test, the network."""

from __future__ import annotations

import pytest
import torch
from helpers.golden import (
    KINDS,
    METHODS,
    SCHEDULER,
    Run,
    as_network,
    assert_golden,
    beta_of,
    conditioning_of,
    find_runs,
    gradients_of,
    load_case,
    load_denoiser,
    name_of,
    outputs_of,
    settings_for,
    weight_of,
)

from smpo_fast.method.inversion import invert
from smpo_fast.method.objective import OBJECTIVES
from smpo_fast.method.schedule import NoiseSchedule
from smpo_fast.models import kernel_patch, step_ops


def every_third() -> list[Run]:
    """Of each kind and method."""
    runs = find_runs()
    return [r for kind in KINDS for method in METHODS for r in [r for r in runs if r[:2] == (kind, method)][::3]]


def check(run: Run) -> None:
    settings, values = settings_for(run), load_case(run)
    ops = step_ops.select_ops(settings, ["pair_loss", "renoise_step"])
    policy, reference = (load_denoiser(run.kind, which) for which in ("policy", "reference"))
    cond = conditioning_of(values)
    path = NoiseSchedule.from_config(SCHEDULER).path(int(values["in.t"]), settings.inversion)
    network, x_0 = as_network(policy, cond), values["in.x0"][None]
    x_t, tau = invert(network, x_0, [path], settings.inversion, chunk=1, solver=ops.solver)

    x_t, tau, time = x_t[0], tau[0], torch.tensor([path.final_level.timestep])
    with torch.no_grad():
        frozen = reference(x_t, time, cond)
    weight = OBJECTIVES[settings.objective.name].weigh(weight_of(run, values))
    prediction = policy(x_t, time, cond)
    out = ops.pair_loss(prediction, ops.pair_errors(frozen, tau), tau, weight, beta_of(run.kind))
    loss = out.loss.mean()
    policy.unet.zero_grad()
    loss.backward()
    found = {
        "x_t": x_t[0], "tau": tau[0], "policy_pred": prediction[0], "ref_pred": frozen[0],
        "model_mse": out.policy[0], "ref_mse": out.reference[0], "inside": out.logit, "loss": loss,
        **gradients_of(policy.unet),
    }  # fmt: skip
    assert_golden(found, outputs_of(run, values))


@pytest.mark.parametrize("run", every_third(), ids=name_of)
def test_golden_release_through_the_kernels_of_the_step(run: Run) -> None:
    check(run)


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted({run.kind for run in find_runs()}))
def test_golden_release_through_all_kernels(kind: str) -> None:
    """Uses the shortest trajectory, since each interpreted network call takes seconds."""
    runs = [run for run in find_runs() if run[:2] == (kind, "smpo")]
    shortest = min(runs, key=lambda run: int(load_case(run)["in.t"]))
    networks = [load_denoiser(kind, which).unet for which in ("policy", "reference")]
    try:
        for unet in networks:
            kernel_patch.patch(unet, kernel_patch.MODULES)
        check(shortest)
    finally:
        for unet in networks:
            kernel_patch.unpatch(unet)
