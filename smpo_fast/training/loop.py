"""The training loop: prepare, train, checkpoint, and stop or resume."""

from __future__ import annotations

import gc
import importlib.util
import json
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from smpo_fast.common.runtime import Stopped, StopSignal, print0, warn0
from smpo_fast.config import loading
from smpo_fast.data.cache import location, prepare
from smpo_fast.engine import checkpoint, create, zero
from smpo_fast.engine.checkpoint import Progress
from smpo_fast.engine.protocol import StepResult
from smpo_fast.models.denoiser import Denoiser
from smpo_fast.models.encoders import Encoders
from smpo_fast.models.inference import compilation
from smpo_fast.models.locate import schedule_of
from smpo_fast.training import metrics, reference
from smpo_fast.training.finish import finish
from smpo_fast.training.job import Job
from smpo_fast.training.loader import Loader
from smpo_fast.training.metrics import RunLog, StepTable
from smpo_fast.training.reference import Reference
from smpo_fast.training.step import Trainer, learning_rate
from smpo_fast.training.trajectories import TrajectoryStore


class TrainingFailed(RuntimeError):
    """The run cannot go on: too many steps had a non-finite loss or gradient."""


def train(job: Job) -> Path:
    """Prepare, train, export and evaluate; returns the run's folder. Collective over all ranks."""
    prepare_cache(job)
    state = train_policy(job)
    zero.shutdown()
    gc.collect()  # the networks have gone; evaluation needs their memory
    if job.world.rank == 0:
        finish(job, state)
    return job.run_dir


def train_policy(job: Job) -> dict[str, Tensor]:
    """All steps that are still to do; returns the trained weights on the host, complete on rank 0."""
    c, world, run_dir = job.config, job.world, job.run_dir
    # on the host: the window's prefetcher copies to the device
    loader = Loader(job.open_cache(), c, replace(world, device=torch.device("cpu")))
    print0(loader.labels.report)
    policy = reference.load_policy(c, job.source, job.precision, world.device)
    engine = create.make_engine(policy, c, world, job.precision, job.ds_settings)
    progress = checkpoint.restore_latest(run_dir, engine, world, job.facts) or Progress()
    if world.rank == 0:
        describe_run(job)
    log = RunLog(run_dir, c, progress.step, world)
    store = open_store(job)
    total = c.run.steps * c.batch.pairs_per_step
    with tqdm(total=total, initial=progress.pairs_seen, unit="pair", desc="train", disable=world.rank != 0) as bar:
        schedule = schedule_of(job.source, c.inversion)
        as_denoiser = partial(
            Denoiser, source=job.source, schedule=schedule, precision=job.precision, device=world.device
        )
        frozen = open_reference(job, engine.unet, as_denoiser, store, progress)
        if c.model.compile == "all":
            with frozen() as network:
                compilation.compile_training(engine.unet, network.unet)
        trainer = Trainer(
            c, world, schedule, engine, as_denoiser(engine.unet), frozen, loader, store,
            StopSignal(world), bar,
        )  # fmt: skip
        try:
            run_steps(job, trainer, progress, log)
        finally:
            log.close()
            trainer.stop.restore()
    return engine.full_state()


def open_store(job: Job) -> TrajectoryStore | None:
    """The trajectories that runs share, if the settings name a folder for them."""
    c = job.config
    if not c.inversion.store:
        return None
    facts = {name: value for name, value in job.facts.items() if name not in ("objective", "optim", "lora")}
    facts["labels"] = {name: facts["labels"][name] for name in ("source", "drop_ties")}  # which pairs, who wins
    return TrajectoryStore(Path(c.inversion.store), facts, c.drawn_per_step, job.world)


def open_reference(
    job: Job,
    policy: nn.Module,
    as_denoiser: Callable[[nn.Module], Denoiser],
    store: TrajectoryStore | None,
    progress: Progress,
) -> Reference:
    """The reference where the settings want it; none is loaded when all that it would say is stored."""
    stored = store is not None and store.complete(progress.step, job.config.run.steps)
    where = "cached" if stored else job.reference
    return reference.make_reference(
        where, job.config, job.source, job.world, job.precision, policy, as_denoiser, job.ds_settings
    )


def prepare_cache(job: Job) -> None:
    """Make the cache where there is none: all ranks share the work through its folder, not in a collective."""
    if not location.exists(job.cache_dir):
        encoders = Encoders(job.source, job.world.device)
        prepare.prepare(job.config, encoders, job.world.device, job.cache_dir, world=job.world)


