"""Program: all benchmarks of one device in under nine minutes, part by part.

    python benchmarks/gpu_report.py [--only PART ...] [--out DIR] [--device cuda|cpu] [--toy]

The parts come in the order of their worth: five minutes tell whether all kernels are right, what a whole pair takes in
every implementation and what a no-gradient call does, and whether the recipes need the memory that was planned. Each
part has a time budget, prints every result immediately, and rewrites its JSON file after it. They run in a process of
their own, which is replaced when a part hangs or fails, so only what was not measured yet is lost. Missing parts and
libraries are reported. Only PyTorch, diffusers, transformers and this project are required.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import architectures
import counting
import harness
import kernel_cases
import ladder
import ours
import pairs
import torch
from architectures import Architecture
from harness import say

from smpo_fast.common import programs
from smpo_fast.common.runtime import COMPUTE_DTYPES
from smpo_fast.models.network_spec import NetworkSpec
from smpo_fast.planning import memory, profiles
from smpo_fast.planning.planned_run import PlannedRun
from smpo_fast.tuning import tune
from smpo_fast.tuning.candidates import coordinates
from smpo_fast.tuning.tuner import Trial, describe, start

TOTAL_SECONDS = 505.0  # for all parts together
START_SECONDS = 120.0  # in which a process has imported its libraries and opened the device
LEAST_SECONDS = 5.0  # a part is not begun with less
GRACE_SECONDS = 10.0  # beyond its budget, before a part is killed
START_METHOD = "spawn"  # a forked process cannot use CUDA, which bitsandbytes initialises when it is imported
# the values of a result that are printed; its file has all of them
PRINTED = {"seconds", "error", "value", "TFLOPs", "share_of_matmul", "share_of_copy", "peak_bytes", "skipped",
           "summary", "repeatable", "tail", "inversion_seconds", "policy_seconds", "reference_seconds",
           "predicted_of_measured"}  # fmt: skip


@dataclass
class Report:
    """One part's results, written to its file after each."""

    part: str
    device: torch.device
    file: Path
    deadline: float
    toy: bool
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def left(self) -> float:
        """Seconds that remain for this part."""
        return self.deadline - time.monotonic()

    def architecture(self, kind: str) -> Architecture:
        return architectures.TOY_OF[kind] if self.toy else architectures.ALL[kind]

    def start(self) -> None:
        torch.manual_seed(0)
        self.facts = {"part": self.part, "toy": self.toy, "complete": False}
        self.facts |= {"environment": harness.environment(self.device), "rows": []}
        self._write()

    def add(self, name: str, **values: Any) -> None:
        """Add a result, print it, and write it to disk."""
        rounded = {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in values.items()}
        self.facts["rows"].append({"name": name, **rounded})
        shown = [f"{k} {_readable(k, v)}" for k, v in rounded.items() if v is not None and k in PRINTED]
        say(f"  {name}: {', '.join(shown)}")
        self._write()

    def skip(self, name: str, why: object) -> None:
        """Record that something was not measured, and why."""
        self.add(name, skipped=str(why).strip().splitlines()[0][:200] if str(why).strip() else type(why).__name__)

    def finish(self) -> None:
        self.facts["complete"] = True
        self._write()

    def _write(self) -> None:
        draft = self.file.with_suffix(".tmp")
        draft.write_text(json.dumps(self.facts, indent=1) + "\n")
        os.replace(draft, self.file)


def _readable(key: str, value: Any) -> str:
    if key.endswith("seconds") and isinstance(value, float):
        return harness.clock(value)
    if key.endswith("bytes") and isinstance(value, (int, float)):
        return f"{value / 1e9:.3g} GB"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _attempt(report: Report, name: str, what: Callable[[], None]) -> None:
    """Run one measurement of a part; a failure is recorded and does not stop the next one."""
    try:
        what()
    except ladder.Unavailable as reason:
        report.skip(name, f"unavailable: {reason}")
    except Exception as error:
        traceback.print_exc(limit=4)
        report.skip(name, f"failed: {type(error).__name__}: {error}")
    finally:
        ladder.release(report.device)


