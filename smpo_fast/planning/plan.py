"""What a run needs before it is started, and the settings with which it fits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch

from smpo_fast.common.errors import ConfigError, UserError
from smpo_fast.common.runtime import World
from smpo_fast.config import loading
from smpo_fast.config.commands import PlanArguments
from smpo_fast.config.schema import Config
from smpo_fast.engine import batch_size, combinations, ds_config
from smpo_fast.method.schedule import NoiseSchedule
from smpo_fast.models.locate import ModelSource, find, schedule_of
from smpo_fast.models.network_spec import network_spec
from smpo_fast.planning import profiles
from smpo_fast.planning.disk import count_pairs, disk_bytes
from smpo_fast.planning.gpus import CPU, Gpu, find_gpu, link_gb
from smpo_fast.planning.memory import memory
from smpo_fast.planning.planned_run import PlannedRun, RunVariant, is_offloaded
from smpo_fast.planning.profiles import Profile
from smpo_fast.planning.search import KEYS, SHIPPED, FittingVariant, changed_settings, fitting_variants
from smpo_fast.planning.speed import CALL_SECONDS, UTILISATION, measure, measured_rates, modelled_seconds, work


def precision_of(settings: Config, ds: Mapping[str, Any] | None, gpu: Gpu) -> str:
    """``model.precision`` on the GPU that is planned for, which may not be the one of this machine.

    'auto' is what ``engine.resolve_precision`` makes of it on a GPU that has bfloat16.
    """
    raw = dict(ds or {})
    here = combinations.resolve_precision(settings, None if ds is None else raw, torch.device("cpu"))
    off = any(ds_config.get_key(raw, f"{name}.enabled") is False for name in ("bf16", "bfloat16"))
    if here != "fp32" or settings.model.precision == "fp32" or gpu.name == CPU or off:
        return here
    stage = ds_config.zero_stage(raw)
    half_sums = ds is not None and (stage == 0 or (stage < 3 and is_offloaded(raw, "offload_optimizer")))
    return "bf16-autocast" if half_sums else "bf16"


def plan(settings: Config, request: PlanArguments) -> dict[str, Any]:
    """Everything that ``smpo plan`` reports, as plain values: bytes, seconds and text.

    Raises ConfigError for impossible arguments and settings.
    """
    if request.measure and (request.gpu or request.gpu_memory):
        raise ConfigError("--measure times the device of this machine: leave --gpu and --gpu-memory out")
    gpu, source = find_gpu(request.gpu, request.gpu_memory), find(settings.model, weights=False)
    ds = None if request.ds_config is None else ds_config.read_ds_file(request.ds_config)
    ds_file = "" if request.ds_config is None else str(request.ds_config)
    network = network_spec(source, settings.data.resolution, settings.model.attention, settings.lora)
    run = PlannedRun(settings, network, precision_of(settings, ds, gpu), request.gpus, request.per_node, ds)
    batch_size.pairs_per_rank(settings, run.ranks)
    run, speed, profile = _as_tuned(run, here=not (request.gpu or request.gpu_memory))
    settings = run.config
    schedule, variant = schedule_of(source, settings.inversion), run.variant()
    current, done = memory(run, variant), work(run, schedule, variant.checkpointing)
    fitting = fitting_variants(run, schedule, gpu, ds_file)
    best = next((o for o in fitting if _is_accepted(run, o)), None)
    pairs, known = count_pairs(settings)
    return {
        "run": f"{source.kind} at {settings.data.resolution} px on {run.ranks} x {gpu.name} "
        f"({gpu.bytes / 1e9:.1f} GB each)",
        "model": source.describe(),
        "choice": asdict(variant),
        "speed": speed,
        "parameters": {"trained": run.counts[0], "frozen": run.counts[1]},
        "memory": current.parts,
        "phases": current.phases,
        "needed": current.needed,
        "fits": current.needed <= gpu.bytes,
        "host": current.host,
        "disk": disk_bytes(run, source),
        "pairs": {"count": pairs, "basis": known},
        "work": {"calls": done.calls, "flops": done.flops},
        "time": _time(run, variant, schedule, gpu, source if request.measure else None, profile),
        "best": None if best is None else {
            "words": changed_settings(best, run, ds_file), "needed": best.memory.needed, **_hours(
                modelled_seconds(with_file_of(run, best), best.variant, schedule, gpu), settings)},
    }  # fmt: skip


def _as_tuned(run: PlannedRun, *, here: bool) -> tuple[PlannedRun, str, Profile | None]:
    """The run with the settings of ``run.speed``, what these are and why, and the profile of this machine's device."""
    device = torch.device("cuda" if here and torch.cuda.is_available() else "cpu")
    if not here and run.config.run.speed == profiles.AUTO:
        return run, "auto: profiles of another machine are not known here", None
    choice = profiles.choose(run.config, run, device)
    profile = profiles.stored(run.config, run, device) if here else None
    return replace(run, config=choice.apply(run.config)), choice.why, profile


def with_file_of(run: PlannedRun, option: FittingVariant) -> PlannedRun:
    """The run with a variant's DeepSpeed file."""
    return replace(run, ds=SHIPPED.get(option.file, run.ds))


def _is_accepted(run: PlannedRun, option: FittingVariant) -> bool:
    """Whether the engine accepts a variant."""
    variant, values = option.variant, run.config.model_dump()
    for name, key in KEYS.items():
        section, _, setting = key.partition(".")
        if getattr(variant, name) != getattr(run.variant(), name):
            values[section][setting] = getattr(variant, name)
    ds = with_file_of(run, option).ds
    try:
        settings = loading.from_dict(values)
        combinations.check_combination(
            settings, variant.precision, World(size=run.ranks), None if ds is None else dict(ds)
        )
    except UserError:
        return False
    return True


def _time(
    run: PlannedRun,
    variant: RunVariant,
    schedule: NoiseSchedule,
    gpu: Gpu,
    source: ModelSource | None,
    profile: Profile | None,
) -> dict[str, Any]:
    """The time of a step; source: the networks, if it is to be measured now."""
    if source is not None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        seconds = measure(run, source, schedule, device)
        alone = "" if run.ranks == 1 else "; exchange between ranks is not included"
        return {"basis": f"measured on {gpu.name} by one call of each phase{alone}", **_hours(seconds, run.config)}
    rates = None if profile is None else measured_rates(profile)
    found = modelled_seconds(run, variant, schedule, gpu, rates)
    if found is None:
        return {
            "basis": "no figure: the speed of this device is unknown; give --gpu NAME for a model, or --measure",
            **_hours(None, run.config),
        }
    if profile is not None:
        reached = ", ".join(f"{phase} {rate / 1e12:.3g}" for phase, rate in profile.rates.items())
        return {"basis": f"measured by smpo tune on {profile.made}, in TFLOP/s: {reached}", **_hours(found, run.config)}
    rate = gpu.tflops * UTILISATION
    basis = (
        f"modelled: {rate:.0f} TFLOP/s assumed ({UTILISATION:.0%} of {gpu.tflops:g}), {CALL_SECONDS * 1e3:g} ms "
        f"a call, {link_gb(run, gpu):g} GB/s between GPUs, {gpu.host_gb:g} GB/s to the host"
    )
    return {"basis": basis, **_hours(found, run.config)}


def _hours(seconds: Mapping[str, float] | None, settings: Config) -> dict[str, Any]:
    if seconds is None:
        return {"seconds": {}, "step_seconds": None, "hours": None}
    step = sum(seconds.values())
    return {"seconds": dict(seconds), "step_seconds": step, "hours": step * settings.run.steps / 3600}