def run_steps(job: Job, trainer: Trainer, progress: Progress, log: RunLog) -> Progress:
    """The loop. Raises Stopped after saving when a signal asked for it, TrainingFailed when steps keep failing."""
    run, world = job.config.run, job.world

    def save() -> None:
        checkpoint.save(job.run_dir, trainer.engine, progress, world, job.facts, run.keep)

    saved = progress.step
    while progress.step < run.steps:
        began = time.perf_counter()
        try:
            result, table, seconds = trainer.step(progress.step)
        except Stopped:
            if saved != progress.step:
                save()
            raise
        counted = not result.applied and (job.precision != "fp16" or bool(table.nonfinite_ids()))
        took = time.perf_counter() - began
        progress = replace(
            progress,
            step=progress.step + 1,
            pairs_seen=progress.pairs_seen + job.config.batch.pairs_per_step,
            seconds=progress.seconds + took,
            skipped=progress.skipped + counted,
        )
        log.write(progress.step, step_values(job, trainer, progress, result, table, seconds, took))
        if counted:
            complain(job, progress, table)
        if progress.step % run.save_every == 0 or progress.step == run.steps:
            save()
            saved = progress.step
    return progress


def step_values(
    job: Job,
    trainer: Trainer,
    progress: Progress,
    result: StepResult,
    table: StepTable,
    seconds: dict[str, float],
    took: float,
) -> dict[str, Any]:
    """One line of the log."""
    values: dict[str, Any] = metrics.summarize(table, job.config.objective.beta, len(trainer.schedule))
    values |= {
        "lr": learning_rate(job.config.optim, progress.step - 1, job.config.run.steps),
        "grad_norm": result.grad_norm,
        "applied": result.applied,
        "skipped_steps": progress.skipped,
        "pairs_seen": progress.pairs_seen,
        "pairs_per_second": job.config.batch.pairs_per_step / took,
        "seconds": took,
        **{f"seconds/{name}": s for name, s in seconds.items()},
        "memory_gb": metrics.memory_gb(job.world.device),
    }
    if not result.applied:
        values["nonfinite_pairs"] = table.nonfinite_ids()
    known = sum(seconds.values()) or 1.0
    shares = " ".join(f"{name} {share / known:.0%}" for name, share in seconds.items() if share / known >= 0.05)
    trainer.bar.set_postfix_str(
        f"loss {values['train_loss']:.3f}, acc {values['implicit_acc']:.2f}, |g| {result.grad_norm:.3g}; {shares}; "
        f"{values['memory_gb']:.1f} GB",
        refresh=False,
    )
    return values


def complain(job: Job, progress: Progress, table: StepTable) -> None:
    """Tell of a skipped step; raise TrainingFailed when there were too many."""
    ids = table.nonfinite_ids()
    which = f"rows {ids} of the pair table" if ids else "no pair's loss, so the gradient itself"
    warn0(f"step {progress.step}: non-finite ({which}); the step was skipped and the weights are unchanged")
    if progress.skipped > job.config.run.max_nonfinite_steps:
        raise TrainingFailed(
            f"{progress.skipped} of {progress.step} steps were skipped for a non-finite loss or gradient, more than "
            f"run.max_nonfinite_steps = {job.config.run.max_nonfinite_steps}. {job.run_dir / 'metrics.jsonl'} has the "
            "rows (nonfinite_pairs). Usual causes: a learning rate too high, fp16 overflow (try bf16), broken latents "
            "(check the cache). The last checkpoint is still good."
        )


def describe_run(job: Job) -> None:
    """Write the resolved settings and the environment into the run's folder."""
    job.run_dir.mkdir(parents=True, exist_ok=True)
    (job.run_dir / "config.toml").write_text(loading.dump(job.config))
    if job.ds_settings is not None:
        (job.run_dir / "ds_config.json").write_text(json.dumps(job.ds_settings, indent=2))
    names = ["torch", "diffusers", "transformers", "deepspeed", "bitsandbytes", "smpo-fast"]
    names += ["peft"] if job.config.lora.rank else []
    facts = {
        "command": sys.argv,
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in names},
        "device": torch.cuda.get_device_name() if job.world.device.type == "cuda" else platform.processor() or "cpu",
        "ranks": job.world.size,
        "precision": job.precision,
    }
    (job.run_dir / "environment.json").write_text(json.dumps(facts, indent=2))