# --- parts ----------------------------------------------------------------------------------------------------


def part_correctness(report: Report) -> None:
    """Every operation against its reference at the shapes of SDXL, and the kernels' own tests."""
    architecture = report.architecture("sdxl")
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    for op in kernel_cases.unknown(architecture):
        report.skip(op, "one of its arguments cannot be generated")
    for case in kernel_cases.cases(architecture, most=4):
        for dtype in dtypes if report.device.type == "cuda" else dtypes[:1]:
            name = f"{case.name} {_name(dtype)}"
            if report.left < 40 and not report.toy:  # the remaining time is for the kernels' own tests
                report.skip(name, "out of time")
                continue
            _attempt(report, name, lambda case=case, dtype=dtype, name=name: _check(report, name, case, dtype))  # type: ignore[misc]
    tests = harness.ROOT / "tests" / "kernels"
    if not tests.is_dir():
        report.skip("tests/kernels", "does not exist")
    elif report.device.type != "cuda":
        report.skip("tests/kernels", "run by the ordinary test suite on a CPU")
    else:
        _attempt(report, "tests/kernels", lambda: _pytest(report, tests))


def _check(report: Report, name: str, case: kernel_cases.Case, dtype: torch.dtype) -> None:
    prepared = kernel_cases.Prepared(case, dtype, report.device)
    mode = prepared.modes[-1]
    wanted = prepared.call(case.reference, mode)()
    error = harness.agree(name, prepared.call(case.run, mode)(), wanted, harness.TOLERANCE[dtype])
    first, second = (prepared.call(case.run, mode)() for _ in range(2))
    same = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    report.add(name, mode=mode, error=error, repeatable=same)


def _pytest(report: Report, tests: Path) -> None:
    # -P: the working folder may hold this project's folder without its kernels, and must not hide the installed one
    words = [sys.executable, "-P", "-m", "pytest", str(tests), "-q", "--no-header", "-p", "no:cacheprovider"]
    compiled = {**os.environ, "TRITON_INTERPRET": "0"}  # the tests interpret where they see no /dev/nvidia*
    try:
        run = subprocess.run(
            [*words, "--tb=line"], capture_output=True, text=True, env=compiled, timeout=max(10.0, report.left - 5)
        )
    except subprocess.TimeoutExpired as late:
        tail = (late.stdout or b"")[-300:]
        report.add("tests/kernels", finished=False, tail=tail.decode(errors="replace") if tail else "")
        return
    lines = (run.stdout + run.stderr).strip().splitlines() or ["no output"]
    failed = [line for line in lines if re.match(r"(FAILED|ERROR)\b", line)]
    for line in failed[:20]:
        say("   ", line)
    report.add("tests/kernels", exit_status=run.returncode, summary=lines[-1], failed=failed[:20])


def part_kernels(report: Report) -> None:
    """Times of every operation, eager, compiled and fused, at its most frequent shapes in half precision."""
    on_gpu = report.device.type == "cuda"
    architecture = report.architecture("sdxl")
    limits = harness.ceilings(report.device)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    cases = list(kernel_cases.cases(architecture, most=3))
    jobs = [(c, i, m) for c in cases for i in ("eager", "fused") for m in kernel_cases.MODES]
    if on_gpu:  # compiling takes long, so it comes last and only for the most frequent shape
        first = [case for case in cases if case.shape == kernel_cases.shapes_of(case.op, architecture)[0]]
        jobs += [(c, "compiled", m) for m in ("forward", "both") for c in first]
    for case, implementation, mode in jobs:
        name = f"{case.name} {_name(dtype)} {mode} {implementation}"
        if report.left < (15 if implementation == "compiled" else 3):
            report.skip(name, "out of time")
            continue

        def time_it(
            case: kernel_cases.Case = case, implementation: str = implementation, mode: str = mode, name: str = name
        ) -> None:
            prepared = kernel_cases.Prepared(case, dtype, report.device)
            if mode not in prepared.modes:
                return
            run = {"eager": case.reference, "fused": case.run}.get(implementation)
            call = prepared.call(run or torch.compile(case.reference, dynamic=False), mode)
            error = harness.agree(name, call(), prepared.call(case.reference, mode)(), harness.TOLERANCE[dtype])
            timing = harness.measure(call, report.device, seconds=0.1, graph=mode != "backward")
            rates = harness.shares(timing.median, 0, prepared.moved(mode), dtype, limits)
            report.add(name, op=case.op, shape=list(case.shape), mode=mode, implementation=implementation,
                       baseline="eager", seconds=timing.median, spread=timing.spread, error=error,
                       bytes=prepared.moved(mode), **rates)  # fmt: skip

        _attempt(report, name, time_it)


