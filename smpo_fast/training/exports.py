"""Trained weights in every format that other programs read: at the end of a run, and with ``smpo export``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smpo_fast.common import storage
from smpo_fast.common.errors import CheckpointError, ModelError
from smpo_fast.common.runtime import print0, warn0, world_from_environment
from smpo_fast.config import loading
from smpo_fast.config.commands import ExportArguments
from smpo_fast.config.schema import Config
from smpo_fast.engine import checkpoint
from smpo_fast.models import lora, lora_files
from smpo_fast.models.export import export_pipeline, exported_model, to_export_dtype
from smpo_fast.models.identity import base_identity
from smpo_fast.models.load import empty_unet, load_unet
from smpo_fast.models.locate import ModelSource, find
from smpo_fast.models.lora import Adapters
from smpo_fast.models.lora_extraction import extract
from smpo_fast.models.pipeline_folder import LORA_FILE
from smpo_fast.models.single_file.modelspec import modelspec
from smpo_fast.models.single_file.write import write_single_file
from smpo_fast.training.run_lock import run_lock

Weights = Mapping[str, Tensor] | Adapters
_KINDS = {"raw": "the weights of the last step", "ema": "the average of the weights"}


@dataclass(frozen=True)
class Trained:
    """What is exported.

    kind: 'raw', or 'ema' for their average; weights: of the UNet by name, or its adapters; title: what a file of the
    run's weights is called; step: that they are of; facts: what they are a result of, or nothing where that is not
    known.
    """

    kind: str
    weights: Weights
    title: str
    step: int
    facts: Mapping[str, Any]

    def metadata(self) -> dict[str, str]:
        """Where the weights come from, for the metadata of a file: hashes of the base, the pairs and all settings."""
        if not self.facts:
            return {"smpo.weights": self.kind, "smpo.step": str(self.step)}
        return {
            "smpo.weights": self.kind,
            "smpo.step": str(self.step),
            "smpo.trained_from": storage.json_hash(self.facts["model"]),
            "smpo.trained_on": storage.json_hash(self.facts["pairs"]),
            "smpo.trained_as": storage.json_hash(self.facts),
        }


def exported_weights(config: Config, source: ModelSource, state: Mapping[str, Tensor]) -> Weights:
    """What is exported of a network's parameters, of any shapes by name: all of them, or the adapters.

    Raises ModelError for adapters that are not finite or do not fit ``model.export_dtype``.
    """
    return lora.trained_adapters(config, source, state) if config.lora.rank else state


def write_exports(
    config: Config, source: ModelSource, trained: Trained, folder: Path, formats: Sequence[str], device: torch.device
) -> dict[str, str]:
    """Write weights to ``folder`` in some of the ``formats`` of ``export.formats``; returns what is in which subfolder.

    Weights that are not the first of ``Config.exported`` are written to a subfolder with the name of their kind, so
    that nothing replaces what a run has exported. A folder appears complete or not at all, after what is in it has been
    read again. Without adapters, a LoRA is extracted, on ``device``, and its errors are printed. Raises ModelError for
    weights that cannot be exported, and EnvironmentProblem where the disk does not give back what was written.
    """
    own = trained.kind == config.exported[0]
    title = trained.title if own else f"{trained.title}-{trained.kind}"
    place = Path() if own else Path(trained.kind)
    exporter = _Exporter(config, source, replace(trained, title=title), folder / place, device)
    written: dict[str, str] = {}
    for name, write in exporter.formats().items():
        if name in formats:
            written |= write()
    said = f" ({_KINDS[trained.kind]})" if config.optim.ema else ""
    return {str(place / name): what + said for name, what in written.items()}


class _Exporter:
    """Writes one format after the other; what several need is made once."""

    def __init__(
        self, config: Config, source: ModelSource, trained: Trained, folder: Path, device: torch.device
    ) -> None:
        self._config, self._source, self._trained, self._folder = config, source, trained, folder
        self._dtype, self._device = config.model.export_dtype, device

    def formats(self) -> dict[str, Callable[[], dict[str, str]]]:
        """What writes each format, in the order in which they are written."""
        return {
            "diffusers": self._diffusers,
            "single-file": self._single_file,
            "lora-kohya": self._lora_kohya,
            "lora-peft": self._lora_peft,
            "lora-diffusers": self._lora_diffusers,
        }

    @cached_property
    def _merged(self) -> Mapping[str, Tensor]:
        """All weights of the UNet, also of a run with adapters."""
        found = self._trained.weights
        return lora.merged_state(self._source, self._config.model, found) if isinstance(found, Adapters) else found

    @cached_property
    def _adapters(self) -> Adapters:
        """The run's own, or extracted ones."""
        if isinstance(self._trained.weights, Adapters):
            return self._trained.weights
        c = self._config
        found = extract(
            self._source, c.model, self._trained.weights,
            rank=c.export.lora_rank, energy=c.export.lora_energy, resolution=c.data.resolution, device=self._device,
        )  # fmt: skip
        print0(found.report())
        return found.adapters

    def _metadata(self, title: str, *, is_lora: bool) -> dict[str, str]:
        said = modelspec(self._source, title, self._config.data.resolution, lora=is_lora)
        return said | self._trained.metadata()

    def _diffusers(self) -> dict[str, str]:
        export, merged, found = self._folder / "export", self._folder / "merged", self._trained.weights
        if not isinstance(found, Adapters):
            export_pipeline(self._source, found, export, self._dtype)
            return {"export": "the aligned pipeline, for diffusers' from_pretrained"}
        before = _hash(export / LORA_FILE)
        lora_files.write_diffusers(found, self._source, export)
        written = {"export": "the adapters, for diffusers' load_lora_weights"}
        if self._config.lora.merge:
            export_pipeline(self._source, self._merged, merged, self._dtype)
            written["merged"] = "the aligned pipeline, with the adapters merged into its weights"
        elif merged.exists() and _hash(export / LORA_FILE) != before:
            warn0(f"{merged} has the adapters of an earlier export: smpo merge writes it again")
        return written

    def _single_file(self) -> dict[str, str]:
        folder, title = self._folder / "single-file", self._trained.title
        said = self._metadata(title, is_lora=False)
        write_single_file(self._source, self._merged, folder, said, title=title, dtype=self._dtype)
        return {"single-file": "the aligned pipeline as one file, for ComfyUI, A1111, Forge and InvokeAI"}

    def _lora_kohya(self) -> dict[str, str]:
        folder, title = self._folder / "lora-kohya", f"{self._trained.title}-lora"
        said, pixels = self._metadata(title, is_lora=True), self._config.data.resolution
        lora_files.write_kohya(self._adapters, self._source, folder, said, title=title, resolution=pixels)
        return {"lora-kohya": "a LoRA for ComfyUI, A1111, Forge and InvokeAI"}

    def _lora_peft(self) -> dict[str, str]:
        lora_files.write_peft(self._adapters, self._folder / "lora-peft")
        return {"lora-peft": "a LoRA, for peft's PeftModel.from_pretrained"}

    def _lora_diffusers(self) -> dict[str, str]:
        lora_files.write_diffusers(self._adapters, self._source, self._folder / "lora-diffusers")
        return {"lora-diffusers": "a LoRA, for diffusers' load_lora_weights"}


