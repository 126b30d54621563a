"""LoRA files of ``model.lora``: added to the weights of UNet and text encoders before anything is made of them.

The names that diffusers (three generations), peft and kohya's scripts give to a layer are made from its network's, so
a tensor that belongs to no layer is noticed. W becomes W + scale * alpha / rank * up @ down.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open

from smpo_fast.common.errors import ModelError
from smpo_fast.models.config_files import read_object, shown, some
from smpo_fast.models.pipeline_folder import LORA_FILE, LORA_SETTINGS, PEFT_FILE, PEFT_SETTINGS
from smpo_fast.models.single_file import layout
from smpo_fast.models.single_file.header import Header, read_header
from smpo_fast.models.single_file.parts import classic_names, empty_state

_NAME = re.compile(r"[\w.]+")
# Ends of names, longer ones before those that they end with.
_ENDS = {
    "down": (
        ".lora_linear_layer.down.weight", ".lora.down.weight", ".lora_down.weight", ".lora_A.default.weight",
        ".lora_A.weight", ".down.weight",
    ),
    "up": (
        ".lora_linear_layer.up.weight", ".lora.up.weight", ".lora_up.weight", ".lora_B.default.weight",
        ".lora_B.weight", ".up.weight",
    ),
    "alpha": (".alpha",),
}  # fmt: skip
# Parts of names that tell why a file cannot be merged.
_OTHERS = (
    (("lora_te", "text_encoder", "text_model"), "changes layers that these text encoders do not have"),
    (("dora_scale", "lora_magnitude_vector"), "is a DoRA, and only plain LoRAs can be added"),
    (("hada_", "lokr_", "oft_", "lora_mid"), "is of LyCORIS, and only plain LoRAs can be added"),
)
_ELSEWHERE = "merge it elsewhere and give the result as model.path"


@dataclass(frozen=True)
class BaseLora:
    """A LoRA file that is part of the base, and the factor that it is added with.

    layers: by part of the pipeline and name of the weight, the file's tensors 'down', 'up' and perhaps 'alpha'.
    """

    file: Path
    scale: float
    layers: Mapping[str, Mapping[str, Mapping[str, str]]]

    def __str__(self) -> str:
        return f"{self.file} at {self.scale:g}"


def locate_loras(words: Sequence[str], configs: Mapping[str, Mapping[str, Any]]) -> tuple[BaseLora, ...]:
    """The LoRAs that ``model.lora`` names, checked against networks' configurations by their headers alone.

    A word is ``path`` or ``path:scale``; configs: by part, of the UNet and the text encoders. Raises ModelError for
    what is no LoRA file, and for one of other networks.
    """
    states = {part: empty_state(part, config) for part, config in configs.items()}
    known = {"unet": _unet_layers(states["unet"], configs["unet"])}
    encoders = [part for part in configs if part != "unet"]
    for number, part in enumerate(encoders, start=1):
        known[part] = _text_layers(states[part], part, f"te{number}" if len(encoders) > 1 else "te")
    places = {name: (part, weight) for part, layers in known.items() for name, weight in layers.items()}
    found = []
    for file, scale in map(_located, words):
        header = read_header(file, "model.lora")
        layers = _matched(header, places)
        for part, weights in layers.items():
            for weight, tensors in weights.items():
                _check_shapes(header, tensors, weight, tuple(states[part][weight].shape))
            _peft_settings(header, part)
        found.append(BaseLora(file, scale, layers))
    return tuple(found)


def is_lora(word: str) -> bool:
    """Whether ``path`` or ``path:scale`` is a LoRA's file, or a folder with one."""
    try:
        header = read_header(_located(word)[0], "model.lora")
    except ModelError:
        return False
    return any("lora" in name for name in header.tensors)


def merge_loras(network: Any, part: str, loras: Sequence[BaseLora]) -> None:
    """Add what LoRAs have for a part of a pipeline to its weights in float32, in their order."""
    weights = classic_names(part, dict(network.named_parameters()))
    for lora in loras:
        peft = _peft_settings(read_header(lora.file, "model.lora"), part)
        with safe_open(lora.file, framework="pt") as file, torch.no_grad():
            for weight, tensors in lora.layers[part].items():
                down, up = (file.get_tensor(tensors[which]).float() for which in ("down", "up"))
                rank = len(down)
                usual = peft.alpha(weight.removesuffix(".weight")) or rank
                alpha = float(file.get_tensor(tensors["alpha"])) if "alpha" in tensors else usual
                delta = (up.flatten(1) @ down.flatten(1)).reshape(weights[weight].shape)
                weights[weight] += delta * (lora.scale * alpha / (math.sqrt(rank) if peft.root else rank))


def _located(word: str) -> tuple[Path, float]:
    place, colon, end = word.rpartition(":")
    try:
        scale = float(end) if colon else 1.0
    except ValueError:
        place, scale = word, 1.0
    path = Path(place if colon and place else word)
    for file in (path, path / LORA_FILE, path / PEFT_FILE):
        if file.is_file():
            return file, scale
    raise ModelError(
        f"model.lora: '{word}' is neither a .safetensors file nor a folder with {LORA_FILE} or {PEFT_FILE}; a scale "
        "follows the path after a colon (path:0.8)"
    )


