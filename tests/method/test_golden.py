"""The `release` fidelity reproduces what the authors' script computed, run in float32 with diffusers 0.20.0.

The values are read from the folder in SMPO_GOLDEN; users do not have it, and the tests skip there.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from smpo_fast.config import loading
from smpo_fast.config.schema import Config, Inversion, Model
from smpo_fast.method.batch import Conditioning
from smpo_fast.method.inversion import NetworkOf, invert
from smpo_fast.method.objective import OBJECTIVES, logit, pair_errors
from smpo_fast.method.schedule import NoiseSchedule
from smpo_fast.models.attention import set_attention
from smpo_fast.models.denoiser import Denoiser
from smpo_fast.models.inference.caller import Caller
from smpo_fast.models.locate import ModelSource

GOLDEN = Path(os.environ.get("SMPO_GOLDEN", Path(__file__).parents[2] / "../shared/golden"))
SCHEDULER = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
CASES = range(12)
BETA, GAMMA = 2.0, 10.0

pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no golden values at {GOLDEN} (set SMPO_GOLDEN)")


def load_case(kind: str, case: int) -> dict[str, torch.Tensor]:
    values = load_file(GOLDEN / kind / "cases.safetensors")
    return {name.partition(".")[2]: value for name, value in values.items() if name.startswith(f"{case:02d}.")}


@cache
def load_denoiser(kind: str, which: str) -> Denoiser:
    folder = GOLDEN / kind / which
    unet = UNet2DConditionModel.from_pretrained(folder, use_safetensors=True).eval()
    set_attention([unet], "sdpa", torch.device("cpu"))
    source = ModelSource(folder, folder, folder, kind, "epsilon", SCHEDULER, None)
    return Denoiser(unet, source, NoiseSchedule.from_config(SCHEDULER), "fp32", torch.device("cpu"))


def as_network(denoiser: Denoiser, cond: Conditioning) -> NetworkOf:
    """The network as the trainer's inversion asks it."""
    caller = Caller(denoiser, Model(), Inversion(), chunk=1)
    caller.begin()
    return lambda rows: caller.pairs(cond.take(rows))


def settings_for(kind: str, method: str) -> Config:
    inversion = {"fidelity": "release", "steps": 10}
    if method == "smpo":
        inversion["steps"] = 10 if kind == "sdxl" else 5
    else:
        inversion["noise"] = 0.0
    return loading.from_dict({"objective": {"name": "smpo" if method == "smpo" else "inpo"}, "inversion": inversion})


def assert_close(found: torch.Tensor, wanted: torch.Tensor, relative: float = 1e-4) -> None:
    error = (found.double() - wanted.double()).norm() / wanted.double().norm()
    assert error < relative, f"relative error {error:.2e}"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("method", ["smpo", "ddiminpo"])
@pytest.mark.parametrize("kind", ["sdxl", "sd15"])
def test_golden_release(kind: str, method: str, case: int) -> None:
    run, values = settings_for(kind, method), load_case(kind, case)
    schedule = NoiseSchedule.from_config(SCHEDULER)
    policy, reference = (load_denoiser(kind, which) for which in ("policy", "reference"))
    extra = {k: values[f"in.{k}"][None] for k in ("pooled", "time_ids") if f"in.{k}" in values}
    cond = Conditioning(values["in.prompt_embeds"][None], **extra)
    path = schedule.path(int(values["in.t"]), run.inversion)
    x_0 = values["in.x0"][None]
    weight = torch.ones(1)
    if method == "smpo":
        weight = GAMMA * (2 * values["in.p"][None] - 1)

    network = as_network(policy, cond)
    x_t, tau = invert(network, x_0, [path], run.inversion, chunk=1)
    assert_close(x_t[0, 0], values[f"{method}.x_t"])
    assert_close(tau[0, 0], values[f"{method}.tau"])

    x_t, tau = x_t[0], tau[0]
    time = torch.tensor([path.at.time])
    prediction = policy(x_t, time, cond)
    with torch.no_grad():
        reference_prediction = reference(x_t, time, cond)
    assert_close(prediction[0], values[f"{method}.policy_pred"])
    assert_close(reference_prediction[0], values[f"{method}.ref_pred"])

    errors, reference_errors = pair_errors(prediction, tau), pair_errors(reference_prediction, tau)
    assert_close(errors[0], values[f"{method}.model_mse"])
    assert_close(reference_errors[0], values[f"{method}.ref_mse"])
    inside = logit(errors, reference_errors, weight, BETA)
    assert abs(inside.item() - values[f"{method}.inside"].item()) < 2e-5

    loss = OBJECTIVES[run.objective.name].pair_loss(errors, reference_errors, weight, BETA).mean()
    assert_close(loss, values[f"{method}.loss"])
    policy.unet.zero_grad()
    loss.backward()
    gradients = [p.grad for p in policy.unet.parameters() if p.grad is not None]
    assert_close(torch.stack([g.norm() for g in gradients]).norm(), values[f"{method}.grad_norm"])
    assert_close(policy.unet.conv_out.weight.grad, values[f"{method}.grad_conv_out"])


def test_golden_values_tell_the_fidelities_apart() -> None:
    """The comparison above can fail: the paper's fidelity gives another x_t for the same pair."""
    run, values = loading.from_dict({"inversion": {"steps": 10}}), load_case("sdxl", 7)
    schedule = NoiseSchedule.from_config(SCHEDULER)
    policy = load_denoiser("sdxl", "policy")
    cond = Conditioning(*(values[f"in.{k}"][None] for k in ("prompt_embeds", "pooled", "time_ids")))
    path = schedule.path(433, run.inversion)
    network = as_network(policy, cond)
    x_t, _ = invert(network, values["in.x0"][None], [path], run.inversion, chunk=1)
    error = (x_t[0, 0] - values["smpo.x_t"]).norm() / values["smpo.x_t"].norm()
    assert error > 1e-2