def _hash(file: Path) -> str:
    """sha256 of a file; empty if there is none."""
    return storage.sha256(file) if file.is_file() else ""


def run(options: ExportArguments) -> None:
    """The program ``smpo export``: a run's weights, of its newest checkpoint or another, in the formats asked for.

    Without any checkpoint they are those of the finished export. What is not of the run's last step is written to a
    subfolder ``exports-...`` of the run, if no folder is given. No engine is needed: one process reads a checkpoint of
    any number of ranks and any ZeRO stage. Raises ConfigError for formats that the run cannot be exported to,
    CheckpointError for a checkpoint that is damaged or missing, and ModelError like ``write_exports``, or where
    ``[model]`` is not what the run started from.
    """
    config = _settings(options)
    source = find(config.model)
    device = world_from_environment(config.run.device).device
    for kind in _asked(options, config):
        trained = _trained(options, config, source, kind)
        last = trained.step == config.run.steps
        folder = options.out or (options.run if last else options.run / f"exports-{trained.step:06d}")
        with run_lock(options.run) if folder == options.run else nullcontext():
            written = write_exports(config, source, trained, folder, options.to, device)
        print0("\n".join(f"{folder / name}/  {what}, after step {trained.step}" for name, what in written.items()))


def _asked(options: ExportArguments, config: Config) -> tuple[str, ...]:
    """The kinds of weights to export. Raises ConfigError for an average that the run does not have."""
    if not options.weights:
        return config.exported
    return loading.replaced(config, {"export.weights": options.weights}).exported


def _settings(options: ExportArguments) -> Config:
    """The run's settings, with those of the command line in their place."""
    config = loading.load(options.run / "config.toml")
    given = {
        "run.dir": str(options.run),
        "export.formats": list(dict.fromkeys(["diffusers", *options.to])),
        "model.export_dtype": options.dtype,
        "export.lora_rank": options.rank,
        "export.lora_energy": options.energy,
    }
    return loading.replaced(config, {key: value for key, value in given.items() if value})


def _trained(options: ExportArguments, config: Config, source: ModelSource, kind: str) -> Trained:
    found = {folder.name: folder for folder in checkpoint.list_checkpoints(options.run)}
    wanted = f"step-{options.checkpoint:06d}" if options.checkpoint else next(reversed(found), "")
    if wanted not in found:
        if options.checkpoint:
            have = ", ".join(found) or "none"
            raise CheckpointError(f"{options.run} has no checkpoint {wanted}; it has {have}: give --checkpoint STEP")
        place = "export" if kind == config.exported[0] else f"{kind}/export"
        return Trained(kind, _of_export(options.run, place, config), _title(options.run), config.run.steps, {})
    unet: Any = empty_unet(source)
    if config.lora.rank:
        lora.add_adapters(unet, config.lora, config.run.seed)
    shapes = {name: tuple(p.shape) for name, p in unet.named_parameters() if p.requires_grad}
    progress, facts, state = checkpoint.read_weights(found[wanted], shapes, averaged=kind == "ema")
    if facts["model"] != storage.as_json(base_identity(source)):
        raise ModelError(
            f"[model] of {options.run}/config.toml is {source.describe()}, but its weights are not those that the run "
            "started from: put those back"
        )
    suffix = "" if progress.step == config.run.steps else f"-step{progress.step}"
    weights = exported_weights(config, source, state)
    return Trained(kind, weights, _title(options.run) + suffix, progress.step, facts)


def _title(run_dir: Path) -> str:
    return run_dir.resolve().name


def _of_export(run_dir: Path, place: str, config: Config) -> Weights:
    """What a finished run has exported to a subfolder, where it has no checkpoint any more."""
    export = run_dir / place
    if config.lora.rank:
        found = lora.read_adapters(export)
        return Adapters(to_export_dtype(found.tensors, config.model.export_dtype), found.settings)
    if not (export / "model_index.json").is_file():
        raise ModelError(f"{run_dir} has neither checkpoints nor an export in {place}/: train first")
    exported = exported_model(config.model, export)
    unet = load_unet(find(exported), exported, torch.float32, torch.device("cpu"))
    return dict(unet.state_dict())
