"""Program ``smpo plan``: the plan as text or JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from smpo_fast.common import programs
from smpo_fast.common.console import BAD, GOOD, highlighted, printable
from smpo_fast.common.json_report import json_report
from smpo_fast.config.commands import PlanArguments
from smpo_fast.config.schema import Config
from smpo_fast.planning.plan import plan

_MARKS = {"it fits": GOOD, "IT DOES NOT FIT": BAD}


def run(settings: Config, request: PlanArguments) -> int:
    """Program ``smpo plan``; returns the exit status: 0 when the settings fit the GPU, else 1."""
    with json_report(request.json_output) as facts:
        found = plan(settings, request)
        facts |= found
        print(highlighted(printable(render(found), lines=True), _MARKS), flush=True)
    return programs.DONE if found["fits"] else programs.UNMET


def render(found: Mapping[str, Any]) -> str:
    """The plan as text."""
    variant, count = found["choice"], found["parameters"]
    frozen = f" of {(count['trained'] + count['frozen']) / 1e6:,.1f}" if count["frozen"] else ""
    sharding = "no DeepSpeed" if variant["stage"] is None else f"ZeRO {variant['stage']}"
    sharding += (
        ", optimizer in host memory" * variant["offload_optimizer"]
        + ", weights in host memory" * variant["offload_weights"]
    )
    lines = [
        found["run"],
        f"model: {found['model']}",
        f"{count['trained'] / 1e6:,.1f}{frozen} million parameters trained; {variant['precision']}, "
        f"{variant['optimizer']}, {sharding}; reference {variant['reference']}",
        f"micro_pairs {variant['micro_pairs']}, inversion_pairs {variant['inversion_pairs']}, gradient checkpointing "
        + ("on" if variant["checkpointing"] else "off"),
        f"speed: {found['speed']}",
        "",
        *_table("memory of a GPU, GB", found["memory"]),
        *_table("peak of each phase, GB", found["phases"]),
        f"  needed with the CUDA context and the allocator's overhead (assumed): {found['needed'] / 1e9:.2f} GB: "
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
    rows = [f"  {phase:<12}{calls:>8.2f} calls per image{found['flops'][phase] / 1e12:>10.2f} TFLOP per pair"
            for phase, calls in found["calls"].items()]  # fmt: skip
    return ["work per pair", *rows, f"  {'all':<12}{sum(found['flops'].values()) / 1e12:>34.2f} TFLOP per pair", ""]


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
            "nothing that was tried fits this GPU: train adapters (lora.rank=64), or use a smaller data.resolution or "
            "more GPUs"
        ]
    speed = (
        "" if found["hours"] is None else f", {found['step_seconds']:.3g} s per step, {found['hours']:.3g} h (modelled)"
    )
    if not found["words"]:
        return [f"best settings that fit: these{speed}"]
    return [
        f"best settings that fit: {found['needed'] / 1e9:.1f} GB{speed}; add to the command:",
        "  " + " ".join(found["words"]),
    ]
