"""Network weights that were drawn at random, kept as seeds: a few kilobytes stand for megabytes, bit for bit.

A file of drawn weights (safetensors) holds, in its metadata, a JSON object ``draw`` with the seed and, for each
drawn tensor, where its numbers start in the generator's stream. What was not drawn is stored as it is. Kinds:

uniform   ``u * 2 * bound - bound``, as ``torch.nn.init.kaiming_uniform_`` fills a layer
noise     ``base + scale * n`` with ``n`` normal, upon the weights of another network

torch's CPU generator is the Mersenne Twister that numpy has too, and numpy promises to keep its stream, so that no
version of torch or diffusers matters. Normal numbers need logarithms and cosines, which torch rounds in its own way:
the few that come out otherwise here are stored (``fix.index``, ``fix.value``). A SHA-256 guards the result.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

Array = np.ndarray


def stream(seed: int, count: int) -> Array:
    """The 24 random bits that torch makes each float32 of, [count]."""
    words = np.random.RandomState(seed).randint(0, 2**32, count, dtype=np.uint32)
    return words & 0xFFFFFF


def uniform(bits: Array, bound: float) -> Array:
    """Between -bound and bound, as torch rounds it."""
    low, high = np.float32(-bound), np.float32(bound)
    return (bits * 2.0**-24 * np.float64(high - low) + np.float64(low)).astype(np.float32)


def _box_muller(bits: Array) -> Array:
    """Eight radii and eight angles make sixteen numbers; each step is rounded to float32, as in torch."""
    unit = (bits * 2.0**-24).astype(np.float32).reshape(-1, 2, 8)
    radius = np.sqrt(np.float32(-2) * np.log((1 - unit[:, 0]).astype(np.float64)).astype(np.float32))
    angle = (np.float32(2 * math.pi) * unit[:, 1]).astype(np.float64)
    both = [radius * part(angle).astype(np.float32) for part in (np.cos, np.sin)]
    return np.stack(both, axis=1).ravel()


def bits_of_normal(count: int) -> int:
    """How much of the stream ``count`` (at least 16) normal numbers take: the last, incomplete sixteen anew."""
    return count + (16 if count % 16 else 0)


def normal(bits: Array, count: int) -> Array:
    """[count] from ``bits_of_normal(count)`` of the stream."""
    whole = count // 16 * 16
    made = np.empty(count, np.float32)
    made[:whole] = _box_muller(bits[:whole])
    if count % 16:
        made[-16:] = _box_muller(bits[count : count + 16])
    return made


def digest(weights: dict[str, Tensor]) -> str:
    """SHA-256 of names and bytes."""
    total = hashlib.sha256()
    for name in sorted(weights):
        total.update(name.encode() + weights[name].contiguous().numpy().astype("<f4").tobytes())
    return total.hexdigest()


def draw(recipe: dict[str, Any], base: dict[str, Tensor]) -> dict[str, Tensor]:
    """The drawn tensors, before corrections."""
    bits = stream(recipe["seed"], recipe["count"])
    weights = {}
    for name, (offset, shape, size) in recipe["tensors"].items():
        count = math.prod(shape)
        if recipe["kind"] == "uniform":
            values = uniform(bits[offset : offset + count], size)
        else:
            noise = normal(bits[offset : offset + bits_of_normal(count)], count)
            values = base[name].numpy().ravel() + np.float32(size) * noise
        weights[name] = torch.from_numpy(values.reshape(shape))
    return weights


def correct(weights: dict[str, Tensor], index: Tensor, value: Tensor) -> None:
    """Puts values in place; ``index`` counts through the drawn tensors in the order of their names."""
    start, places = 0, index.long()
    for name in sorted(weights):
        flat = weights[name].view(-1)
        here = (places >= start) & (places < start + flat.numel())
        flat[places[here] - start] = value[here]
        start += flat.numel()


def read(file: Path, base: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """All weights of a network. ``base``: the other network's, for noise."""
    with safe_open(file, "pt") as stored:
        recipe = json.loads(stored.metadata()["draw"])
        kept = {name: stored.get_tensor(name) for name in stored.keys()}
    weights = draw(recipe, base or {})
    if "fix.index" in kept:
        correct(weights, kept.pop("fix.index"), kept.pop("fix.value"))
    weights |= kept
    if digest(weights) != recipe["sha256"]:
        raise RuntimeError(f"{file}: the weights drawn on this machine are not those of the golden values")
    return weights
