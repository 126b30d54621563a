"""Profiles: the settings and seconds that ``smpo tune`` measured, kept by device, software, network and shapes.

A profile is a folder ``<cache>/smpo_fast/tuned/<hash of what it was measured for>``, where <cache> is XDG_CACHE_HOME
or ``~/.cache``. It holds ``tuned.toml``, the settings with each number in a comment, and ``measured.json``.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from smpo_fast.common.errors import ConfigError
from smpo_fast.common.runtime import warn0
from smpo_fast.common.storage import json_hash, sealed, unsealed, user_cache, write_json, write_text
from smpo_fast.config import loading
from smpo_fast.config.presets import SOLVER_PRESETS
from smpo_fast.config.schema import Config
from smpo_fast.planning.gpus import driver
from smpo_fast.planning.planned_run import PlannedRun

AUTO, PLAIN = "auto", "plain"
OVERLAY, MEASURED = "tuned.toml", "measured.json"
# The settings that change how fast a run is, and its results by rounding only.
KEYS = (
    "batch.inversion_pairs",
    "batch.micro_pairs",
    "model.gradient_checkpointing",
    "model.attention",
    "model.channels_last",
    "model.compile",
    "model.cuda_graphs",
    "model.merge_qkv",
    "kernels.enabled",
)
# Those that a file may have as well, because its user asked for an approximation.
_APPROXIMATE = ("fp8", "reuse_deep", "solver", *SOLVER_PRESETS["pec"])
ALLOWED = (*KEYS, *(f"inversion.{key}" for key in _APPROXIMATE))


@dataclass(frozen=True)
class Profile:
    """What was measured for ``key``.

    settings: by ``section.key``; seconds: per pair, of a no-gradient call ('call'), the reference ('reference') and the
    policy's forward and backward pass ('policy'), and per step of the optimizer ('optimizer'); rates: FLOP/s that they
    reach, of the no-gradient call ('inversion', 'reference') and the policy ('policy'); made: date.
    """

    key: dict[str, Any]
    settings: dict[str, Any]
    seconds: dict[str, float]
    rates: dict[str, float]
    made: str = field(default_factory=lambda: time.strftime("%Y-%m-%d"))


def key_of(run: PlannedRun, device: torch.device, settings: Config | None = None) -> dict[str, Any]:
    """What a profile of a run on this device depends on: device, software, network, shapes, and what memory holds.

    settings: those of a run in which only what they leave open was measured; None: everything was.
    """
    own = set() if settings is None else loading.given(settings) & set(KEYS)
    variant, network, optim = run.variant(), run.network, run.config.optim
    averaged = [f"ema {optim.ema_dtype}"] if optim.ema else []
    return {
        **_machine(device.type),
        "network": json_hash([network.config, network.lora]),
        "kind": network.kind,
        "latent": list(network.latent),
        "prompt": list(network.prompt),
        "precision": run.precision,
        "optimizer": [variant.optimizer, variant.master, variant.accumulate, variant.offload, *averaged],
        "reference": variant.reference,
        "zero": [variant.stage, variant.offload_optimizer, variant.offload_weights],
        "ranks": run.ranks,
        "objective": run.config.objective.name,
        "x_t": [run.config.inversion.source, run.config.inversion.network],
        **({"given": {name: get(settings, name) for name in sorted(own)}} if settings is not None and own else {}),
    }


@cache
def _machine(device_type: str) -> dict[str, Any]:
    versions = {}
    for name in ("torch", "triton", "diffusers", "xformers", "smpo-fast"):
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    if device_type != "cuda":
        return {"device": f"CPU {platform.processor() or platform.machine()}", "driver": "", "versions": versions}
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {"device": f"{found.name}, {found.total_memory / 1e9:.0f} GB", "driver": driver(), "versions": versions}


def folder_of(key: Mapping[str, Any]) -> Path:
    """Where a profile with this key is stored."""
    return user_cache() / "tuned" / json_hash(key)[:16]


def find(key: Mapping[str, Any]) -> Profile | None:
    """The stored profile with this key; one that cannot be read is ignored, with a warning."""
    file = folder_of(key) / MEASURED
    if not file.is_file():
        return None
    try:
        profile = Profile(**unsealed(json.loads(file.read_text(encoding="utf-8"))))
        loading.replaced(Config(), _speed_settings(profile.settings, file))
    except (OSError, ValueError, TypeError, AttributeError, ConfigError) as error:
        warn0(f"{file}: not a profile ({error}): it is ignored; smpo tune writes a new one")
        return None
    return profile if json_hash(profile.key) == json_hash(key) else None


def stored(settings: Config, run: PlannedRun, device: torch.device) -> Profile | None:
    """The profile for a run with these given settings: of ``smpo tune``, or measured at the start of such a run."""
    return find(key_of(run, device)) or find(key_of(run, device, settings))


def store(profile: Profile, overlay: str) -> Path:
    """Keep a profile and its overlay for later runs; returns the folder. Raises OSError where it cannot be written."""
    folder = folder_of(profile.key)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / OVERLAY, overlay)
    write_json(folder / MEASURED, sealed(asdict(profile)), indent=1)
    return folder


@dataclass(frozen=True)
class Choice:
    """The settings that a run takes from measurements, by ``section.key``, and why, as a line for the user."""

    values: dict[str, Any]
    why: str
    found: bool = True  # False: run.speed = 'auto' found no profile for this device

    def apply(self, settings: Config) -> Config:
        """The settings of the run, complete, so that they mean the same without a file or profile.

        Raises ConfigError like ``loading.load``.
        """
        return loading.replaced(settings, {**self.values, "run.speed": AUTO}) if self.values else settings


def choose(settings: Config, run: PlannedRun, device: torch.device) -> Choice:
    """What ``run.speed`` means for a run, from what is stored.

    A setting that the user gave is replaced by a file's value, but not by a stored profile's. Raises ConfigError for a
    file that cannot be read or holds other settings than those of speed.
    """
    speed, own = settings.run.speed, loading.given(settings)
    if speed == PLAIN:
        values: dict[str, Any] = {} if "kernels.enabled" in own else {"kernels.enabled": []}
        return Choice(values, "plain: eager code")
    if speed != AUTO:
        values = from_file(Path(speed))
        return Choice(values, f"{speed}: {_changes(settings, values)}")
    if device.type != "cuda":
        return Choice({}, "auto: nothing is chosen on a CPU")
    if own >= set(KEYS):
        return Choice({}, "auto: all settings of speed are given")
    profile = stored(settings, run, device)
    if profile is None:
        return Choice({}, "auto: nothing was measured for this GPU, software, network and optimizer", found=False)
    return from_profile(settings, profile)


def from_profile(settings: Config, profile: Profile) -> Choice:
    """A profile's settings, without those that the user gave."""
    own = loading.given(settings)
    values = {name: value for name, value in profile.settings.items() if name not in own}
    kept = sorted(
        name for name in profile.settings.keys() - values.keys() if profile.settings[name] != get(settings, name)
    )
    given = f"; given, and left as they are: {', '.join(kept)}" if kept else ""
    return Choice(values, f"auto: measured on {profile.made}: {_changes(settings, values)}{given}")


def from_file(file: Path) -> dict[str, Any]:
    """The settings of a file that ``smpo tune`` wrote. Raises ConfigError for other ones."""
    return _speed_settings(loading.read_overlay(file), file)


def _speed_settings(values: Mapping[str, Any], file: Path) -> dict[str, Any]:
    for name in values:
        if name not in ALLOWED:
            raise ConfigError(f"{file}: {name} is no setting of speed: a file for run.speed has {', '.join(KEYS)}")
    return dict(values)


def get(settings: Config, name: str) -> Any:
    """The value of a setting ``section.key``."""
    section, _, key = name.partition(".")
    return getattr(getattr(settings, section), key)


def _changes(settings: Config, values: Mapping[str, Any]) -> str:
    changed = [
        f"{name} = {loading.toml_value(value)}" for name, value in values.items() if get(settings, name) != value
    ]
    return ", ".join(changed) or "nothing to change"
