"""Images of several models from the same prompts and noise. Any number of processes share the work, and resume it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from smpo_fast.common.errors import ConfigError
from smpo_fast.common.runtime import World
from smpo_fast.common.shared_work import AlreadyFinished, SharedWork
from smpo_fast.common.storage import json_hash
from smpo_fast.config.schema import EMBEDDED, Config, Eval
from smpo_fast.embedded import shapes
from smpo_fast.evaluation.contenders import Contender
from smpo_fast.evaluation.image_store import ImageStore
from smpo_fast.models.load import set_sampler

FORMAT = 1  # part of every key: a change here draws all images again
PART_IMAGES = 64


@dataclass(frozen=True)
class Shot:
    """An image to be drawn: its prompt, and its number among all, which decides its noise."""

    prompt: str
    number: int


def shots(config: Config) -> list[Shot]:
    """The images of an evaluation: ``eval.per_prompt`` of the first prompt, then of the next."""
    each = config.eval.per_prompt
    prompts = enumerate(read_prompts(config))
    return [Shot(prompt, each * i + j) for i, prompt in prompts for j in range(each)]


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


def image_keys(contender: Contender, wanted: Sequence[Shot], settings: Eval, dtype: torch.dtype) -> list[str]:
    """The key of each image: a hash of the model, the prompt, the noise, the sampler and the dtype."""
    common = {
        "format": FORMAT,
        "model": contender.identity,
        "sampler": [settings.sampler, settings.steps, settings.guidance],
        "dtype": str(dtype),
    }
    return [json_hash({**common, "prompt": shot.prompt, "noise": _noise_of(settings, shot.number)}) for shot in wanted]


def draw(contender: Contender, wanted: Sequence[Shot], config: Config, store: ImageStore, world: World) -> list[str]:
    """Draw the images that the store does not have yet; returns the keys of all. Returns when all are there."""
    dtype = torch.float16 if world.device.type == "cuda" else torch.float32
    keys = image_keys(contender, wanted, config.eval, dtype)
    work = {"draw": json_hash(keys)}
    if all(key in store for key in keys) and not work_folder(store, work).exists():
        return keys
    pipelines: list[Any] = []

    def part(name: str) -> dict[str, Any]:
        first = PART_IMAGES * int(name.rpartition("-")[2])
        missing = [i for i in range(first, min(first + PART_IMAGES, len(keys))) if keys[i] not in store]
        if missing and not pipelines:
            pipelines.append(_loaded(contender, config.eval, dtype, world))
        for start in range(0, len(missing), config.eval.batch):
            batch = missing[start : start + config.eval.batch]
            images = sample(pipelines[0], [wanted[i] for i in batch], config.eval)
            for i, image in zip(batch, images, strict=True):
                store.add(keys[i], image)
            bar.update(len(batch))
        return {"images": len(missing)}

    total = sum(key not in store for key in keys) if world.size == 1 else None
    with tqdm(total=total, desc=f"sample {contender.name}", unit="image", disable=world.rank != 0) as bar:
        share(store, work, len(keys), world, part)
    return keys


def share(store: ImageStore, work: dict[str, Any], images: int, world: World, part: Any) -> None:
    """Do the parts of some work on a store's images, together with other processes that do the same."""
    names = [f"images-{i:05d}" for i in range(-(-images // PART_IMAGES))]
    first = world.rank * len(names) // world.size
    try:
        with SharedWork(work_folder(store, work), work) as shared:
            shared.do_parts([*names[first:], *names[:first]], part)
            shared.discard()
    except AlreadyFinished:  # by another process, which has removed the folder since
        share(store, work, images, world, part)


def work_folder(store: ImageStore, work: dict[str, Any]) -> Path:
    """Where processes share some work; a killed one leaves it there for the next."""
    return store.folder / f".{json_hash(work)[:16]}"


def _loaded(contender: Contender, settings: Eval, dtype: torch.dtype, world: World) -> Any:
    pipeline = contender.load(dtype).to(world.device)
    pipeline.set_progress_bar_config(disable=True)
    set_sampler(pipeline, settings.sampler)
    return pipeline


@torch.no_grad()
def sample(pipeline: Any, wanted: Sequence[Shot], settings: Eval) -> list[Image.Image]:
    """One image for each shot, from noise that depends on the shot alone."""
    found = pipeline(
        [shot.prompt for shot in wanted],
        num_inference_steps=settings.steps,
        guidance_scale=settings.guidance,
        generator=[_generator(pipeline, settings, shot.number) for shot in wanted],
    ).images
    return list(found)


def _noise_of(settings: Eval, number: int) -> list[Any]:
    """What decides the noise of an image."""
    if settings.noise == "running":
        return ["running", settings.seed, number]
    return ["seed", settings.seed + (number if settings.noise == "index" else 0)]


def _generator(pipeline: Any, settings: Eval, number: int) -> torch.Generator:
    """On the host, so that the noise is the same on every device."""
    rule, seed, *earlier = _noise_of(settings, number)
    generator = torch.Generator("cpu").manual_seed(seed)
    if rule == "running":
        unet = pipeline.unet
        shape = (1, unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
        for _ in range(earlier[0]):
            torch.randn(shape, generator=generator, dtype=unet.dtype)
    return generator
