"""Makes the compact set beside this file from a full one: ``python tests/golden/make.py FULL [--out FOLDER]``.

Cases and outputs are copied as they are. Weights become seeds where they were drawn (see tests/helpers/drawn.py):
a tensor is stored in full if it cannot be drawn again to the bit.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from helpers import drawn  # noqa: E402

WEIGHTS = "diffusion_pytorch_model.safetensors"
# t = 0, 1, 100, 101, 102, 433, 801, 999; the predictions, which follow from x_t, are kept at 433 only
CASES = ("00", "01", "04", "05", "06", "07", "08", "11")
WITH_PREDICTIONS = ("07",)
PREDICTIONS = ("policy_pred", "ref_pred")
OBJECTIVES = {"dpo": ("00", "01", "03"), "inpo": ("00", "01", "02")}
OUTPUTS_OF_OBJECTIVES = (
    "out64.grad",
    "out64.loss",
    "formula64.grad",
    "formula64.loss",
    "out.m_w",
    "out.m_l",
    "out.r_w",
    "out.r_l",
)
REFERENCE_SEED, POLICY_SEED, NOISE = 0, 1, 0.02


def save_weights(file: Path, weights: dict[str, Tensor], recipe: dict[str, Any], base: dict[str, Tensor]) -> None:
    """Seeds, corrections and what was not drawn; then reads them back and compares."""
    made = drawn.draw(recipe, base)
    order = sorted(made)
    found, wanted = (torch.cat([w[name].flatten() for name in order]) for w in (made, weights))
    index = (found != wanted).nonzero().flatten()
    kept = {name: weights[name] for name in weights if name not in made}
    if len(index):
        kept |= {"fix.index": index.int(), "fix.value": wanted[index].contiguous()}
    recipe["sha256"] = drawn.digest(weights)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(kept, file, {"draw": json.dumps(recipe, separators=(",", ":"))})
    again = drawn.read(file, base)
    assert all(torch.equal(again[name], weights[name]) for name in weights | again)
    print(f"{file}: {len(made)} tensors drawn, {len(kept)} stored, {len(index)} of {len(found)} numbers corrected")


def default_bound(name: str, weights: dict[str, Tensor]) -> float:
    """The bound of torch's default initialisation of a layer."""
    inputs = weights[name.removesuffix(".bias") + ".weight" if name.endswith(".bias") else name][0].numel()
    if name.endswith(".bias"):
        return 1 / math.sqrt(inputs)
    return math.sqrt(3.0) * (math.sqrt(2.0 / (1 + math.sqrt(5) ** 2)) / math.sqrt(inputs))


def uniform_recipe(weights: dict[str, Tensor]) -> dict[str, Any]:
    """Finds every tensor's place in the stream by its first number."""
    count = sum(w.numel() for w in weights.values())
    bits = drawn.stream(REFERENCE_SEED, count)
    places = defaultdict(list)
    for place, number in enumerate(bits.tolist()):
        places[number].append(place)
    tensors = {}
    for name, tensor in weights.items():
        values, bound = tensor.numpy().ravel(), default_bound(name, weights)
        first = round((float(values[0]) / bound + 1) * 2**23)
        for offset in (p for near in range(first - 2, first + 3) for p in places[near]):
            if np.array_equal(drawn.uniform(bits[offset : offset + len(values)], bound), values):
                tensors[name] = [offset, list(tensor.shape), bound]
    return {"kind": "uniform", "seed": REFERENCE_SEED, "count": count, "tensors": tensors}


def noise_recipe(weights: dict[str, Tensor], base: dict[str, Tensor], config: Path) -> dict[str, Any]:
    """The noise was drawn tensor by tensor in the network's own order."""
    unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(config))
    shapes = {name: p.shape for name, p in unet.named_parameters()}
    count = sum(drawn.bits_of_normal(shape.numel()) for shape in shapes.values())
    bits, offset, tensors = drawn.stream(POLICY_SEED, count), 0, {}
    for name, shape in shapes.items():
        if shape.numel() < 16:
            break  # fewer are drawn otherwise; only the network's last tensor is so small
        size, taken = float(NOISE * base[name].abs().mean()), drawn.bits_of_normal(shape.numel())
        noise = drawn.normal(bits[offset : offset + taken], shape.numel())
        guess = base[name].numpy().ravel() + np.float32(size) * noise
        if np.mean(guess != weights[name].numpy().ravel()) < 0.2:
            tensors[name] = [offset, list(shape), size]
        offset += taken
    return {"kind": "noise", "seed": POLICY_SEED, "count": count, "tensors": tensors}


def compact_networks(full: Path, out: Path) -> None:
    policy, reference = (load_file(full / which / WEIGHTS) for which in ("policy", "reference"))
    save_weights(out / "reference" / "drawn.safetensors", reference, uniform_recipe(reference), {})
    recipe = noise_recipe(policy, reference, full / "policy")
    save_weights(out / "policy" / "drawn.safetensors", policy, recipe, reference)
    for which in ("policy", "reference"):
        shutil.copyfile(full / which / "config.json", out / which / "config.json")


def compact_cases(full: Path, out: Path) -> None:
    kept = {}
    for name, value in load_file(full / "cases.safetensors").items():
        case, _, rest = name.partition(".")
        predicted = rest.rpartition(".")[2] in PREDICTIONS
        if case in CASES and (case in WITH_PREDICTIONS or not predicted):
            kept[name] = value
    with safe_open(full / "cases.safetensors", "pt") as file:
        metadata = {**file.metadata(), "n": str(len(CASES))}
    save_file(kept, out / "cases.safetensors", metadata)


def compact_objective(file: Path, cases: tuple[str, ...], out: Path) -> None:
    kept = {}
    for name, value in load_file(file).items():
        case, _, rest = name.partition(".")
        if case in cases and (rest.startswith("in.") or rest in OUTPUTS_OF_OBJECTIVES):
            kept[name] = value
    with safe_open(file, "pt") as stored:
        facts = stored.metadata()
    metadata = {k: v for k, v in facts.items() if not k[0].isdigit() or k.partition(".")[0] in cases}
    out.mkdir(parents=True, exist_ok=True)
    save_file(kept, out / file.name, metadata | {"cases": str(len(cases))})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("full", type=Path)
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args()
    for kind in ("sd15", "sdxl"):
        compact_networks(args.full / kind, args.out / kind)
        compact_cases(args.full / kind, args.out / kind)
    for name, cases in OBJECTIVES.items():
        compact_objective(args.full / "objectives" / f"{name}.safetensors", cases, args.out / "objectives")


if __name__ == "__main__":
    main()
