"""Program ``smpo tune``: measure, choose, and write the settings with their numbers."""

from __future__ import annotations

from typing import Any

import torch

from smpo_fast.common import programs
from smpo_fast.common.errors import EnvironmentProblem
from smpo_fast.common.json_report import json_report
from smpo_fast.common.runtime import COMPUTE_DTYPES, print0, warn0, world_from_environment
from smpo_fast.common.storage import write_text
from smpo_fast.config import loading
from smpo_fast.config.commands import TuneArguments
from smpo_fast.config.schema import Config
from smpo_fast.engine import combinations, ds_config
from smpo_fast.models import lora
from smpo_fast.models.locate import ModelSource, find, schedule_of
from smpo_fast.models.network_spec import check_resolution, network_spec
from smpo_fast.planning import profiles
from smpo_fast.planning.gpus import find_gpu
from smpo_fast.planning.planned_run import PlannedRun
from smpo_fast.planning.profiles import Profile
from smpo_fast.tuning.bench import Bench, Rejected
from smpo_fast.tuning.candidates import coordinates
from smpo_fast.tuning.timing import ceilings
from smpo_fast.tuning.tuner import Tuner, describe, eager, start


def run(settings: Config, options: TuneArguments) -> int:
    """Program ``smpo tune``; returns the exit status.

    Raises UserError like ``_tune``.
    """
    with json_report(options.json_output) as facts:
        facts |= _tune(settings, options)
    return programs.DONE


def _tune(settings: Config, options: TuneArguments) -> dict[str, Any]:
    """Measure, choose and write; returns what was found.

    Raises UserError for a run that could not start either, EnvironmentProblem if eager code cannot run on this device.
    """
    device = world_from_environment(settings.run.device).device
    ds = None if options.ds_config is None else ds_config.read_ds_file(options.ds_config)
    source = find(settings.model)
    lora.check(settings, source)
    check_resolution(source, settings.data.resolution)
    planned = planned_run(settings, source, ds, combinations.resolve_precision(settings, ds, device))
    print0(f"{_place(planned, device)}; at most {options.minutes:g} minutes")
    for name, rate in ceilings(device, COMPUTE_DTYPES[planned.precision]).items():
        print0(f"  {name}: {rate / 1e12:.3g} TFLOP/s" if name == "matmul" else f"  {name}: {rate / 1e9:.3g} GB/s")
    tuner = make_tuner(planned, source, device, 60 * options.minutes, 1e9 * options.memory)
    begin = start(settings, device, COMPUTE_DTYPES[planned.precision], planned.network.latent)
    try:
        best = tuner.fastest(begin, coordinates(device.type, planned.pairs_of_rank, planned.examples_of_rank))
    except Rejected as error:
        raise EnvironmentProblem(f"smpo tune: eager code cannot run with these settings: {error}") from error
    values, approximations = _approximations(tuner, best, options)
    steps = _whole_steps(tuner, eager(settings), best)
    profile = tuner.profile(best, profiles.key_of(planned, device))
    text = overlay(tuner, profile, values, device)
    write_text(options.out, text)
    keep(profile, text)
    print0(f"{options.out}: {describe(profile.settings | values)}")
    print0(f"use it with run.speed={options.out}; a run with run.speed = 'auto' takes what its settings leave open")
    return {
        "out": options.out,
        "device": profile.key["device"],
        "settings": profile.settings | values,
        "seconds": profile.seconds,
        "candidates": [
            {"settings": t.values, "pair_seconds": t.pair_seconds or None, "reason": t.reason} for t in tuner.trials
        ],
        "approximations": approximations,
        "whole_steps": steps,
    }


def planned_run(
    settings: Config, source: ModelSource, ds: dict[str, Any] | None, precision: str, ranks: int = 1
) -> PlannedRun:
    """The run as ``smpo plan`` sees it. Raises ModelError for networks that are not described completely."""
    network = network_spec(source, settings.data.resolution, lora=settings.lora)
    return PlannedRun(settings, network, precision, ranks, ds=ds)


def make_tuner(
    planned: PlannedRun, source: ModelSource, device: torch.device, seconds: float, limit: float = 0.0
) -> Tuner:
    """A tuner of a run. seconds: for all trials; limit: bytes that the run may need; 0: all of the device's."""
    schedule = schedule_of(source, planned.config.inversion)
    deepspeed = planned.ds is not None
    bench = Bench(planned.config, source, planned.network, planned.precision, device, deepspeed=deepspeed)
    stage = -1 if planned.ds is None else ds_config.zero_stage(dict(planned.ds))
    return Tuner(bench, planned, schedule, device, stage, limit or find_gpu("", 0.0).bytes, seconds)


