"""Images of the base and of what a run exported, from the same prompts and noise."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from smpo_fast.common.errors import ConfigError
from smpo_fast.config.schema import EMBEDDED, Config
from smpo_fast.embedded import shapes
from smpo_fast.models import lora
from smpo_fast.models.export import exported_model
from smpo_fast.models.load import load_pipeline
from smpo_fast.models.locate import ModelSource, find


def read_prompts(config: Config) -> list[str]:
    """The prompts of ``[eval]``: held-out ones of the embedded world, or the non-empty lines of a text file.

    Raises ConfigError for a file that cannot be read or has no prompt, and if 'embedded' has too few.
    """
    count = config.eval.count
    if config.eval.prompts == EMBEDDED:
        available = shapes.count_prompts("held-out")
        if count > available:
            raise ConfigError(f"eval.count = {count}: eval.prompts = 'embedded' has {available} prompts")
        return shapes.prompts("held-out", count, config.eval.seed)
    try:
        lines = [line.strip() for line in Path(config.eval.prompts).read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"eval.prompts = '{config.eval.prompts}': cannot be read ({error})") from error
    found = [line for line in lines if line]
    if not found:
        raise ConfigError(f"eval.prompts = '{config.eval.prompts}': the file has no prompt")
    return found[:count]


def aligned_pipeline(config: Config, export: Path, source: ModelSource, dtype: torch.dtype) -> Any:
    """What a run exported: a pipeline of its own, or the base ``source`` with a LoRA.

    export: the folder of a pipeline or of a run's adapters, or a LoRA's file.
    """
    file = export / lora.FILE if export.is_dir() else export
    if not file.is_file():
        return load_pipeline(find(exported_model(config.model, export)), dtype)
    pipe = load_pipeline(source, dtype)
    pipe.load_lora_weights(file.parent, weight_name=file.name)
    return pipe


def extracted_lora(config: Config) -> Path | None:
    """The LoRA that a run has extracted from its full fine-tune, if there is one that diffusers reads."""
    folders = [
        Path(config.run.dir) / name for name in ("lora-diffusers", "lora-kohya") if name in config.export.formats
    ]
    files = [file for folder in folders for file in sorted(folder.glob("*.safetensors"))]
    return files[0] if files and not config.lora.rank else None


@torch.no_grad()
def sample(pipe: Any, prompts: Sequence[str], config: Config, label: str) -> list[Image.Image]:
    """One image per prompt, by the pipeline's own sampler; image i starts from noise of seed ``eval.seed + i``."""
    pipe.set_progress_bar_config(disable=True)
    images: list[Image.Image] = []
    for first in tqdm(range(0, len(prompts), config.eval.batch), desc=label, unit="batch"):
        batch = list(prompts[first : first + config.eval.batch])
        seeds = [config.eval.seed + first + i for i in range(len(batch))]
        images += pipe(
            batch,
            num_inference_steps=config.eval.steps,
            guidance_scale=config.eval.guidance,
            generator=[torch.Generator("cpu").manual_seed(s) for s in seeds],
        ).images
    return images
