"""LoRAs extracted from a full fine-tune: the best approximation of each layer, and errors that are true."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.pipelines import CPU, Maker, settings

from smpo_fast.common.errors import ModelError
from smpo_fast.config.schema import Model
from smpo_fast.models import lora, lora_extraction
from smpo_fast.models.load import load_unet
from smpo_fast.models.locate import find
from smpo_fast.models.lora_extraction import Extraction, extract, low_rank

Weights = dict[str, torch.Tensor]


def matrix(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def product(down: torch.Tensor, up: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return (up.flatten(1) @ down.flatten(1)).reshape(like.shape)


@pytest.mark.parametrize("shape", [(24, 10), (10, 24), (12, 12), (8, 6, 3, 3), (16, 8, 1, 1)])
def test_no_factors_of_that_rank_are_closer(shape: tuple[int, ...]) -> None:
    """The error is that of the singular values that are left out, by another algorithm; shapes are as peft's."""
    change = matrix(*shape)
    singular = torch.linalg.svdvals(change.flatten(1).double())
    for rank in (1, 4):
        down, up = low_rank(change, rank, 1.0)
        assert down.shape == (rank, *shape[1:]) and up.shape == (shape[0], rank, *[1] * (len(shape) - 2))
        missed = torch.linalg.vector_norm(change - product(down, up, change))
        assert missed.item() == pytest.approx(singular[rank:].square().sum().sqrt().item(), rel=1e-5)
        assert torch.linalg.vector_norm(down).item() == pytest.approx(torch.linalg.vector_norm(up).item(), rel=1e-5)


def test_the_rank_is_the_smallest_that_keeps_the_share() -> None:
    change = torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.5]))  # squares 9, 4, 1, 0.25 of 14.25
    ranks = {energy: len(low_rank(change, 4, energy)[0]) for energy in (0.6, 0.64, 0.9, 0.95, 0.99, 1.0)}
    assert ranks == {0.6: 1, 0.64: 2, 0.9: 2, 0.95: 3, 0.99: 4, 1.0: 4}
    assert len(low_rank(change, 2, 0.99)[0]) == 2


def test_a_change_of_low_rank_has_no_factors_of_rounding_errors() -> None:
    change = matrix(40, 3) @ matrix(3, 30)
    down, up = low_rank(change, 16, 1.0)
    assert len(down) == 3
    torch.testing.assert_close(product(down, up, change), change, rtol=1e-5, atol=1e-5)


def tuned(model: Model, rank: int = 0) -> tuple[Weights, Weights]:
    """The weights of a base, and of a fine-tune of it whose matrices changed by something of a rank (0: full)."""
    base = dict(load_unet(find(model), model, torch.float32, CPU).state_dict())
    seeded = torch.Generator().manual_seed(0)

    def changed(value: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(value.shape, generator=seeded)
        if value.ndim < 2 or not rank:
            return value + 1e-3 * noise
        flat = noise.flatten(1)
        return value + 1e-3 * (flat[:, :rank] @ flat[:rank]).reshape(value.shape)

    return base, {name: changed(value) for name, value in base.items()}


def extracted(model: Model, state: Weights, rank: int = 4, energy: float = 1.0) -> Extraction:
    return extract(find(model), model, state, rank=rank, energy=energy, resolution=32, device=CPU)


@pytest.mark.parametrize("kind", ["sdxl", "sd15"])
def test_a_change_of_that_rank_is_found_again(kind: str, sd15_pipeline: Maker) -> None:
    """All that is missed is what norms and biases have changed; merged, the matrices are the trained ones."""
    path = "embedded" if kind == "sdxl" else sd15_pipeline("epsilon")
    model = settings(path, export_dtype="float32")
    base, state = tuned(model, rank=2)
    found = extracted(model, state, rank=2)
    merged = lora.merged_state(find(model), model, found.adapters)
    for name, value in merged.items():
        torch.testing.assert_close(value, state[name] if value.ndim > 1 else base[name], rtol=1e-5, atol=1e-6)
    assert max(layer.error for layer in found.layers) < 1e-3 and found.prediction_error < 0.9
    assert found.left_out == pytest.approx(
        sum((state[n] - base[n]).square().sum().item() for n in base if base[n].ndim < 2)
    )


def test_errors_are_those_of_the_merged_weights(sd15_pipeline: Maker) -> None:
    """Of the rounded adapters: predictions and weights of the merged network, computed apart."""
    model = settings(sd15_pipeline("epsilon"), export_dtype="bfloat16")
    base, state = tuned(model)
    found = extracted(model, state, rank=8, energy=0.9)
    assert {t.dtype for t in found.adapters.tensors.values()} == {torch.bfloat16}
    assert len({layer.rank for layer in found.layers}) > 1 and max(layer.rank for layer in found.layers) == 8
    merged = lora.merged_state(find(model), model, found.adapters)
    for layer in found.layers:
        name = f"{layer.layer}.weight"
        norms = [torch.linalg.vector_norm(state[name] - x[name]) for x in (merged, base)]
        assert layer.error == pytest.approx((norms[0] / norms[1]).item(), rel=1e-3)
    inputs = lora_extraction._probe(find(model), 32, CPU)
    unet = load_unet(find(model), model, torch.float32, CPU)
    predictions = []
    for weights in (base, merged, state):
        unet.load_state_dict(weights)
        with torch.no_grad():
            predictions.append(lora_extraction._predict(unet, inputs))
    moved, off = (torch.linalg.vector_norm(predictions[2] - p) for p in predictions[:2])
    assert found.prediction_error == pytest.approx((off / moved).item(), rel=1e-2) and found.prediction_error < 1
    again = extracted(model, state, rank=8, energy=0.9)
    assert all(torch.equal(t, again.adapters.tensors[n]) for n, t in found.adapters.tensors.items())


def test_more_rank_is_closer(sd15_pipeline: Maker) -> None:
    model = settings(sd15_pipeline("epsilon"), export_dtype="float32")
    _, state = tuned(model)
    few, many = (extracted(model, state, rank=rank) for rank in (2, 8))
    assert many.prediction_error < few.prediction_error
    assert all(a.error >= b.error for a, b in zip(few.layers, many.layers, strict=True))


def test_the_report_says_what_is_lost() -> None:
    layers = [lora_extraction.LayerChange("a", 4, 3.0, 1.0), lora_extraction.LayerChange("b", 2, 1.0, 0.04)]
    said = Extraction(lora.Adapters({}, {}), layers, 1.0, 0.25).report()
    assert (
        "2 layers, ranks 2 to 4" in said
        and f"change {math.sqrt(2.04 / 5):.3f}, of the UNet's predictions 0.250" in said
    )
    assert "20.00% of the squared change is in norms and biases" in said and "worst layers: a 0.577, b 0.200" in said


def test_a_network_that_has_not_changed_has_no_lora(sd15_pipeline: Maker) -> None:
    model = settings(sd15_pipeline("epsilon"))
    base, _ = tuned(model)
    with pytest.raises(ModelError, match="no layer of the UNet has changed"):
        extracted(model, base)


def test_weights_that_are_not_finite_are_named(sd15_pipeline: Maker) -> None:
    model = settings(sd15_pipeline("epsilon"))
    _, state = tuned(model)
    state["conv_out.weight"][0, 0, 0, 0] = torch.nan
    with pytest.raises(ModelError, match="conv_out.weight has NaN or infinite values"):
        extracted(model, state)
