"""Which precisions, optimizers, ZeRO stages and devices work together, and how pairs are divided."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from helpers import toy

from smpo_fast.common.errors import ConfigError
from smpo_fast.common.runtime import World
from smpo_fast.config import loading
from smpo_fast.engine import batch_size, combinations

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ALIGNED = "adamw8bit_aligned"


def test_pairs_must_divide_among_the_ranks() -> None:
    with pytest.raises(ConfigError, match="pairs_per_step = 10 does not divide among 3"):
        batch_size.micro_batches_per_step(toy.settings(), 3)
    assert batch_size.micro_batches_per_step(toy.settings(), 2) == 3
    assert batch_size.micro_batches_per_step(toy.settings(pairs=2, micro=4), 2) == 1


AUTO: list[tuple[dict[str, Any] | None, torch.device, str]] = [
    (None, CPU, "fp32"),
    (None, CUDA, "bf16"),
    ({}, CUDA, "bf16-autocast"),
    ({"zero_optimization": {"stage": 2}}, CUDA, "bf16"),
    ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, CUDA, "bf16-autocast"),
    ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}, CUDA, "bf16"),
    ({"zero_optimization": {"stage": 2}, "bf16": {"enabled": "auto"}}, CPU, "fp32"),
    ({"bf16": {"enabled": True}}, CPU, "bf16"),
    ({"fp16": {"enabled": True}}, CUDA, "fp16"),
    ({"zero_optimization": {"stage": 2}, "bf16": {"enabled": False}}, CUDA, "fp32"),
]


@pytest.mark.parametrize("raw, device, expected", AUTO)
def test_auto_precision(
    monkeypatch: pytest.MonkeyPatch, raw: dict[str, Any] | None, device: torch.device, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    assert combinations.resolve_precision(loading.from_dict({}), raw, device) == expected
    assert combinations.resolve_precision(toy.settings(precision="bf16-autocast"), raw, device) == "bf16-autocast"


def test_two_half_precisions_are_refused() -> None:
    with pytest.raises(ConfigError, match="both true"):
        both = {"bf16": {"enabled": True}, "fp16": {"enabled": True}}
        combinations.resolve_precision(loading.from_dict({}), both, CPU)


REFUSED: list[tuple[str, str, World, int | None, str]] = [
    ("adafactor", "fp32", World(), 1, "flat slices"),
    ("adafactor", "bf16", World(), 2, "flat slices"),
    ("adamw", "fp16", World(), None, "loss scaling"),
    ("adamw", "fp16", World(), 2, "CUDA"),
    ("adamw", "bf16", World(), 0, "stage 1, 2 or 3"),
    ("adamw", "fp16", World(device=CUDA), 0, "stage 1, 2 or 3"),
    ("adamw", "fp32", World(0, 2), None, "--ds_config"),
]


@pytest.mark.parametrize("optimizer, precision, world, stage, words", REFUSED)
def test_combinations_that_do_not_work(
    optimizer: str, precision: str, world: World, stage: int | None, words: str
) -> None:
    ds = None if stage is None else {"zero_optimization": {"stage": stage}}
    with pytest.raises(ConfigError, match=words):
        combinations.check_combination(toy.settings(optimizer, precision), precision, world, ds)


OFFLOADED: list[tuple[dict[str, Any], str, int, str]] = [
    ({"stage": 0, "offload_optimizer": {"device": "cpu"}}, "fp32", 2, "needs zero_optimization.stage = 1, 2 or 3"),
    ({"stage": 2, "offload_param": {"device": "cpu"}}, "fp32", 2, "needs zero_optimization.stage = 3, and it is 2"),
    ({"stage": 2, "offload_optimizer": {"device": "cpu"}}, "bf16", 2, "a step's 5 micro-batches in bf16.*stage 3"),
    ({"stage": 2, "offload_optimizer": {"device": "cpu"}}, "bf16", 10, ""),
    ({"stage": 2, "offload_optimizer": {"device": "none"}}, "bf16", 2, ""),
]


@pytest.mark.parametrize("zero, precision, micro, words", OFFLOADED)
def test_offloading_that_does_not_work(zero: dict[str, Any], precision: str, micro: int, words: str) -> None:
    settings = toy.settings(precision=precision, micro=micro)
    with pytest.raises(ConfigError, match=words) if words else nullcontext():
        combinations.check_combination(settings, precision, World(), {"zero_optimization": zero})


OPTIONS_REFUSED: list[tuple[dict[str, str], str, int | None, str]] = [
    ({"name": "adamw", "master": "none"}, "bf16", None, "needs optim.name = 'adamw8bit_aligned'"),
    ({"name": "adamw8bit", "accumulate": "bf16-sr"}, "bf16", None, "needs optim.name = 'adamw8bit_aligned'"),
    ({"name": ALIGNED, "master": "none"}, "fp32", None, "needs model.precision = 'bf16'"),
    ({"name": ALIGNED, "master": "none"}, "bf16", 2, "one process without --ds_config"),
    ({"name": ALIGNED, "offload": "states"}, "bf16", 3, "ds_zero3_offload.json"),
    ({"name": ALIGNED, "offload": "states+gradients"}, "fp32", None, "summed on the device of the weights"),
]


@pytest.mark.parametrize("optim, precision, stage, words", OPTIONS_REFUSED)
def test_optimizer_options_that_do_not_work_together(
    optim: dict[str, str], precision: str, stage: int | None, words: str
) -> None:
    settings = toy.settings(optim["name"], precision, **{k: v for k, v in optim.items() if k != "name"})
    ds = None if stage is None else {"zero_optimization": {"stage": stage}}
    with pytest.raises(ConfigError, match=words):
        combinations.check_combination(settings, precision, World(), ds)