def part_tune(report: Report) -> None:
    """The search of smpo tune on SDXL: every candidate, and the settings that it finds fastest."""
    architecture, precision = report.architecture("sdxl"), "bf16" if report.device.type == "cuda" else "fp32"
    pairs_ = 64 if report.device.type == "cuda" else 4
    settings = ours.settings(
        architecture,
        {
            "model": {"precision": precision},
            "batch": {"pairs_per_step": pairs_, "inversion_pairs": 4, "micro_pairs": 1},
        },
    )
    planned = PlannedRun(settings, ours.network_spec(architecture), precision)
    with ours.random_weights(architecture, report.device):
        tuner = tune.make_tuner(planned, ours.source(architecture), report.device, max(5.0, report.left - 15))

    def note(trial: Trial) -> None:
        values = {"settings": describe(trial.values) or "eager", "pair_seconds": trial.pair_seconds or None}
        report.add(f"{architecture.name}: {values['settings']}", **values, skipped=trial.reason or None)

    tuner.noted = note
    begin = start(settings, report.device, COMPUTE_DTYPES[precision], planned.network.latent)
    best = tuner.fastest(begin, coordinates(report.device.type, pairs_, pairs_))
    chosen = {name: profiles.get(best, name) for name in profiles.KEYS}
    report.add(TUNED, chosen=chosen, settings=describe(chosen))


def _tuned(report: Report) -> dict[str, dict[str, Any]]:
    """Overrides with the settings that ``part_tune`` found on this card; empty if it has not run."""
    file = report.file.with_name("tune.json")
    rows = json.loads(file.read_text())["rows"] if file.is_file() else []
    found: dict[str, dict[str, Any]] = {}
    for name, value in next((row["chosen"] for row in rows if "chosen" in row), {}).items():
        section, _, key = name.partition(".")
        found.setdefault(section, {})[key] = value
    return found


def part_ladder(report: Report) -> None:
    """What the card can do, and the UNet's no-gradient call, rung by rung, at 2, 16 and 32 images."""
    for name, value in harness.ceilings(report.device).items():
        report.add(name, value=value)
    _ladder(report, report.architecture("sdxl"), (2, 16, 32) if report.device.type == "cuda" else (2, 8))


