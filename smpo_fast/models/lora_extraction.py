"""A LoRA from a full fine-tune: the best low-rank approximation of each layer's change, and how far off it is.

By Eckart and Young (1936) the best approximation of rank r, in the Frobenius norm, has the change's r largest singular
values. They are the roots of the eigenvalues of the smaller Gram matrix, of at most 1280 rows for SDXL, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from smpo_fast.common.errors import ModelError
from smpo_fast.common.runtime import rng
from smpo_fast.config.schema import Model
from smpo_fast.models.export import to_export_dtype
from smpo_fast.models.load import load_unet
from smpo_fast.models.locate import ModelSource
from smpo_fast.models.lora import Adapters, scale_1_adapters
from smpo_fast.models.network_spec import network_spec

_SMALLEST = 1e-14  # eigenvalues below this part of the largest are rounding errors
_PROBE_PIXELS = 256  # side of the images that the predictions are compared for: larger ones take a CPU minutes
_PROBE_TIMES = (50, 250, 500, 750)
_WORST = 3  # layers that the report names


class LayerChange(NamedTuple):
    """A layer's rank, and the squared Frobenius norms of its change and of what the LoRA misses of it."""

    layer: str
    rank: int
    change: float
    missed: float

    @property
    def error(self) -> float:
        """Relative error of the change."""
        return math.sqrt(self.missed / self.change)


class Extraction(NamedTuple):
    """An extracted LoRA and its errors.

    left_out: squared norm of the change of norms and biases; prediction_error: of the UNet's predictions for fixed
    random inputs, relative to how far training has moved them.
    """

    adapters: Adapters
    layers: Sequence[LayerChange]
    left_out: float
    prediction_error: float

    def report(self) -> str:
        """What a user needs to judge it, in four lines."""
        changes = sum(layer.change for layer in self.layers)
        total = changes + self.left_out
        missed = sum(layer.missed for layer in self.layers) + self.left_out
        ranks = sorted({layer.rank for layer in self.layers})
        weights, predictions = math.sqrt(missed / total), self.prediction_error
        span = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
        worst = sorted(self.layers, key=lambda layer: layer.error, reverse=True)[:_WORST]
        return (
            f"LoRA extracted from the change of {len(self.layers)} layers, {span}\n"
            f"  relative error of the weights' change {weights:.3f}, of the UNet's predictions {predictions:.3f} "
            "(0: as the trained weights, 1: as the base)\n"
            f"  {self.left_out / total:.2%} of the squared change is in norms and biases, which no LoRA has\n"
            f"  worst layers: {', '.join(f'{layer.layer} {layer.error:.3f}' for layer in worst)}"
        )


