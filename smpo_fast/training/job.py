"""A run before anything heavy is loaded: its settings are resolved, and every mistake that can be found is refused."""

from __future__ import annotations

import importlib.util
from functools import cached_property
from pathlib import Path
from typing import Any

from smpo_fast.common.errors import ConfigError, EnvironmentProblem
from smpo_fast.common.runtime import World, world_from_environment
from smpo_fast.config.schema import Config
from smpo_fast.data.cache import format as cache_format
from smpo_fast.data.cache import identity, location
from smpo_fast.data.cache.reader import CachedPairs
from smpo_fast.data.pairs import reader
from smpo_fast.engine import batch_size, checkpoint, combinations, ds_config
from smpo_fast.evaluation import compare
from smpo_fast.models import kernel_patch, lora, step_ops
from smpo_fast.models.identity import base_identity, encoders_identity
from smpo_fast.models.inference import checks
from smpo_fast.models.locate import ModelSource, find
from smpo_fast.models.network_spec import check_resolution
from smpo_fast.training import reference
from smpo_fast.training.facts import checkpoint_facts


class Job:
    """The settings of a run, resolved and checked. Raises UserError, naming the setting, for what cannot work.

    speed: what ``run.speed`` has chosen and why, for the user; the settings contain it already.
    """

    def __init__(self, settings: Config, ds_file: Path | None, speed: str = "") -> None:
        self.config, self.ds_file, self.speed = settings, ds_file, speed
        self.world = world_from_environment(settings.run.device)
        self.source: ModelSource = find(settings.model)
        self.precision, self.ds_settings, self.filled = _resolve_engine(settings, ds_file, self.world)
        self.reference = reference.resolve(settings, self.ds_settings)
        self.run_dir = Path(settings.run.dir)
        self._check()
        _check_steps(settings)
        self.cache_dir = location.locate(settings)
        self.encoders = encoders_identity(self.source)
        if location.exists(self.cache_dir):
            self.open_cache()
        else:
            reader.columns(reader.source_path(settings.data.pairs))

    def _check(self) -> None:
        stage = -1 if self.ds_settings is None else ds_config.zero_stage(self.ds_settings)
        checks.check(self.config, self.world.device, stage)
        lora.check(self.config, self.source)
        check_resolution(self.source, self.config.data.resolution)
        _check_batch(self.config, self.world)
        _check_trackers(self.config)
        compare.check(self.config)
        kernel_patch.check(self.config, self.world.device)
        step_ops.check(self.config)

    def open_cache(self) -> CachedPairs:
        """The prepared cache; raises DataError when it is damaged or was made for other settings or networks."""
        return identity.open_cache(self.config, self.cache_dir, encoders=self.encoders, kind=self.source.kind)

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What a checkpoint must agree on to be resumed from."""
        cache = cache_format.read_info(self.cache_dir)
        return checkpoint_facts(self.config, self.precision, base_identity(self.source), cache)


def _resolve_engine(
    settings: Config, ds_file: Path | None, world: World
) -> tuple[str, dict[str, Any] | None, dict[str, Any]]:
    """The precision, the settings for DeepSpeed, and those of them that were filled in."""
    raw = ds_config.read_ds_file(ds_file) if ds_file else None
    precision = combinations.resolve_precision(settings, raw, world.device)
    ds_settings: dict[str, Any] | None = None
    filled: dict[str, Any] = {}
    if raw is not None:
        ds_settings, filled = ds_config.resolve_ds_settings(raw, str(ds_file), settings, world.size, precision)
    combinations.check_combination(settings, precision, world, ds_settings)
    return precision, ds_settings, filled


def _check_batch(settings: Config, world: World) -> None:
    batch_size.pairs_per_rank(settings, world.size)
    if settings.drawn_per_step % world.size:
        raise ConfigError(
            f"batch.pairs_per_step = {settings.batch.pairs_per_step} with inversion.per_trajectory = "
            f"{settings.inversion.per_trajectory} draws {settings.drawn_per_step} pairs per step, which do not divide "
            f"among {world.size} ranks"
        )


def _check_steps(settings: Config) -> None:
    found = checkpoint.newest(settings.run.dir)
    if found is not None and found[1].step > settings.run.steps:
        raise ConfigError(
            f"run.steps = {settings.run.steps}, but the run in {settings.run.dir} has made {found[1].step} steps: set "
            f"run.steps = {found[1].step} to finish that run, or another run.dir to train fewer"
        )


def _check_trackers(settings: Config) -> None:
    for module, project in (("wandb", settings.log.wandb), ("trackio", settings.log.trackio)):
        if project and importlib.util.find_spec(module) is None:
            raise EnvironmentProblem(f"log.{module} = '{project}', but {module} is not installed: pip install {module}")
