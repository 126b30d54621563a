"""What a run needs before it is started: the report of ``smpo plan``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from smpo_fast.common import remote
from smpo_fast.common.errors import EnvironmentProblem, UserError
from smpo_fast.common.runtime import World, print0
from smpo_fast.config import loading
from smpo_fast.config.commands import PlanArguments
from smpo_fast.config.schema import Config, Model
from smpo_fast.engine import batch_size, combinations, ds_config
from smpo_fast.method.schedule import NoiseSchedule
from smpo_fast.models.locate import ModelSource, find, schedule_of
from smpo_fast.models.network_spec import network_spec
from smpo_fast.planning.gpus import CPU, Gpu, gpu_of, link_gb
from smpo_fast.planning.memory import Choice, Subject, _offloaded, disk, memory, pairs_in
from smpo_fast.planning.search import KEYS, SHIPPED, Option, options, words
from smpo_fast.planning.speed import CALL_SECONDS, UTILISATION, measure, modelled_seconds, work


def look(model: Model) -> ModelSource:
    """Where the networks are; of a hub id only the configurations are fetched. Raises SettingsError like ``find``."""

    def small(where: str) -> str:
        if Path(where).is_dir() or not remote.is_hub_id(where):
            return where
        try:
            return str(remote.fetch_repository(where, revision=model.revision, only=["*.json", "*/*.json"]))
        except EnvironmentProblem as error:
            raise EnvironmentProblem(f"model.path: {error}") from error

    return find(model.model_copy(update={key: small(getattr(model, key)) for key in ("path", "vae", "unet")}))


def precision_of(c: Config, ds: Mapping[str, Any] | None, gpu: Gpu) -> str:
    """``model.precision`` on the device that is planned for, which may be another than the one here.

    'auto' is what ``engine.resolve_precision`` makes of it on a GPU that has bfloat16.
    """
    raw = dict(ds or {})
    here = combinations.resolve_precision(c, None if ds is None else raw, torch.device("cpu"))
    off = any(raw.get(name, {}).get("enabled") is False for name in ("bf16", "bfloat16"))
    if here != "fp32" or c.model.precision == "fp32" or gpu.name == CPU or off:
        return here
    stage = ds_config.zero_stage(raw)
    half_sums = ds is not None and (stage == 0 or (stage < 3 and _offloaded(raw, "offload_optimizer")))
    return "bf16-autocast" if half_sums else "bf16"


def plan(c: Config, request: PlanArguments) -> dict[str, Any]:
    """Everything that ``smpo plan`` says, as plain values; bytes, seconds, and words."""
    if request.measure and (request.gpu or request.gpu_memory):
        raise UserError("--measure times the device that is here: leave --gpu and --gpu-memory out")
    gpu, source = gpu_of(request.gpu, request.gpu_memory), look(c.model)
    ds = None if request.ds_config is None else ds_config.read_ds_file(request.ds_config)
    ds_file = "" if request.ds_config is None else str(request.ds_config)
    network = network_spec(source, c.data.resolution, c.model.attention, c.lora)
    s = Subject(c, network, precision_of(c, ds, gpu), request.gpus, request.per_node, ds)
    batch_size.pairs_per_rank(c, s.ranks)
    schedule, choice = schedule_of(source, c.inversion), s.choice()
    own, done = memory(s, choice), work(s, schedule, choice.checkpointing)
    fitting = options(s, schedule, gpu, ds_file)
    best = next((o for o in fitting if _valid(s, o)), None)
    pairs, known = pairs_in(c)
    return {
        "run": f"{source.kind} at {c.data.resolution} px on {s.ranks} x {gpu.name} ({gpu.bytes / 1e9:.1f} GB each)",
        "choice": asdict(choice),
        "parameters": {"trained": s.counts[0], "frozen": s.counts[1]},
        "memory": own.parts,
        "phases": own.phases,
        "needed": own.needed,
        "fits": own.needed <= gpu.bytes,
        "host": own.host,
        "disk": disk(s, source),
        "pairs": {"count": pairs, "basis": known},
        "work": {"calls": done.calls, "flops": done.flops},
        "time": _time(s, choice, schedule, gpu, source if request.measure else None),
        "best": None if best is None else {
            "words": words(best, s, ds_file), "needed": best.memory.needed, **_hours(
                modelled_seconds(s_of(s, best), best.choice, schedule, gpu), c)},
    }  # fmt: skip


def s_of(s: Subject, option: Option) -> Subject:
    """The subject under a choice's DeepSpeed file."""
    return replace(s, ds=SHIPPED.get(option.file, s.ds))


def _valid(s: Subject, option: Option) -> bool:
    """Whether the engine takes a choice."""
    there, values = option.choice, s.config.model_dump()
    for name, key in KEYS.items():
        section, _, setting = key.partition(".")
        if getattr(there, name) != getattr(s.choice(), name):
            values[section][setting] = getattr(there, name)
    ds = s_of(s, option).ds
    try:
        c = loading.from_dict(values)
        combinations.check_combination(c, there.precision, World(size=s.ranks), None if ds is None else dict(ds))
    except UserError:
        return False
    return True


