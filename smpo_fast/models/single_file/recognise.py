"""Which network a single file holds, told by its header: the names and shapes of its tensors, markers and metadata.

Two tensors without values mark a v-prediction network (``v_pred``) and a schedule with zero terminal SNR (``ztsnr``);
image programs look for them. ``modelspec.*`` is metadata of a specification by Stability AI, which trainers write.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from smpo_fast.common.errors import ModelError
from smpo_fast.models import public_pipelines
from smpo_fast.models.config_files import shown
from smpo_fast.models.single_file import layout
from smpo_fast.models.single_file.header import Header, TensorInfo, read_header, tensor_bytes

_UNET_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "unet.", "model.", "")  # as programs write them
V_PRED, ZTSNR = "v_pred", "ztsnr"
# A tensor by which each part is told, without its prefix.
_MARKS = {
    "vae": "decoder.conv_in.weight",
    "text_encoder": "text_model.embeddings.token_embedding.weight",
    "text_encoder_2": "token_embedding.weight",
}
_DIFFUSERS_VAE = "decoder.mid_block.resnets.0.norm1.weight"
_PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}
_DISTILLED = re.compile(r"turbo|lightning|\blcm\b|hyper-?sd|\bdmd2?\b", re.IGNORECASE)
_ADAPTER = re.compile(r"lora_(up|down|[AB])\b|lora\.(up|down)|lora_linear_layer|\.hada_|\.lokr_|\.oft_")
# Parts of names by which networks of other families are told, and what to do instead.
_OTHERS = (
    ("joint_blocks.", "Stable Diffusion 3"),
    ("double_blocks.", "Flux"),
    ("single_transformer_blocks.", "Flux"),
    ("joint_transformer_blocks.", "AuraFlow"),
    ("cap_embedder.", "Lumina or Z-Image"),
    ("control_model.", "a ControlNet"),
    ("controlnet_cond_embedding.", "a ControlNet"),
    ("motion_modules.", "AnimateDiff"),
    ("emb_params", "a textual inversion"),
    ("string_to_param", "a textual inversion"),
)
# Widths of the prompt's tokens and of the added embedding by which the SD family's other UNets are told.
_OTHER_UNETS = {
    (1024, None): "Stable Diffusion 2: use an SDXL or SD1.5 checkpoint",
    (1280, 2560): "the SDXL refiner, which only finishes what a base has drawn: use a base checkpoint",
}
_OTHER_CHANNELS = {
    5: "a depth-to-image UNet: use the text-to-image checkpoint that it was made from",
    8: "an InstructPix2Pix or upscaler UNet: use the text-to-image checkpoint that it was made from",
    9: "an inpainting UNet: use the text-to-image checkpoint that it was made from",
    16: "a UNet for the latents of Flux's VAE: use a checkpoint with SDXL's own VAE (4 channels)",
    32: "a UNet for the latents of Flux.2's VAE: use a checkpoint with SDXL's own VAE (4 channels)",
}


class Place(NamedTuple):
    """Where a part's tensors are in a file: the prefix of their names, and whether these are the original ones.

    lost: what is missing between prefix and name, because the file was written without an outer module.
    """

    prefix: str
    original: bool
    lost: str = ""


@dataclass(frozen=True)
class SingleFile:
    """A recognised checkpoint. parts: by the names of a diffusers folder's parts; clues: what told the prediction."""

    header: Header
    kind: str  # "sdxl" | "sd15"
    parts: Mapping[str, Place]
    prediction_type: str  # "epsilon" | "v_prediction"
    zero_terminal_snr: bool
    clues: str
    warnings: tuple[str, ...]

    def bytes_of(self, part: str) -> int:
        """Size of a part's tensors."""
        return tensor_bytes(self.header.tensors, self.parts[part].prefix)


def recognise(file: Path, key: str) -> SingleFile:
    """The checkpoint in a file that the setting ``key`` names; only its header is read.

    Raises ModelError, saying what the file is and what to use instead, for anything but an SDXL or SD1.5 UNet, alone or
    with VAE and text encoders.
    """
    header = read_header(file, key)
    here = f"{key}: {file}"
    unet = _unet_place(header.tensors)
    if unet is None:
        raise ModelError(f"{here} {_what_else(header.tensors)}")
    kind = _kind(header.tensors, unet, here)
    parts = {"unet": unet, **_other_parts(header.tensors, kind)}
    _check_numbers(header.tensors, parts, here)
    prediction, clue, warnings = _prediction(header, here)
    zero = ZTSNR in header.tensors or header.metadata.get("ss_zero_terminal_snr") == "True"
    clues = [*clue, *(["ztsnr marker"] if ZTSNR in header.tensors else ["ss_zero_terminal_snr"] if zero else [])]
    return SingleFile(header, kind, parts, prediction, zero, ", ".join(clues), (*warnings, *_distilled(header)))


def recognise_vae(file: Path, key: str, kind: str) -> SingleFile:
    """The VAE in a file that the setting ``key`` names, alone or in a checkpoint, for a pipeline of the ``kind``.

    SDXL's and SD1.5's have the same tensors: only the pipeline tells the scale of the latents. Only the header is read.
    Raises ModelError for a file without a VAE, and for one of another family.
    """
    header = read_header(file, key)
    here = f"{key}: {file}"
    for prefix in (layout.PREFIXES[kind]["vae"], "vae.", ""):
        for original, mark in ((True, "decoder.mid.block_1.norm1.weight"), (False, _DIFFUSERS_VAE)):
            if prefix + mark in header.tensors:
                parts = {"vae": Place(prefix, original)}
                _check_numbers(header.tensors, parts, here)
                return SingleFile(header, kind, parts, "epsilon", False, "", ())
    raise ModelError(f"{here} has no VAE of SDXL or SD1.5: give one, or a checkpoint with one")


