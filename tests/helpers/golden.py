"""The golden values (tests/golden/README.md): which there are, and the networks that belong to them.

``SMPO_GOLDEN=<folder>`` names a larger set with the same layout in place of the one that ships with the project.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from helpers import drawn
from smpo_fast.config import loading
from smpo_fast.config.schema import Config, Inversion, Model
from smpo_fast.method.batch import Conditioning
from smpo_fast.method.inversion import PredictorFactory
from smpo_fast.method.schedule import NoiseSchedule
from smpo_fast.models.attention import set_attention
from smpo_fast.models.denoiser import Denoiser
from smpo_fast.models.inference.caller import InferenceCaller
from smpo_fast.models.locate import ModelSource

SHIPPED = Path(__file__).parents[1] / "golden"
KINDS, METHODS = ("sdxl", "sd15"), ("smpo", "ddiminpo")
SCHEDULER = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
GAMMA = 10.0
SMPO_STEPS = {"sdxl": 10, "sd15": 5}
# every case has these; the others (policy_pred, ref_pred) are compared where a case has them
ALWAYS = {"x_t", "tau", "model_mse", "ref_mse", "inside", "loss", "grad_norm", "grad_conv_out"}


class Run(NamedTuple):
    """One method on one case."""

    kind: str
    method: str
    case: str


def chosen_folder() -> Path:
    named = os.environ.get("SMPO_GOLDEN")
    if not named:
        return SHIPPED
    folder = Path(named).resolve()
    if not any((folder / kind / "cases.safetensors").is_file() for kind in KINDS):
        raise FileNotFoundError(f"SMPO_GOLDEN={named}: no golden values there (neither {' nor '.join(KINDS)})")
    return folder


GOLDEN = chosen_folder()


def find_runs(folder: Path = GOLDEN) -> list[Run]:
    """All that a set holds, of any number of cases."""
    runs = []
    for kind in KINDS:
        file = folder / kind / "cases.safetensors"
        if not file.is_file():
            continue
        with safe_open(file, "pt") as stored:
            pairs = {tuple(name.split(".")[:2]) for name in stored.keys()}
        cases = sorted({case for case, _ in pairs}, key=int)
        runs += [Run(kind, method, case) for method in METHODS for case in cases if (case, method) in pairs]
    return runs


def name_of(run: Run) -> str:
    return "-".join(run)


@cache
def _load_cases(kind: str, folder: Path) -> dict[str, Tensor]:
    return load_file(folder / kind / "cases.safetensors")


def load_case(run: Run, folder: Path = GOLDEN) -> dict[str, Tensor]:
    """Inputs ``in.*`` and outputs ``smpo.*`` or ``ddiminpo.*``, by name without the case."""
    start = f"{run.case}."
    return {n.removeprefix(start): v for n, v in _load_cases(run.kind, folder).items() if n.startswith(start)}


def outputs_of(run: Run, values: dict[str, Tensor]) -> dict[str, Tensor]:
    start = f"{run.method}."
    return {n.removeprefix(start): v for n, v in values.items() if n.startswith(start)}


@cache
def beta_of(kind: str, folder: Path = GOLDEN) -> float:
    with safe_open(folder / kind / "cases.safetensors", "pt") as stored:
        return float(stored.metadata()["beta"])


@cache
def _load_weights(folder: Path) -> dict[str, Tensor]:
    """Stored in full, or drawn from a seed."""
    full = folder / "diffusion_pytorch_model.safetensors"
    if full.is_file():
        return load_file(full)
    base = _load_weights(folder.parent / "reference") if folder.name == "policy" else None
    return drawn.read(folder / "drawn.safetensors", base)


def load_unet(kind: str, which: str, folder: Path = GOLDEN) -> UNet2DConditionModel:
    """A new network of the case file: ``which`` is ``policy`` or ``reference``."""
    place = folder / kind / which
    unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(place))
    unet.load_state_dict(_load_weights(place))
    return unet.eval()


@cache
def load_denoiser(kind: str, which: str, folder: Path = GOLDEN) -> Denoiser:
    place, unet = folder / kind / which, load_unet(kind, which, folder)
    set_attention([unet], "sdpa", torch.device("cpu"))
    source = ModelSource(place, place, place, kind, "epsilon", SCHEDULER, None)
    return Denoiser(unet, source, NoiseSchedule.from_config(SCHEDULER), "fp32", torch.device("cpu"))


def as_network(denoiser: Denoiser, cond: Conditioning) -> PredictorFactory:
    """The network as the trainer's inversion asks it."""
    caller = InferenceCaller(denoiser, Model(), Inversion(), chunk=1)
    caller.weights_changed()
    return lambda rows: caller.predictor(cond.take(rows))


def settings_for(run: Run) -> Config:
    inversion = {"fidelity": "release", "steps": 10}
    if run.method == "smpo":
        inversion["steps"] = SMPO_STEPS[run.kind]
    else:
        inversion["noise"] = 0.0
    return loading.from_dict(
        {"objective": {"name": "smpo" if run.method == "smpo" else "inpo"}, "inversion": inversion}
    )


def conditioning_of(values: dict[str, Tensor]) -> Conditioning:
    extra = {k: values[f"in.{k}"][None] for k in ("pooled", "time_ids") if f"in.{k}" in values}
    return Conditioning(values["in.prompt_embeds"][None], **extra)


def weight_of(run: Run, values: dict[str, Tensor]) -> Tensor:
    """2*alpha - gamma of the pair, or 1, [1]."""
    return GAMMA * (2 * values["in.p"][None] - 1) if run.method == "smpo" else torch.ones(1)


def gradients_of(unet: torch.nn.Module) -> dict[str, Tensor]:
    """After ``backward``."""
    norms = [p.grad.norm() for p in unet.parameters() if p.grad is not None]
    return {"grad_norm": torch.stack(norms).norm(), "grad_conv_out": unet.conv_out.weight.grad}


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """In the 2-norm; of zeros the absolute error."""
    size = float(wanted.double().norm())
    return float((found.detach().double() - wanted.double()).norm()) / (size or 1.0)


def assert_golden(found: dict[str, Tensor], wanted: dict[str, Tensor], relative: float = 1e-4) -> None:
    """All outputs that a case has, to float32 rounding."""
    missing = (ALWAYS | set(wanted)) - (set(found) & set(wanted))
    assert not missing, f"not compared: {sorted(missing)}"
    # a difference of nearly equal numbers: only its absolute error means something
    inside = abs(found["inside"].item() - wanted["inside"].item())
    assert inside < 2e-5, f"argument of log sigmoid off by {inside:.1e}"
    errors = {n: relative_error(found[n], value) for n, value in wanted.items() if n != "inside"}
    assert max(errors.values()) < relative, errors