@torch.no_grad()
def extract(
    source: ModelSource, model: Model, state: Mapping[str, Tensor], *,
    rank: int, energy: float, resolution: int, device: torch.device,
) -> Extraction:  # fmt: skip
    """Approximate what training has changed by adapters in ``model.export_dtype``.

    state: the trained weights by name; rank: the largest of a layer; energy: share of a layer's squared change to keep,
    by the smallest rank that does; resolution: in px. Errors are those of the rounded adapters. Beside ``state`` it
    needs memory for the base in float32, on the device, and for one layer in float64. Raises ModelError where no layer
    has changed, and like ``to_export_dtype``.
    """
    unet = load_unet(source, model, torch.float32, device).eval()
    inputs = _probe(source, min(resolution, _PROBE_PIXELS), device)
    base = _predict(unet, inputs)
    weights = dict(unet.named_parameters())
    matrices = {f"{name}.weight" for name, m in unet.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    tensors: dict[str, Tensor] = {}
    layers, left_out = [], 0.0
    for name, weight in tqdm(weights.items(), desc="extract LoRA", unit="tensor"):
        change = to_export_dtype({name: state[name]}, "float32")[name].to(device) - weight
        if name not in matrices:
            left_out += float(change.square().sum(dtype=torch.float64))
        elif change.any():
            layer = name.removesuffix(".weight")
            down, up = _rounded(layer, *low_rank(change, rank, energy), model.export_dtype)
            approximation = (up.float().flatten(1) @ down.float().flatten(1)).reshape(change.shape)
            norms = (x.square().sum(dtype=torch.float64).item() for x in (change, change - approximation))
            layers.append(LayerChange(layer, len(down), *norms))
            weight += approximation
            tensors |= {f"{layer}.lora_A.weight": down.cpu(), f"{layer}.lora_B.weight": up.cpu()}
    if not layers:
        raise ModelError("no layer of the UNet has changed: there is no LoRA to extract; was optim.lr 0?")
    extracted = _predict(unet, inputs)
    unet.load_state_dict(state)
    trained = _predict(unet, inputs)
    moved = torch.linalg.vector_norm(trained - base)
    error = float(torch.linalg.vector_norm(extracted - trained) / moved) if moved else 0.0
    return Extraction(scale_1_adapters(tensors, {x.layer: x.rank for x in layers}), layers, left_out, error)


def low_rank(change: Tensor, rank: int, energy: float) -> tuple[Tensor, Tensor]:
    """Factors of the best approximation of a change [outputs, inputs] or [outputs, inputs, height, width], in float32.

    down [r, inputs, ...] and up [outputs, r, ...] with ``up @ down`` close to the change; they are equally large, so
    that half precision holds both. r is the smallest that keeps the share ``energy`` of the squared Frobenius norm, but
    at most ``rank``. The change is not all zero.
    """
    matrix = change.flatten(1).double()
    flat = matrix.shape[0] <= matrix.shape[1]
    values, vectors = torch.linalg.eigh(matrix @ matrix.T if flat else matrix.T @ matrix)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    enough = int((values.cumsum(0) < energy * values.sum()).sum()) + 1
    kept = min(rank, enough, int((values > _SMALLEST * values[0]).sum()))
    roots = values[:kept].sqrt().sqrt()  # of the singular values
    inner = vectors[:, :kept]
    if flat:
        up, down = inner * roots, (inner.T @ matrix) / roots[:, None]
    else:
        up, down = (matrix @ inner) / roots, (inner * roots).T
    window = [1] * (change.ndim - 2)
    return down.float().reshape(kept, *change.shape[1:]), up.float().reshape(-1, kept, *window)


def _rounded(layer: str, down: Tensor, up: Tensor, dtype: str) -> tuple[Tensor, Tensor]:
    cast = to_export_dtype({f"{layer}.lora_A": down.contiguous(), f"{layer}.lora_B": up.contiguous()}, dtype)
    return cast[f"{layer}.lora_A"], cast[f"{layer}.lora_B"]


def _probe(source: ModelSource, resolution: int, device: torch.device) -> list[dict[str, Any]]:
    """Inputs of a call for each of some timesteps: random latents and prompts, the same for a network's shapes."""
    network = network_spec(source, resolution)
    generator = rng(0, "lora probe")

    def normal(*shape: int) -> Tensor:
        return torch.from_numpy(generator.standard_normal((1, *shape), "float32")).to(device)

    calls = []
    for time in _PROBE_TIMES:
        words: dict[str, Any] = {"sample": normal(*network.latent), "timestep": time}
        words["encoder_hidden_states"] = normal(*network.prompt)
        if network.kind == "sdxl":
            sizes = torch.tensor([[resolution, resolution, 0, 0, resolution, resolution]], device=device)
            words["added_cond_kwargs"] = {"text_embeds": normal(network.pooled), "time_ids": sizes.float()}
        calls.append(words)
    return calls


def _predict(unet: nn.Module, calls: Sequence[Mapping[str, Any]]) -> Tensor:
    """The predictions of all calls, in one row.

    They are computed without TF32, whose rounding may be as large as what training has changed.
    """
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        return torch.cat([unet(**words, return_dict=False)[0].flatten() for words in calls])