def _ladder(report: Report, architecture: Architecture, batches: tuple[int, ...]) -> None:
    device, limits = report.device, harness.ceilings(report.device)
    half = torch.float16 if device.type == "cuda" else torch.bfloat16
    with torch.no_grad():
        flops = counting.flops(counting.unet_call(architecture, 1))
    steps, wanted = ladder.Ladder(architecture, device), dict[int, torch.Tensor]()

    def timed(name: str, images: int, call: Callable[[], Any], dtype: torch.dtype, tolerance: float) -> None:
        out = call()
        reference = wanted.setdefault(images, out.float().clone())
        error = harness.agree(f"{name}, {images} pictures", out, reference, tolerance)
        timing = harness.measure(call, device, seconds=0.5, least=3, most=30, warmup=2 if images < 64 else 1)
        rates = harness.shares(timing.median, images * flops, 0, dtype, limits)
        report.add(f"{name}, {images} pictures", rung=name, images=images, baseline=ladder.AUTOCAST,
                   seconds=timing.median, spread=timing.spread, peak_bytes=timing.peak_bytes, error=error,
                   **rates)  # fmt: skip

    def autocast() -> None:
        for images in batches:
            if report.left > 5:
                with steps.autocast(images) as call:
                    timed(ladder.AUTOCAST, images, call, half, 1e-6)

    _attempt(report, ladder.AUTOCAST, autocast)
    for rung in ladder.RUNGS:
        needed = 35 if rung.compiles else 8
        if report.left < (needed if not report.toy else 1):
            report.skip(rung.name, "out of time")
            continue

        def climb(rung: ladder.Rung = rung) -> None:
            for images in batches[:2] if rung.few else batches:
                if report.left > 4 or report.toy:
                    with steps.call(rung, images) as call:
                        timed(rung.name, images, call, steps.dtype, rung.tolerance)

        _attempt(report, rung.name, climb)


def part_pair(report: Report) -> None:
    """The whole pair by phase: reference, best_eager, ours as it is, tuned, and with all kernels."""
    _pairs(report, report.architecture("sdxl"), 8 if report.device.type == "cuda" else 2)


def part_options(report: Report) -> None:
    """The whole pair with each opt-in feature, compared with ours without."""
    _pairs(report, report.architecture("sdxl"), 8 if report.device.type == "cuda" else 2, options=True)


def _pairs(report: Report, architecture: Architecture, count: int, *, options: bool = False) -> None:
    device = report.device
    makers: dict[str, Callable[[], pairs.Contender]] = {
        name: lambda make=make: make(architecture, device, count)  # type: ignore[misc]
        for name, make in pairs.MAKERS.items()
        if name == pairs.OURS or not options
    }
    kernels = ours.all_kernels()
    added = {} if options else {**({TUNED: tuned} if (tuned := _tuned(report)) else {}), "all kernels": kernels}
    if options:
        added = ours.variants(device)
        added |= {f"{name} (approximation)": {**kernels, **v} for name, v in ours.approximations().items()}
    for setting, values in added.items():
        name = f"ours, {setting}"
        makers[name] = lambda values=values, name=name: pairs.make_ours(architecture, device, count, values, name)  # type: ignore[misc]
    truth: list[torch.Tensor] = []
    for name, maker in makers.items():
        if report.left < 12 and not report.toy:
            report.skip(name, "out of time")
            continue

        def run(name: str = name, maker: Callable[[], pairs.Contender] = maker) -> None:
            contender = maker()
            pair = pairs.check_pair(architecture, device)
            if not truth:
                truth.append(contender.invert(pair).float().clone())
            allowed = 0.5 if "approximation" in name or "solver" in name else pairs.TOLERANCE[contender.dtype]
            error = harness.agree(f"x_t of {name}", contender.invert(pair), truth[0], allowed)
            contender.warm()
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            rounds = [contender.step()]
            while len(rounds) < 3 and report.left > 20 + 2 * sum(rounds[0].values()):
                rounds.append(contender.step())
            phases = {p: harness.Timing(tuple(r[p] / count for r in rounds)).median for p in pairs.PHASES
                      if p in rounds[0]}  # fmt: skip
            peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
            whole = harness.Timing(tuple(sum(r.values()) / count for r in rounds))
            report.add(f"{architecture.name}: {name}", contender=name, architecture=architecture.name, pairs=count,
                       baselines=[pairs.REFERENCE, pairs.BEST_EAGER], seconds=whole.median, spread=whole.spread,
                       rounds=len(rounds), error=error, peak_bytes=peak,
                       **{f"{phase}_seconds": value for phase, value in phases.items()})  # fmt: skip

        _attempt(report, name, run)


