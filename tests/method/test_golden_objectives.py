"""The objectives against losses and gradients that authors' released loss lines gave for fixed tensors.

Read from ``objectives/`` in the set of golden values, a file an objective; objectives that are not in the table
(smpo_fast.objective.OBJECTIVES) are passed over.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from helpers.golden import GOLDEN, SHIPPED, relative_error
from safetensors import safe_open
from torch import Tensor

from smpo_fast.method.objective import OBJECTIVES


class Case(NamedTuple):
    """One case of a file."""

    file: Path
    number: str


def find_cases(folder: Path) -> list[Case]:
    """All cases of the files whose objective is in the table."""
    cases = []
    for file in sorted((folder / "objectives").glob("*.safetensors")):
        if file.stem in OBJECTIVES:
            with safe_open(file, "pt") as stored:
                numbers = {name.partition(".")[0] for name in stored.keys()}
            cases += [Case(file, number) for number in sorted(numbers, key=int)]
    return cases


def load(case: Case) -> tuple[dict[str, Tensor], float]:
    """Tensors by name without the case, and beta."""
    start = f"{case.number}."
    with safe_open(case.file, "pt") as stored:
        values = {n.removeprefix(start): stored.get_tensor(n) for n in stored.keys() if n.startswith(start)}
        settings = json.loads(stored.metadata()[f"{start}hparams"])
    return values, float(settings["beta_dpo"] if "beta_dpo" in settings else settings["beta"])


def target_of(values: dict[str, Tensor]) -> Tensor:
    """In float64: as given, or for the inverted x_t the noise that leads there from x_0."""
    if "in.alpha_prod_t" not in values:
        return values["in.target"].double()
    x_t, x_0, alpha = (values[f"in.{name}"].double() for name in ("noisy_latents", "start_latents", "alpha_prod_t"))
    return (x_t - alpha.sqrt() * x_0) / (1 - alpha).sqrt()


CASES = find_cases(GOLDEN)
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.file.stem}-{case.number}")


@every_case
def test_golden_objective_in_float64(case: Case) -> None:
    """Errors in, loss out: the formula itself. Gradients are kept in float32, hence their tolerance."""
    values, beta = load(case)
    prediction, frozen = (values[f"in.{name}"].double() for name in ("policy", "reference"))
    prediction.requires_grad_(True)
    policy, reference = ((x - target_of(values)).square().mean((2, 3, 4)) for x in (prediction, frozen))
    objective = OBJECTIVES[case.file.stem]
    weight = torch.ones(len(policy), dtype=torch.float64)
    loss = objective.pair_loss(policy, reference, objective.weigh(weight), beta).mean()
    loss.backward()
    wanted = {n: values.get(f"out64.{n}", values.get(f"formula64.{n}")) for n in ("loss", "grad")}
    assert loss.item() == pytest.approx(wanted["loss"].item(), rel=1e-10, abs=1e-15)
    assert relative_error(prediction.grad, wanted["grad"]) < 1e-6


@every_case
def test_golden_objective_as_the_trainer_asks_it(case: Case) -> None:
    """Float32, from predictions: beta stands before a difference of nearly equal errors, which bounds what to ask."""
    values, beta = load(case)
    target, ones = target_of(values).float(), torch.ones(len(values["in.policy"]))
    prediction = values["in.policy"].clone().requires_grad_(True)
    objective = OBJECTIVES[case.file.stem]
    frozen = objective.losses(values["in.reference"], None, target, ones, beta).policy
    out = objective.losses(prediction, frozen, target, objective.weigh(ones), beta)
    for found, names in ((out.policy, ("m_w", "m_l")), (out.reference, ("r_w", "r_l"))):
        assert relative_error(found, torch.stack([values[f"out.{n}"] for n in names], dim=1)) < 1e-6
    wanted = values.get("out64.loss", values["formula64.loss"]).item()
    rounding = beta * 1e-6 * max(out.policy.max().item(), out.reference.max().item())
    assert out.loss.mean().item() == pytest.approx(wanted, abs=rounding)


def test_golden_objectives_ship_with_the_project() -> None:
    assert {case.file.stem for case in find_cases(SHIPPED)} >= {"dpo", "inpo"}