def _unet_place(tensors: Mapping[str, TensorInfo]) -> Place | None:
    for prefix in _UNET_PREFIXES:
        for original, first in ((True, "input_blocks.0.0.weight"), (False, "conv_in.weight")):
            middle = "middle_block.0.in_layers.2.weight" if original else "mid_block.resnets.0.time_emb_proj.weight"
            if prefix + first in tensors and prefix + middle in tensors:
                return Place(prefix, original)
    return None


def _other_parts(tensors: Mapping[str, TensorInfo], kind: str) -> dict[str, Place]:
    found = {}
    for part, mark in _MARKS.items():
        prefix = layout.PREFIXES[kind].get(part)
        for candidate in (prefix, "vae.") if part == "vae" else (prefix,):
            if candidate is not None and candidate + mark in tensors:
                found[part] = Place(candidate, True)
    older = layout.PREFIXES[kind]["text_encoder"]
    if f"{older}embeddings.token_embedding.weight" in tensors:  # NovelAI's layout, without the outer module
        found["text_encoder"] = Place(older, True, "text_model.")
    return found


def _kind(tensors: Mapping[str, TensorInfo], unet: Place, here: str) -> str:
    """'sdxl' or 'sd15'. Raises ModelError for all other UNets of the family."""
    first, added = ("input_blocks.0.0", "label_emb.0.0") if unet.original else ("conv_in", "add_embedding.linear_1")
    channels = tensors[f"{unet.prefix}{first}.weight"].shape[1]
    if channels != 4:
        what = _OTHER_CHANNELS.get(channels, "a UNet for other inputs: use a text-to-image checkpoint of SDXL or SD1.5")
        raise ModelError(f"{here} has {channels} input channels, 4 are supported: it is {what}")
    contexts = [info.shape[1] for name, info in tensors.items()
                if name.startswith(unet.prefix) and name.endswith(".attn2.to_k.weight")]  # fmt: skip
    vector = tensors.get(f"{unet.prefix}{added}.weight")
    widths = (contexts[0] if contexts else 0, None if vector is None else vector.shape[1])
    for kind in layout.PREFIXES:
        if widths == public_pipelines.widths(kind):
            break
    else:
        what = _OTHER_UNETS.get(widths, "another architecture than SDXL and SD1.5: use a checkpoint of one of these")
        raise ModelError(
            f"{here} takes prompts of width {widths[0]}, added embeddings of width {widths[1]}: it is {what}"
        )
    for edm in ("edm_mean", "edm_vpred.sigma_max"):
        if edm in tensors:
            raise ModelError(
                f"{here} has the tensor '{edm}': it was trained with EDM noise levels (Playground v2.5, CosXL), which "
                "are not supported: use an SDXL checkpoint that predicts epsilon or v"
            )
    return kind


def _check_numbers(tensors: Mapping[str, TensorInfo], parts: Mapping[str, Place], here: str) -> None:
    for name, info in tensors.items():
        inside = any(name.startswith(place.prefix) for place in parts.values())
        if (inside and info.dtype.startswith(("F8", "U8", "I8"))) or name.endswith((".weight_scale", "scaled_fp8")):
            raise ModelError(
                f"{here} is quantised ('{name}' is {info.dtype}), which cannot be trained: use its float16, bfloat16 "
                "or float32 version"
            )
    latent = tensors.get(f"{parts['vae'].prefix}decoder.conv_in.weight") if "vae" in parts else None
    if latent is not None and latent.shape[1] != 4:
        raise ModelError(
            f"{here} has a VAE with {latent.shape[1]} latent channels, SDXL's and SD1.5's has 4: use a checkpoint with "
            "that VAE"
        )


def _prediction(header: Header, here: str) -> tuple[str, list[str], list[str]]:
    """What the network predicts, by what this is known, and warnings about what contradicts it."""
    said = header.metadata.get("modelspec.prediction_type", "")
    if said and said not in _PREDICTIONS:
        raise ModelError(
            f"{here} predicts {shown(said)} (modelspec.prediction_type), for example as a rectified flow; epsilon and "
            "v are supported"
        )
    if V_PRED in header.tensors:
        contradicted = _PREDICTIONS.get(said) == "epsilon"
        warning = f"{here} has the v_pred marker, but its modelspec.prediction_type is '{said}': v is taken"
        return "v_prediction", ["v_pred marker"], [warning] if contradicted else []
    return _PREDICTIONS.get(said, "epsilon"), ["modelspec.prediction_type"] if said else [], []


def _distilled(header: Header) -> list[str]:
    """A warning for a network that was distilled to few steps."""
    places = {"file name": header.file.stem, **{k: v for k, v in header.metadata.items() if len(v) < 1000}}
    for where, text in places.items():
        if found := _DISTILLED.search(text):
            return [
                f"{header.file}: '{found[0]}' in its {where}: a network distilled to few steps loses that ability when "
                "it is trained as here; train its undistilled base, and apply the distillation's LoRA to the result"
            ]
    return []


def _what_else(tensors: Mapping[str, TensorInfo]) -> str:
    """What a file without a UNet is, for a message."""
    if any(_ADAPTER.search(name) for name in tensors):
        return "is a LoRA: give it as model.lora, and its base as model.path"
    for mark, family in _OTHERS:
        if any(mark in name for name in tensors):
            return f"is {family}, not SDXL or SD1.5: use a checkpoint of one of these"
    if any(name.endswith("decoder.conv_in.weight") for name in tensors):
        return "is a VAE without a UNet: give it as model.vae, and a checkpoint here"
    some = ", ".join(shown(name) for name in sorted(tensors)[:3])
    return f"has no UNet of SDXL or SD1.5 (it holds {some or 'no tensors'})"
