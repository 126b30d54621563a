"""The public Python API: what the programs do, as functions for notebooks and other programs (docs/api.md).

Every function here calls those that the programs call. What a user can correct is raised as a ``UserError``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from smpo_fast.common import programs
from smpo_fast.common.errors import ConfigError
from smpo_fast.config import loading
from smpo_fast.config.commands import ScoreOptions, TrainArguments
from smpo_fast.config.schema import Config, Model

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image
    from torch import Tensor

    from smpo_fast.method.batch import Conditioning
    from smpo_fast.models.encoders import LoadedEncoders

# As in the programs, torch and diffusers are imported where they are used: `smpo_fast.load_recipe` needs neither.


class Inverted(NamedTuple):
    """Noisy latents and the noise in them, float32 [N, C, H, W], with ``x_t = signal_t x_0 + noise_t tau``.

    N is 1 for an image, 2 for a pair; x_0 are the clean latents.
    """

    x_t: Tensor
    tau: Tensor
    x_0: Tensor


def load_recipe(recipe: str | Path | None = None, settings: Mapping[str, Any] | None = None) -> Config:
    """The settings of a run.

    recipe: the name of a shipped recipe, such as 'sdxl_smpo', or a TOML file; None: the embedded miniature.
    settings: values by ``section.key`` that override it. Raises ConfigError, which names the key that is wrong.
    """
    words = [f"{key}={loading.toml_value(value)}" for key, value in (settings or {}).items()]
    return loading.load(None if recipe is None else Path(recipe), words)


def align(settings: Config, *, ds_config: str | Path | None = None) -> Path:
    """Train as ``smpo train`` does: prepare, train, export and evaluate; returns the run folder.

    ds_config: a DeepSpeed file, or the name of a shipped one. A run that was stopped by a signal, or is started again,
    continues from its last checkpoint. Raises UserError for settings or data that cannot be used.
    """
    # imported here already: while train.run imports them, Ctrl-C would end the whole process, a notebook's as well
    import smpo_fast.training.run
    import smpo_fast.tuning.speed  # noqa: F401
    from smpo_fast import train

    programs.configure_allocator()
    train.run(settings, TrainArguments(ds_config=None if ds_config is None else Path(ds_config)))
    return Path(settings.run.dir)


def score_images(
    images: Sequence[Image], prompts: Sequence[str], scorer: str, *, device: str = "auto"
) -> np.ndarray[Any, Any]:
    """The reward of each image for its prompt, float32 [N], higher is better.

    scorer: 'pickscore', 'hpsv2.1', .. (docs/data.md), 'embedded', or 'module:function'.  device: 'auto', 'cpu' or
    'cuda'. Raises ConfigError for an unknown scorer, ModelError for one that cannot be loaded.
    """
    from smpo_fast.common.runtime import world_from_environment
    from smpo_fast.data.rewards.scorers import load_scorer

    if len(images) != len(prompts):
        raise ConfigError(f"score_images: {len(images)} images, but {len(prompts)} prompts: give one for each image")
    return load_scorer(scorer, world_from_environment(device).device)(images, prompts)


def score_pairs(
    pairs: str | Path, out: str | Path, scorer: str, *, batch: int = 32, max_pairs: int = 0, device: str = "auto"
) -> np.ndarray[Any, Any]:
    """Score a pair table as ``smpo score`` does; returns the scores of both images of each usable row, [N, 2].

    pairs: as ``data.pairs``.  out: the folder for the scores; training reads it as ``data.scores``.  scorer: also a
    weighted sum, '0.7*pickscore + 0.3*aesthetic'.  max_pairs: only the first so many rows; 0: all. Raises UserError
    like ``smpo score``.
    """
    from smpo_fast.common.runtime import world_from_environment
    from smpo_fast.data.rewards import score_table, scoring

    options = ScoreOptions(scorer=scorer, batch=batch, max_pairs=max_pairs)
    labels = loading.load(loading.NO_FILE).labels
    scoring.score(str(pairs), Path(out), options, world_from_environment(device), labels)
    return score_table.read_pairs(Path(out))["rewards"]


def invert(
    pipeline: Any, image: Image | Tensor | Sequence[Image | Tensor], prompt: str, t: int, settings: Config | None = None
) -> Inverted:
    """Carry an image up to the noise level of timestep ``t``, along the path on which the pipeline would sample it.

    pipeline: a diffusers SDXL or SD1.5 pipeline, which is left as it was, or anything that ``model.path`` may be.
    image: a picture, or pixels [3, H, W] in -1 .. 1; or two of one size, a pair, at the cost of one: the networks see
    two images in any case.  settings: its ``[inversion]`` is used; None: the paper's.

    Raises ModelError for a pipeline of another kind, ConfigError for a timestep that the schedule does not have, for
    images that do not fit and for settings without an inversion.
    """
    import torch

    from smpo_fast.common.runtime import COMPUTE_DTYPES
    from smpo_fast.method import inversion
    from smpo_fast.models.denoiser import Denoiser, borrowed
    from smpo_fast.models.loaded_pipeline import encoders_of, source_of
    from smpo_fast.models.locate import schedule_of

    chosen = (settings or loading.load(loading.NO_FILE)).inversion
    if chosen.source != "inversion" or chosen.noise:
        raise ConfigError("invert: settings with inversion.source = 'inversion' and inversion.noise = 0 are needed")
    loaded = _load(pipeline) if isinstance(pipeline, (str, Path)) else pipeline
    source = source_of(loaded)
    schedule, encoders = schedule_of(source, chosen), encoders_of(loaded, source)
    if not 0 <= t < len(schedule):
        raise ConfigError(f"invert: t = {t} is not a timestep of this pipeline: 0 to {len(schedule) - 1}")
    images = list(image) if isinstance(image, Sequence) else [image]
    clean, cond = _encoded(images, prompt, encoders)
    precision = {dtype: name for name, dtype in reversed(COMPUTE_DTYPES.items())}[loaded.unet.dtype]

    def predictor(rows: slice) -> inversion.NoisePredictor:
        inputs = denoiser.unet_inputs(cond)

        def eps(x: Tensor, timesteps: Tensor, *, refinement: bool = False) -> Tensor:
            return denoiser.as_eps(denoiser.predict(x, timesteps, inputs), x, timesteps[:, 0])

        return eps

    with borrowed(loaded.unet), torch.no_grad():
        denoiser = Denoiser(loaded.unet, source, schedule, precision, loaded.unet.device)
        x_t, tau = inversion.invert(predictor, clean, [schedule.path(t, chosen)], chosen, chunk=1)
    return Inverted(*(found[: len(images)] for found in (x_t[-1, 0], tau[-1, 0], clean[0])))


def _load(where: str | Path) -> Any:
    import torch

    from smpo_fast.common.runtime import world_from_environment
    from smpo_fast.models.load import load_pipeline
    from smpo_fast.models.locate import find

    pipeline = load_pipeline(find(Model(path=str(where))), torch.float32)
    return pipeline.to(world_from_environment().device)


def _encoded(images: Sequence[Image | Tensor], prompt: str, encoders: LoadedEncoders) -> tuple[Tensor, Conditioning]:
    """The latents of one image, twice, or of two, [1, 2, C, H, W], and the conditioning that a sampler would use."""
    import torch

    from smpo_fast.method.batch import Conditioning

    pixels = [_pixels(image, encoders.factor) for image in images]
    if len(pixels) not in (1, 2) or len({p.shape for p in pixels}) != 1:
        raise ConfigError("invert: give one image, or two of the same size")
    mean, _ = encoders.encode_images(torch.stack(pixels))
    embeds, pooled = encoders.encode_prompts([prompt])
    height, width = pixels[0].shape[1:]
    time_ids = torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32, device=encoders.device)
    cond = Conditioning(embeds, pooled, None if pooled is None else time_ids)
    return mean[[0, len(images) - 1]][None], cond


def _pixels(image: Image | Tensor, factor: int) -> Tensor:
    """Pixels [3, H, W] in -1 .. 1. The sides of a picture are cut to multiples of ``factor``, which a VAE needs."""
    import torch

    from smpo_fast.data import aspect_buckets, images

    if isinstance(image, torch.Tensor):
        if image.ndim != 3 or image.shape[0] != 3 or image.shape[1] % factor or image.shape[2] % factor:
            found = list(image.shape)
            raise ConfigError(f"invert: pixels of shape {found}; needed is [3, H, W] with multiples of {factor}")
        return image.float()
    size = (image.height // factor * factor, image.width // factor * factor)
    pixels, _ = aspect_buckets.fit(images.upright_rgb(image), size)
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1