def part_memory(report: Report) -> None:
    """Peak memory against the plan: recipes for small cards, then full fine-tuning by optimizer and checkpointing."""
    architecture = report.architecture("sdxl")
    precision = "bf16" if report.device.type == "cuda" else "fp32"
    for name in RECIPES:
        if report.left < 6 and not report.toy:
            report.skip(name, "out of time")
        else:
            _attempt(report, name, lambda name=name: _recipe(report, name))  # type: ignore[misc]
    for optimizer in ("adafactor", "adamw", "adamw8bit"):
        for checkpointing in (False, True):
            name = f"full, {optimizer}, {'with' if checkpointing else 'no'} checkpointing"
            if report.left < 6 and not report.toy:
                report.skip(name, "out of time")
                continue
            _attempt(report, name, lambda name=name, o=optimizer, c=checkpointing:  # type: ignore[misc]
                     _full_memory(report, name, architecture, precision, o, c))  # fmt: skip


def _full_memory(
    report: Report, name: str, architecture: Architecture, precision: str, optimizer: str, checkpointing: bool
) -> None:
    overrides: dict[str, dict[str, Any]] = {
        "model": {"precision": precision, "gradient_checkpointing": checkpointing},
        "optim": {"name": optimizer},
        "batch": {"pairs_per_step": 2, "micro_pairs": 1},
        "inversion": {"source": "noise"},  # the inversion needs less memory than the rest, since it has no gradients
    }
    device = report.device
    trainer: Any = ours.make_trainer(architecture, device, overrides)
    _reset_peak(device)
    trainer.step(0)
    trainer.step(1)
    held = {
        "policy_bytes": sum(p.nbytes for p in trainer.policy.unet.parameters()),
        "reference_bytes": sum(p.nbytes for p in _reference_parameters(trainer)),
        "masters_bytes": sum(m.nbytes for m in trainer.engine._masters.values()) if precision != "fp32" else 0,
        "gradients_bytes": sum(4 * m.numel() for m in trainer.engine._masters.values()),
        "optimizer_bytes": _state_bytes(trainer.engine._optimizer),
    }
    peak = _peak(device)
    rest = None if peak is None else peak - sum(held.values())
    predicted = _predicted_peak(architecture, overrides, precision)
    report.add(name, architecture=architecture.name, optimizer=optimizer, checkpointing=checkpointing,
               peak_bytes=peak, predicted_bytes=predicted, predicted_of_measured=peak and predicted / peak,
               **held, rest_bytes=rest)  # fmt: skip


def _reference_parameters(trainer: Any) -> list[torch.Tensor]:
    with trainer.reference() as denoiser:
        return list(denoiser.unet.parameters())


_SMALL: dict[str, dict[str, Any]] = {
    "model": {"gradient_checkpointing": True, "reference": "streamed"},
    "optim": {"name": "adamw8bit_aligned", "master": "none", "offload": "states"},
    "batch": {"pairs_per_step": 8, "micro_pairs": 2, "inversion_pairs": 8},
    "inversion": {"steps": 2},  # more of them need no more memory
}
_LORA: dict[str, dict[str, Any]] = {
    "model": {"gradient_checkpointing": True, "reference": "adapters-off"}, "lora": {"rank": 64},
    "optim": {"name": "adamw"}, "batch": {"pairs_per_step": 8, "micro_pairs": 1, "inversion_pairs": 8},
    "inversion": {"steps": 2},
}  # fmt: skip
_OFFLOADED = {**_SMALL, "optim": {**_SMALL["optim"], "offload": "states+gradients"}}
# Recipes for small cards: name -> (model family, bytes that PyTorch may use, settings)
RECIPES: dict[str, tuple[str, float, dict[str, dict[str, Any]]]] = {
    "SDXL, all weights, within 24 GB": ("sdxl", 24.5e9, _SMALL),
    "SDXL, all weights, within 16 GB": (
        "sdxl",
        16.2e9,
        _OFFLOADED,
    ),
    "SDXL, LoRA, within 12 GB": ("sdxl", 12.0e9, _LORA),
    "SD1.5, all weights, within 12 GB": ("sd15", 12.0e9, _SMALL),
}


