"""A run before anything heavy is loaded: everything that can be refused is refused here."""

from __future__ import annotations

import importlib.util
import json
from functools import cached_property
from pathlib import Path
from typing import Any

from smpo_fast.common.errors import UserError
from smpo_fast.common.runtime import world_from_environment
from smpo_fast.config.schema import Config
from smpo_fast.data.cache import format as cache_format
from smpo_fast.data.cache import identity, location
from smpo_fast.data.cache.reader import CachedPairs
from smpo_fast.data.pairs import reader
from smpo_fast.engine import ds_config, protocol
from smpo_fast.evaluation import compare
from smpo_fast.method import inversion
from smpo_fast.models import kernel_patch, lora, step_ops
from smpo_fast.models.identity import encoders_identity, weights_identity
from smpo_fast.models.inference import checks
from smpo_fast.models.locate import ModelSource, find, schedule_of
from smpo_fast.training import reference


class Job:
    """A run before anything heavy is loaded: everything that can be refused is refused here."""

    def __init__(self, settings: Config, ds_file: Path | None) -> None:
        self.config, self.ds_file = settings, ds_file
        self.world = world_from_environment(settings.run.device)
        self.source: ModelSource = find(settings.model)
        raw = ds_config.read_ds_file(ds_file) if ds_file else None
        self.precision = ds_config.resolve_precision(settings, raw, self.world.device)
        self.ds_settings: dict[str, Any] | None = None
        self.filled: dict[str, Any] = {}
        if raw is not None:
            self.ds_settings, self.filled = ds_config.resolve_ds_settings(
                raw, str(ds_file), settings, self.world.size, self.precision
            )
        ds_config.check_combination(settings, self.precision, self.world, self.ds_settings)
        stage = -1 if self.ds_settings is None else ds_config.zero_stage(self.ds_settings)
        checks.check(settings, self.world.device, stage)
        lora.check(settings, self.source)
        self.reference = reference.resolve(settings, self.ds_settings)
        protocol.pairs_per_rank(settings, self.world.size)
        if settings.drawn_per_step % self.world.size:
            raise UserError(
                f"batch.pairs_per_step = {settings.batch.pairs_per_step} at inversion.per_trajectory = "
                f"{settings.inversion.per_trajectory} draws {settings.drawn_per_step} pairs, which do not divide among "
                f"{self.world.size} ranks"
            )
        for module, project in (("wandb", settings.log.wandb), ("trackio", settings.log.trackio)):
            if project and importlib.util.find_spec(module) is None:
                raise UserError(f"log.{module} = '{project}', but {module} is not installed: pip install {module}")
        compare.check(settings)
        kernel_patch.check(settings, self.world.device)
        step_ops.check(settings)
        self.run_dir = Path(settings.run.dir)
        self.cache_dir = location.locate(settings)
        self.encoders = encoders_identity(self.source)
        if location.exists(self.cache_dir):
            self.open_cache()
        else:
            reader.columns(reader.source_path(settings.data.pairs))

    def open_cache(self) -> CachedPairs:
        """The prepared cache; raises CacheError when it is damaged or made for other settings or networks."""
        return identity.open_cache(self.config, self.cache_dir, encoders=self.encoders, kind=self.source.kind)

    def plan(self) -> str:
        """What the run will do, in a few lines."""
        c, per_rank = self.config, protocol.pairs_per_rank(self.config, self.world.size)
        schedule = schedule_of(self.source, c.inversion)
        depths = [schedule.path(t, c.inversion).depth for t in range(len(schedule))]
        asked = sum(inversion.network_calls(d, c.inversion) for d in depths) / len(depths)
        return "\n".join(
            [
                f"model      {self.source.kind}, {self.source.prediction_type}, {self.source.folder}",
                f"objective  {c.objective.name}, beta {c.objective.beta:g}; x_t by {c.inversion.source} "
                f"({c.inversion.fidelity}, {c.inversion.solver}), {asked:.2f} no-gradient calls a picture",
                f"step       {c.batch.pairs_per_step} pairs = {self.world.size} ranks x {per_rank} pairs "
                f"in micro-batches of {c.batch.micro_pairs}; {c.run.steps} steps",
                f"optimizer  {c.optim.name}, lr {c.optim.lr:g}, {self.precision}, "
                + (
                    f"DeepSpeed {self.ds_file} (filled in: {json.dumps(self.filled)})"
                    if self.ds_file
                    else "plain PyTorch"
                ),
                f"weights    {self.trained()}; reference: {self.reference}",
                f"run        {self.run_dir}",
            ]
        )

    def trained(self) -> str:
        """Which weights are trained, in words."""
        adapters = self.config.lora
        if not adapters.rank:
            return "all are trained"
        kind = "DoRA" if adapters.use_dora else "LoRA"
        return f"{kind} of rank {adapters.rank} on {', '.join(adapters.targets)}, the base frozen"

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What a checkpoint must agree on to be continued."""
        c, prepared = self.config, cache_format.read_info(self.cache_dir).identity
        frozen = {"objective": c.objective, "inversion": c.inversion, "labels": c.labels, "optim": c.optim}
        frozen["lora"] = c.lora
        sections = {name: section.model_dump() for name, section in frozen.items()}
        # where the numbers are kept, and what is written at the end: not what the numbers are
        del sections["inversion"]["store"], sections["lora"]["merge"], sections["optim"]["offload"]
        return {
            **sections,
            "seed": c.run.seed,
            "pairs_per_step": c.batch.pairs_per_step,
            "model": weights_identity(self.source.unet_folder),
            "pairs": {name: prepared[name] for name in ("source", "max_pairs", "encoders", "resolution", "buckets")},
            "precision": self.precision,
            "prompt_dropout": c.data.prompt_dropout,
            "flip": c.data.flip,
            "conditioning": c.data.conditioning,
        }