def _time(s: Subject, choice: Choice, schedule: NoiseSchedule, gpu: Gpu, source: ModelSource | None) -> dict[str, Any]:
    if source is not None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        seconds = measure(s, source, schedule, device)
        alone = "" if s.ranks == 1 else "; exchange between the ranks is not in it"
        return {"basis": f"measured on {gpu.name} by one call of each phase{alone}", **_hours(seconds, s.config)}
    found = modelled_seconds(s, choice, schedule, gpu)
    if found is None:
        return {
            "basis": "no figure: no speed is known here; give --gpu NAME for a model, or --measure",
            **_hours(None, s.config),
        }
    rate = gpu.tflops * UTILISATION
    basis = (
        f"modelled: {rate:.0f} TFLOP/s assumed ({UTILISATION:.0%} of {gpu.tflops:g}), {CALL_SECONDS * 1e3:g} ms "
        f"a call, {link_gb(s, gpu):g} GB/s between GPUs, {gpu.host_gb:g} GB/s to the host"
    )
    return {"basis": basis, **_hours(found, s.config)}


def _hours(seconds: Mapping[str, float] | None, c: Config) -> dict[str, Any]:
    if seconds is None:
        return {"seconds": {}, "step_seconds": None, "hours": None}
    step = sum(seconds.values())
    return {"seconds": dict(seconds), "step_seconds": step, "hours": step * c.run.steps / 3600}


def run(c: Config, request: PlanArguments) -> int:
    """Program ``smpo plan``; returns the exit status: 0 when the settings fit the GPU, else 1."""
    found = plan(c, request)
    print0(json.dumps(found, indent=1) if request.json_output else render(found))
    return 0 if found["fits"] else 1


def render(found: Mapping[str, Any]) -> str:
    """The plan as text."""
    choice, count = found["choice"], found["parameters"]
    frozen = f" of {(count['trained'] + count['frozen']) / 1e6:,.1f}" if count["frozen"] else ""
    sharding = "no DeepSpeed" if choice["stage"] is None else f"ZeRO {choice['stage']}"
    sharding += (
        ", optimizer in host memory" * choice["offload_optimizer"]
        + ", weights in host memory" * choice["offload_weights"]
    )
    lines = [
        found["run"],
        f"{count['trained'] / 1e6:,.1f}{frozen} million parameters trained; {choice['precision']}, "
        f"{choice['optimizer']}, {sharding}; reference {choice['reference']}",
        f"micro_pairs {choice['micro_pairs']}, inversion_pairs {choice['inversion_pairs']}, gradient checkpointing "
        + ("on" if choice["checkpointing"] else "off"),
        "",
        *_table("memory of a GPU, GB", found["memory"]),
        *_table("at once, by phase, GB", found["phases"]),
        f"  needed with the CUDA context and the allocator's losses (assumed): {found['needed'] / 1e9:.2f} GB: "
        + ("it fits" if found["fits"] else "IT DOES NOT FIT"),
        "",
        *_table("host memory of a node, GB", found["host"]),
        *_table(f"disk, GB ({found['pairs']['count']:,} pairs: {found['pairs']['basis']})", found["disk"]),
        *_work_lines(found["work"]),
        *_time_lines(found["time"]),
        "",
        *_best_lines(found["best"]),
    ]
    return "\n".join(lines)


def _table(title: str, values: Mapping[str, float]) -> list[str]:
    rows = [f"  {name:<28}{value / 1e9:>9.2f}" for name, value in values.items() if value >= 5e6]
    return [title, *(rows or ["  less than 0.01 each"]), ""]


def _work_lines(found: Mapping[str, Any]) -> list[str]:
    rows = [f"  {phase:<12}{calls:>8.2f} calls a picture{found['flops'][phase] / 1e12:>10.2f} TFLOP a pair"
            for phase, calls in found["calls"].items()]  # fmt: skip
    return ["work of a pair", *rows, f"  {'all':<12}{sum(found['flops'].values()) / 1e12:>34.2f} TFLOP a pair", ""]


def _time_lines(found: Mapping[str, Any]) -> list[str]:
    if found["step_seconds"] is None:
        return [f"time  {found['basis']}"]
    each = ", ".join(f"{phase} {seconds:.3g} s" for phase, seconds in found["seconds"].items() if seconds)
    return [
        f"time of a step {found['step_seconds']:.3g} s, of the run {found['hours']:.3g} h",
        f"  {each}",
        f"  {found['basis']}",
    ]


def _best_lines(found: Mapping[str, Any] | None) -> list[str]:
    if found is None:
        return [
            "nothing tried fits this GPU: train adapters (lora.rank=64), take a smaller data.resolution or more GPUs"
        ]
    speed = (
        "" if found["hours"] is None else f", {found['step_seconds']:.3g} s a step, {found['hours']:.3g} h (modelled)"
    )
    if not found["words"]:
        return [f"best choice that fits: these settings{speed}"]
    return [
        f"best choice that fits: {found['needed'] / 1e9:.1f} GB{speed}; add to the command:",
        "  " + " ".join(found["words"]),
    ]