def _recipe(report: Report, name: str) -> None:
    """Two whole steps within the memory of a small card, to show that they run; the peak is recorded as well."""
    kind, card, overrides = RECIPES[name]
    architecture, device = report.architecture(kind), report.device
    precision = "bf16" if device.type == "cuda" or "lora" not in overrides else "fp32"
    overrides = {**overrides, "model": {**overrides["model"], "precision": precision}}
    trainer: Any = ours.make_trainer(architecture, device, overrides)  # draws weights in float32, which no run does
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(card / torch.cuda.get_device_properties(device).total_memory, device)
    try:
        _reset_peak(device)
        for step in range(2):
            trainer.step(step)
        predicted, peak = _predicted_peak(architecture, overrides, precision), _peak(device)
    finally:
        if device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0, device)
    reserved = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None
    report.add(f"recipe: {name}", architecture=architecture.name, card_bytes=card, peak_bytes=peak,
               reserved_bytes=reserved, predicted_bytes=predicted,
               predicted_of_measured=peak and predicted / peak)  # fmt: skip


def _predicted_peak(architecture: Architecture, overrides: ours.Overrides, precision: str) -> float:
    """The peak that ``smpo plan`` predicts for the same settings; it should be within 10 % of the measured one."""
    settings = ours.settings(architecture, overrides)
    latent = (4, architecture.latent, architecture.latent)
    text = (architecture.tokens, architecture.prompt_width)
    network = NetworkSpec.make(architecture.unet, architecture.kind, latent, text, lora=settings.lora)
    run = PlannedRun(settings, network, precision)
    return memory.memory(run, run.variant()).allocated


def _state_bytes(optimizer: torch.optim.Optimizer) -> int:
    states = (value for state in optimizer.state.values() for value in state.values())
    return sum(value.nbytes for value in states if isinstance(value, torch.Tensor))


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: torch.device) -> int | None:
    """Most bytes allocated since the last reset; None on a CPU, whose allocator does not count."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def part_sd15(report: Report) -> None:
    """SD1.5 at 512 px: the whole pair, and the ladder."""
    architecture = report.architecture("sd15")
    _pairs(report, architecture, 4 if report.device.type == "cuda" else 2)
    _ladder(report, architecture, (2, 16) if report.device.type == "cuda" else (2,))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


TUNED = "tuned"  # settings that smpo tune found
# name -> (what it does, seconds it may take), by worth; a file each, of which at most eight come back from a lent card
PARTS: dict[str, tuple[Callable[[Report], None], float]] = {
    "correctness": (part_correctness, 80),
    "tune": (part_tune, 90),
    "pair": (part_pair, 100),
    "ladder": (part_ladder, 75),
    "memory": (part_memory, 45),
    "kernels": (part_kernels, 40),
    "options": (part_options, 45),
    "sd15": (part_sd15, 30),
}


# --- the program ----------------------------------------------------------------------------------------------


def open_device(device_type: str) -> torch.device:
    """The device to measure, with its index, which some functions of ``torch.cuda`` insist on."""
    return torch.device(device_type, 0) if device_type == "cuda" else torch.device(device_type)


def serve(orders: Any, device_type: str, out: Path | None, toy: bool) -> None:
    """Run the parts that arrive through a pipe as (name, seconds), until one fails; results go to ``name.json``.

    Sends the results' folder at the start, and how each part ended.
    """
    device = open_device(device_type)
    folder = out or harness.RESULTS / harness.folder_name(device)
    folder.mkdir(parents=True, exist_ok=True)
    torch.zeros(1, device=device)
    orders.send(str(folder))
    while True:
        name, seconds = orders.recv()
        report = Report(name, device, folder / f"{name}.json", time.monotonic() + seconds, toy)
        report.start()
        PARTS[name][0](report)
        harness.synchronize(device)  # an error of the card outlives the part, but not this process
        report.finish()
        orders.send("done")


class Worker:
    """The process that runs the parts; a new one is started for the next part after one that hangs or fails."""

    def __init__(self, device_type: str, out: Path | None, toy: bool) -> None:
        self._given = (device_type, out, toy)
        self._process: Any = None
        self.folder: Path | None = None

    def run(self, name: str, seconds: float) -> str:
        """Run a part and wait for it, at most a little longer than its budget; returns how it ended."""
        try:
            if self._process is None:
                self._start()
            self._orders.send((name, seconds))
            if self._orders.poll(seconds + GRACE_SECONDS):
                return str(self._orders.recv())
            state = "killed after its time limit: its file has the results so far"
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self._process.join()
            state = f"failed with exit status {self._process.exitcode}"
        self.stop()
        return state

    def _start(self) -> None:
        context: Any = multiprocessing.get_context(START_METHOD)
        self._orders, orders = context.Pipe()
        self._process = context.Process(target=serve, args=(orders, *self._given))
        self._process.start()
        orders.close()  # the process has its own: its end is noticed here
        if not self._orders.poll(START_SECONDS):
            raise EOFError
        self.folder = Path(self._orders.recv())

    def stop(self) -> None:
        """End the process, whatever it does."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None


