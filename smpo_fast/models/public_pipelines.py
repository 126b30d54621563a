"""The configurations of SDXL base 1.0 and SD1.5, which ship with the package, and their tokenizers' vocabulary."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smpo_fast.common.errors import ModelError
from smpo_fast.models.config_files import read_object

HUB_IDS = {
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
}
# Schedulers of diffusers with the option rescale_betas_zero_snr.
_RESCALING = {
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "UniPCMultistepScheduler",
}
_DATA = Path(__file__).parent / "public"
_MERGES = 49152 - 256 - 2  # CLIP uses the first 48,894 of the file's merges


def folder(kind: str) -> Path:
    """A diffusers folder of the kind 'sdxl' or 'sd15' with all configurations, but neither weights nor vocabulary."""
    return _DATA / kind


def check_weights(folder: Path) -> None:
    """Raise ModelError for a folder of these configurations, which has no weights to load."""
    if folder.is_relative_to(_DATA):
        kind = folder.relative_to(_DATA).parts[0]
        raise ModelError(
            f"model.path = '{kind}' has configurations only, for smpo plan and --dry-run: to load weights, set "
            f"model.path to a checkpoint file, a diffusers folder, or '{HUB_IDS[kind]}'"
        )


def widths(kind: str) -> tuple[int, int | None]:
    """Width of the prompt's tokens and of the added embedding (None without one) that the kind's UNet takes."""
    config = read_object(folder(kind) / "unet" / "config.json")
    return config["cross_attention_dim"], config.get("projection_class_embeddings_input_dim")


def adapted_scheduler(config: Mapping[str, Any], prediction_type: str, zero_terminal_snr: bool) -> dict[str, Any]:
    """A scheduler configuration with another prediction type, and with or without zero terminal SNR.

    With it, sampling must begin at the last timestep, so the spacing is 'trailing'; and a scheduler class that knows no
    such rescaling is replaced by DDIM.
    """
    adapted = {**config, "prediction_type": prediction_type}
    if zero_terminal_snr:
        adapted |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        if config.get("_class_name") not in _RESCALING:
            adapted["_class_name"] = "DDIMScheduler"
    elif config.get("rescale_betas_zero_snr"):
        adapted["rescale_betas_zero_snr"] = False
    return adapted


def write_vocabulary(tokenizer: Path) -> None:
    """Write ``vocab.json`` and ``merges.txt`` of CLIP's tokenizer into a folder: 49,408 tokens.

    The order of the tokens: 256 bytes, the same at the end of a word, one for each merge, start and end of the text.
    """
    lines = gzip.decompress((_DATA / "bpe_simple_vocab_16e6.txt.gz").read_bytes()).decode().split("\n")
    merges = lines[1 : 1 + _MERGES]
    letters = _letters_of_bytes()
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(merge.split()) for merge in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    numbered = {token: i for i, token in enumerate(tokens)}
    (tokenizer / "vocab.json").write_text(json.dumps(numbered, ensure_ascii=False), "utf-8")
    (tokenizer / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), "utf-8")


def _letters_of_bytes() -> list[str]:
    """The printable letter that byte-level encoding has for each byte: printable bytes first, then all others."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = sum(byte not in printable for byte in range(256))
    return [chr(byte) for byte in printable] + [chr(256 + n) for n in range(others)]
