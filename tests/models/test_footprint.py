"""What a network call costs: counts of the true networks, lines that are lines, and a real pass beside them."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from architectures import SD15, SDXL, SDXL_TOY, Architecture, make_inputs, make_unet  # noqa: E402

from smpo_fast.common.errors import ConfigError  # noqa: E402
from smpo_fast.config.schema import Lora
from smpo_fast.models import footprint  # noqa: E402
from smpo_fast.models.network_spec import NetworkSpec
from smpo_fast.models.tracing import LiveBytes


def network(a: Architecture, **more: Any) -> NetworkSpec:
    return NetworkSpec.make(a.unet, a.kind, (4, a.latent, a.latent), (a.tokens, a.prompt_width), **more)


@pytest.mark.parametrize(("which", "wanted"), [(SDXL, 2_567_463_684), (SD15, 859_520_964)], ids=["sdxl", "sd15"])
def test_parameters_of_the_true_networks(which: Architecture, wanted: int) -> None:
    found = footprint.parameter_shapes(network(which))
    assert footprint.numel(found.trained) == wanted and found.frozen == ()


def test_a_call_of_sdxl_is_counted_once() -> None:
    """6.7613 TFLOP a picture (frozen in test_counts.py), and less than a third of a GB a pair beside the weights."""
    cost = footprint.inference_cost(network(SDXL), "bf16")
    assert round(cost.flops / 1e12, 4) == 6.7612 and cost.peak.fixed == 0
    assert cost.peak.per_pair / 1e9 == pytest.approx(0.331, abs=1e-3)
    assert footprint.inference_cost(network(SDXL), "bf16") is cost


def test_pairs_that_a_budget_allows() -> None:
    def within(a: Architecture, gigabytes: float, dtype: torch.dtype = torch.bfloat16) -> int:
        shape = (4, a.latent, a.latent)
        return footprint.inversion_pairs_within(a.unet, a.kind, shape, (a.tokens, a.prompt_width), dtype, gigabytes)

    assert within(SDXL, 8.0) == 22 and within(SDXL, 16.0) == 44
    assert within(SDXL, 0.1) == 1, "one pair is the least there is"
    assert within(SDXL_TOY, 0.01) == 19 and within(SDXL_TOY, 0.01, torch.float32) == 9


def test_what_every_call_needs_is_taken_from_the_budget_once() -> None:
    """Under autocast the casts of trained weights, which do not grow with the pairs."""
    small = network(SDXL_TOY)
    peak = footprint.inference_cost(small, "bf16-autocast").peak
    assert peak.fixed > peak.per_pair
    three = peak.at(3) + 3 * footprint.prompt_bytes(small, "bf16-autocast")
    allowed = [footprint.pairs_within(budget, small, "bf16-autocast") for budget in (three - 1, three)]
    assert allowed == [2, 3]


def test_bytes_of_a_prompt_s_keys_and_values() -> None:
    """70 cross-attentions of SDXL, 10 of them 640 wide and 60 of them 1,280: two bf16 numbers for each of 77 tokens."""
    assert footprint.prompt_bytes(network(SDXL), "bf16") == 2 * 2 * 77 * (10 * 640 + 60 * 1280)


@pytest.mark.parametrize(("precision", "checkpointing"), [("bf16", False), ("bf16", True), ("bf16-autocast", False)])
def test_the_line_holds_for_more_pairs(precision: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    small = network(SDXL_TOY)
    line = footprint.training_cost(small, precision, checkpointing).peak
    inputs = NetworkSpec.inputs
    monkeypatch.setattr(NetworkSpec, "inputs", lambda self, pairs, *rest: inputs(self, 5 * pairs, *rest))
    five = footprint.training_cost.__wrapped__(small, precision, checkpointing).peak
    assert line.at(5) == pytest.approx(five.at(1), rel=0.1)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_plan_of_a_backward_pass_is_what_a_real_one_takes(checkpointing: bool) -> None:
    """The same pass with real tensors on the CPU, every storage followed from its making to its end."""
    line = footprint.training_cost(network(SDXL_TOY), "fp32", checkpointing).peak
    unet: Any = make_unet(SDXL_TOY, torch.device("cpu"), torch.float32).train()
    if checkpointing:
        unet.enable_gradient_checkpointing()
    for parameter in unet.parameters():
        parameter.register_post_accumulate_grad_hook(footprint.drop_gradient)
    args, kwargs = make_inputs(SDXL_TOY, 2 * 3, torch.device("cpu"), torch.float32)
    with LiveBytes(unet.parameters(), device="cpu") as live:
        held = live.now
        unet(*args, **kwargs)[0].square().sum().backward()
    assert line.at(3) == pytest.approx(live.peak - held, rel=0.1)


def test_checkpointing_saves_memory_and_costs_a_forward_pass() -> None:
    plain, again = (footprint.training_cost(network(SDXL_TOY), "bf16", c) for c in (False, True))
    forward = footprint.inference_cost(network(SDXL_TOY), "bf16").flops
    assert again.peak.per_pair < plain.peak.per_pair / 2
    assert plain.flops < again.flops <= plain.flops + forward


def test_autocast_keeps_its_casts_of_trained_weights_only() -> None:
    small = network(SDXL_TOY)
    halves = 2 * footprint.numel(s for s in footprint.parameter_shapes(small).trained if len(s) > 1)
    assert footprint.training_cost(small, "bf16-autocast", False).peak.fixed == pytest.approx(halves, rel=0.02)
    assert footprint.inference_cost(small, "bf16-autocast", trained=True).peak.fixed > 0.9 * halves
    assert footprint.inference_cost(small, "bf16-autocast", trained=False).peak.fixed == 0
    assert torch.nn.functional.linear.__module__ != footprint.__name__, "torch is left as it was"


def test_eager_attention_takes_more() -> None:
    """The backward pass needs the softmax of every head."""
    fused, eager = (
        footprint.training_cost(network(SDXL_TOY, attention=a), "bf16", False).peak.per_pair for a in ("sdpa", "eager")
    )
    assert eager > fused


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
def test_adapters() -> None:
    plain, small = network(SDXL_TOY), network(SDXL_TOY, lora=Lora(rank=4))
    ends = ("to_q", "to_k", "to_v", "to_out.0")
    layers = [m for name, m in plain.build().named_modules() if name.endswith(ends)]
    found = footprint.parameter_shapes(small)
    assert footprint.numel(found.trained) == sum(4 * (m.in_features + m.out_features) for m in layers) > 0
    assert footprint.numel(found.frozen) == footprint.numel(footprint.parameter_shapes(plain).trained)
    assert (
        footprint.training_cost(small, "bf16", False).flops
        < footprint.training_cost(network(SDXL_TOY), "bf16", False).flops
    )
    with pytest.raises(ConfigError, match="attn9"):
        footprint.parameter_shapes(network(SDXL_TOY, lora=Lora(rank=4, targets=["attn9"])))