def _unet_layers(names: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, str]:
    """The weight that each possible name of a UNet's layer means."""
    originals = layout.original_names("unet", names, config)
    found = {}
    for weight in names:
        layer = weight.removesuffix(".weight")
        if layer == weight:
            continue
        for known in (layer, originals[weight].name.removesuffix(".weight")):
            found[f"lora_unet_{known.replace('.', '_')}"] = weight
        for prefix in ("unet.", "base_model.model.unet.", "base_model.model.", ""):
            found[prefix + layer] = weight
        attention, _, projection = layer.removesuffix(".0").rpartition(".")
        found[f"unet.{attention}.processor.{projection}_lora"] = weight
        found[f"{attention}.processor.{projection}_lora"] = weight
    return found


def _text_layers(names: Mapping[str, Any], part: str, short: str) -> dict[str, str]:
    """The weight that each possible name of a text encoder's layer means. short: what kohya's scripts call the part."""
    found = {}
    for weight in names:
        layer = weight.removesuffix(".weight")
        if layer != weight:
            found[f"lora_{short}_{layer.replace('.', '_')}"] = weight
            found[f"{part}.{layer}"] = weight
            found[f"{part}.{layer.removeprefix('text_model.')}"] = weight  # of transformers from 5.6 on
    return found


def _matched(header: Header, layers: Mapping[str, tuple[str, str]]) -> dict[str, dict[str, dict[str, str]]]:
    """The layers that a file changes, by part and weight. Raises ModelError if it holds anything else.

    layers: part and weight that a layer's name in the file means.
    """
    found: dict[str, dict[str, dict[str, str]]] = {}
    unknown = []
    for name in header.tensors:
        meant = next(((*layers[stem], which) for stem, which in _stems(name) if stem in layers), None)
        if meant is None:
            unknown.append(name)
        else:
            part, weight, which = meant
            found.setdefault(part, {}).setdefault(weight, {})[which] = name
    for tensors in (tensors for weights in found.values() for tensors in weights.values()):
        if not {"down", "up"} <= set(tensors):
            unknown += tensors.values()
    if unknown or not found:
        names = f"({some(sorted(unknown)) or 'it is empty'})"
        for marks, why in _OTHERS:
            if any(mark in name for mark in marks for name in unknown):
                raise ModelError(f"model.lora: {header.file} {why} {names}: {_ELSEWHERE}")
        raise ModelError(
            f"model.lora: {header.file} is no LoRA of this pipeline: what it holds belongs to no layer {names}"
        )
    return found


def _stems(name: str) -> Iterator[tuple[str, str]]:
    """A name without each ending that it has, and what that ending means."""
    for which, ends in _ENDS.items():
        for end in ends:
            if name.endswith(end):
                yield name.removesuffix(end), which


def _check_shapes(header: Header, layer: Mapping[str, str], weight: str, shape: tuple[int, ...]) -> None:
    down, up = (header.tensors[layer[which]].shape for which in ("down", "up"))
    fits = len(down) >= 2 and down[0] >= 1 and len(up) >= 2 and up[1] == down[0] and math.prod(up[2:]) == 1
    if not fits or (up[0], math.prod(down[1:])) != (shape[0], math.prod(shape[1:])):
        raise ModelError(
            f"model.lora: {header.file} is no LoRA of this pipeline: '{layer['down']}' {list(down)} and "
            f"'{layer['up']}' {list(up)} do not fit {weight} {list(shape)}"
        )


class _PeftSettings(NamedTuple):
    """What peft's settings say of the scale of layers without an alpha of their own.

    usual: alpha, 0 for the rank; root: whether the rank's root divides it; others: alphas by names of layers or their
    ends.
    """

    usual: float
    root: bool
    others: Mapping[str, float]

    def alpha(self, layer: str) -> float:
        """The alpha of a layer, 0 for its rank."""
        return next((a for end, a in self.others.items() if f".{layer}".endswith(f".{end}")), self.usual)


def _peft_settings(header: Header, part: str) -> _PeftSettings:
    """diffusers keeps peft's settings in the file's metadata, behind the part's name, peft in a file beside it."""
    beside = header.file.with_name(PEFT_SETTINGS)
    try:
        if LORA_SETTINGS in header.metadata:
            said = dict(json.loads(header.metadata[LORA_SETTINGS]))
            settings = {name.removeprefix(f"{part}."): value for name, value in said.items()}
        else:
            settings = read_object(beside, "model.lora") if beside.is_file() else {}
        others = {str(end).removeprefix("^"): float(a) for end, a in dict(settings.get("alpha_pattern") or {}).items()}
        usual = float(settings.get("lora_alpha") or 0)
    except (ValueError, TypeError, AttributeError) as error:
        raise ModelError(
            f"model.lora: {header.file}: its peft settings ({LORA_SETTINGS}) cannot be read: {error}"
        ) from error
    if patterns := [end for end in others if not _NAME.fullmatch(end)]:
        raise ModelError(
            f"model.lora: {header.file} has an alpha of its own for some layers by a pattern ({shown(patterns[0])}), "
            f"and only names of layers are understood: {_ELSEWHERE}"
        )
    return _PeftSettings(usual, bool(settings.get("use_rslora")), others)