def keep(profile: Profile, text: str) -> None:
    """Store a profile for later runs; a folder that cannot be written costs only that, and is said."""
    try:
        folder = profiles.store(profile, text)
    except OSError as error:
        warn0(f"the profile is not kept for later runs ({error}): use the file")
    else:
        print0(f"{folder}: kept for runs on this device")


def overlay(tuner: Tuner, profile: Profile, values: dict[str, Any], device: torch.device) -> str:
    """The text of ``tuned.toml``: each setting, and in comments what was measured with its values."""
    planned, seconds = tuner.run, profile.seconds
    call = f"no-gradient call {1e3 * seconds['call']:.4g} x {tuner.calls:.4g}, " if "call" in seconds else ""
    lines = [
        f"# Measured by smpo tune on {profile.made}: {_place(planned, device)}",
        "# " + ", ".join(f"{name} {version}" for name, version in profile.key["versions"].items()),
        f"# ms a pair: {call}reference {1e3 * seconds['reference']:.4g}, policy {1e3 * seconds['policy']:.4g}; "
        f"optimizer {1e3 * seconds['optimizer']:.4g} ms a step",
        '# Use it with run.speed = "FILE". Candidates, in ms of a step per pair:',
        *(f"#   {describe(t.values) or 'eager'}: {tuner.describe_times(t)}" for t in tuner.trials),
    ]
    settings = profile.settings | values
    for section in dict.fromkeys(name.partition(".")[0] for name in settings):
        lines += ["", f"[{section}]"]
        for name, value in settings.items():
            where, _, key = name.partition(".")
            if where == section:
                lines.append(f"{key} = {loading.toml_value(value)}{_measured(tuner, name)}")
    return "\n".join(lines) + "\n"


def _measured(tuner: Tuner, name: str) -> str:
    """A comment with the times of the candidates that changed one setting."""
    timed = {
        loading.toml_value(profiles.get(t.settings, name)): t.pair_seconds
        for t in tuner.trials
        if t.pair_seconds and (name in t.values or not t.values)
    }
    found = [f"{value}: {1e3 * seconds:.4g} ms" for value, seconds in timed.items()]
    return f"  # {', '.join(found)}" if len(found) > 1 else ""


def _approximations(tuner: Tuner, best: Config, options: TuneArguments) -> tuple[dict[str, Any], dict[str, Any]]:
    """Report the approximations; returns the values of those that were asked for and gain, and what each does."""
    chosen, found = tuner.approximations(best, options.approximate)
    for name, result in found.items():
        if isinstance(result, str):
            print0(f"  approximation {name}: {result}")
        else:
            print0(
                f"  approximation {name}: the inversion is x{result['gain']:.2f} faster, tau changes by "
                f"{result['error']:.2g}"
            )
    return {name: profiles.get(chosen, name) for name in profiles.ALLOWED if _differs(chosen, best, name)}, dict(found)


def _differs(one: Config, other: Config, name: str) -> bool:
    return bool(profiles.get(one, name) != profiles.get(other, name))


def _whole_steps(tuner: Tuner, plain: Config, best: Config) -> dict[str, float | str]:
    """Time whole steps, which are small ones, with eager code and with the best settings: ms a pair, or why not."""
    found: dict[str, float | str] = {}
    pairs = min(tuner.run.examples_of_rank, max(best.batch.inversion_pairs, best.batch.micro_pairs))
    for name, settings in {"eager": plain, "tuned": best}.items():
        try:
            seconds = tuner.bench.step(settings, pairs)
        except Rejected as error:
            found[name] = str(error)
            print0(f"  whole step, {name}: {error}")
        else:
            found[name] = 1e3 * seconds / pairs
            print0(f"  whole step of {pairs} pairs, {name}: {found[name]:.4g} ms a pair")
    return found


def _place(planned: PlannedRun, device: torch.device) -> str:
    """The device, the network and the precision in words."""
    network, found = planned.network, profiles.key_of(planned, device)
    channels, height, width = network.latent
    driver = f", driver {found['driver']}" if found["driver"] else ""
    return (
        f"{found['device']}{driver}; {network.kind}, latents {channels} x {height} x {width}, {planned.precision}, "
        f"{planned.config.optim.name}"
    )