def headline(folder: Path) -> str:
    """Table of the most important results."""
    rows: list[tuple[str, str, str]] = []
    for part, baseline in (("ladder", ladder.AUTOCAST), ("pair", pairs.REFERENCE), ("sd15", pairs.REFERENCE)):
        file = folder / f"{part}.json"
        found = json.loads(file.read_text())["rows"] if file.is_file() else []
        times = {row["name"]: row for row in found if "seconds" in row}
        for name, row in times.items():
            rows.append((name, harness.clock(row["seconds"]), _ratio(row, times.values(), baseline)))
    return harness.table(("result", "time", "ratio"), rows) if rows else "no times were measured"


def _ratio(row: Mapping[str, Any], others: Any, baseline: str) -> str:
    """This row's speed against its baseline at the same batch size or architecture."""
    if "rung" in row:
        baseline = ladder.AUTOCAST
    for other in others:
        same = other.get("images") == row.get("images") and other.get("architecture") == row.get("architecture")
        if same and baseline in (other.get("rung"), other.get("contender")):
            return f"x{other['seconds'] / row['seconds']:.2f} against {baseline}"
    return ""


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 if every part finished, else 1."""
    parser = argparse.ArgumentParser(description="Measure one device, part by part.")
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--out", type=Path, help="folder for the JSON files (default: benchmarks/results/<device>)")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda if available")
    parser.add_argument("--toy", action="store_true", help="miniature networks, to check that everything runs")
    args = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: times of interpreted kernels are meaningless; unset it")
    programs.configure_allocator()
    device_type = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    began, states, worker = time.monotonic(), {}, Worker(device_type, args.out, args.toy)
    try:
        for name in args.only or PARTS:
            left = TOTAL_SECONDS - (time.monotonic() - began)
            seconds = min(PARTS[name][1], left)
            if seconds < LEAST_SECONDS:
                states[name] = "not reached: out of time"
                continue
            start = time.monotonic()
            say(f"== {name} (up to {seconds:.0f} s): {PARTS[name][0].__doc__}")
            states[name] = worker.run(name, seconds)
            say(f"== {name}: {states[name]} in {time.monotonic() - start:.0f} s")
    finally:
        worker.stop()
    if worker.folder is not None:
        say("\n" + headline(worker.folder))
        say(f"\nresults in {worker.folder}")
    say(f"{time.monotonic() - began:.0f} s; " + "; ".join(f"{name}: {state}" for name, state in states.items()))
    return 0 if all(state == "done" for state in states.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
