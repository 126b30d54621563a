"""The training loop: steps, log rows, checkpoints, and the end of a run whose steps or weights are not finite."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch
from tqdm import tqdm

from smpo_fast.common.programs import Failure
from smpo_fast.common.runtime import Stopped, warn0
from smpo_fast.engine import checkpoint
from smpo_fast.engine.checkpoint import Progress
from smpo_fast.engine.protocol import Engine, StepResult
from smpo_fast.training import metrics
from smpo_fast.training.job import Job
from smpo_fast.training.learning_rate import learning_rate
from smpo_fast.training.metrics import StepTable
from smpo_fast.training.run_log import RunLog
from smpo_fast.training.step import Trainer


class TrainingFailed(Failure):
    """The run cannot go on: too many steps had a non-finite loss or gradient, or the weights are out of range."""


# beyond it half precision overflows; the weights of Stable Diffusion stay below 100
LARGEST_WEIGHT = torch.finfo(torch.float16).max


def run_steps(job: Job, trainer: Trainer, progress: Progress, log: RunLog, bar: tqdm) -> Progress:
    """Make the remaining steps of a run. Collective.

    Raises Stopped, after saving, when a signal requested a stop, and TrainingFailed when too many steps were skipped
    or the weights are out of range: such weights are neither saved nor returned.
    """
    run, world = job.config.run, job.world

    def save() -> None:
        check_weights(job, trainer.engine, progress)
        checkpoint.save(job.run_dir, trainer.engine, progress, world, job.facts, run.keep)

    saved = progress.step
    while progress.step < run.steps:
        began = time.perf_counter()
        try:
            result, table, phases = trainer.step(progress.step)
        except Stopped:
            if saved != progress.step:
                save()
            raise
        # the loss scaling of fp16 skips steps on purpose, with finite losses
        failed = not result.applied and (job.precision != "fp16" or bool(table.nonfinite_ids()))
        took = time.perf_counter() - began
        progress = replace(
            progress,
            step=progress.step + 1,
            pairs_seen=progress.pairs_seen + job.config.batch.pairs_per_step,
            seconds=progress.seconds + took,
            skipped=progress.skipped + failed,
        )
        row = log_row(job, progress, result, table, phases, took, len(trainer.schedule))
        log.write(progress.step, row)
        bar.set_postfix_str(_postfix(row, phases), refresh=False)
        if failed:
            report_skipped_step(job, progress, table)
        if progress.step % run.save_every == 0 or progress.step == run.steps:
            save()
            saved = progress.step
    return progress


def check_weights(job: Job, engine: Engine, progress: Progress) -> None:
    """Raise TrainingFailed when a weight is not finite, or too large for half precision. Collective."""
    largest = engine.largest_weight()
    if largest <= LARGEST_WEIGHT:  # False for nan
        return
    kept = checkpoint.list_checkpoints(job.run_dir)
    raise TrainingFailed(
        f"after step {progress.step} the largest weight is {largest:g}: training has diverged, and nothing of it was "
        f"saved. The learning rate is probably too high (optim.lr = {job.config.optim.lr:g}). "
        + (f"The last good checkpoint is {kept[-1]}." if kept else "There is no earlier checkpoint.")
    )


def log_row(
    job: Job,
    progress: Progress,
    result: StepResult,
    table: StepTable,
    phases: dict[str, float],
    took: float,
    timesteps: int,
) -> dict[str, Any]:
    """One row of the log. phases: seconds of each; took: of the whole step; timesteps: of the noise schedule."""
    row: dict[str, Any] = metrics.summarize(table, job.config.objective.beta, timesteps)
    row |= {
        "lr": learning_rate(job.config.optim, progress.step - 1, job.config.run.steps),
        "grad_norm": result.grad_norm,
        "applied": result.applied,
        "skipped_steps": progress.skipped,
        "pairs_seen": progress.pairs_seen,
        "pairs_per_second": job.config.batch.pairs_per_step / took,
        "seconds": took,
        **{f"seconds/{name}": s for name, s in phases.items()},
        "memory_gb": metrics.memory_gb(job.world.device),
    }
    if not result.applied:
        row["nonfinite_pairs"] = table.nonfinite_ids()
    return row


def _postfix(row: dict[str, Any], phases: dict[str, float]) -> str:
    """What the progress bar shows after a step."""
    total = sum(phases.values()) or 1.0
    shares = " ".join(f"{name} {share / total:.0%}" for name, share in phases.items() if share / total >= 0.05)
    return (
        f"loss {row['train_loss']:.3f}, acc {row['implicit_acc']:.2f}, |g| {row['grad_norm']:.3g}; {shares}; "
        f"{row['memory_gb']:.1f} GB"
    )


def report_skipped_step(job: Job, progress: Progress, table: StepTable) -> None:
    """Warn of a skipped step; raises TrainingFailed when there were too many."""
    ids = table.nonfinite_ids()
    which = f"rows {ids} of the pair table" if ids else "no pair's loss, so the gradient itself"
    warn0(f"step {progress.step}: non-finite ({which}); the step was skipped and the weights are unchanged")
    if progress.skipped > job.config.run.max_nonfinite_steps:
        raise TrainingFailed(
            f"{progress.skipped} of {progress.step} steps were skipped for a non-finite loss or gradient, more than "
            f"run.max_nonfinite_steps = {job.config.run.max_nonfinite_steps}. {job.run_dir / 'metrics.jsonl'} lists "
            "the pairs (nonfinite_pairs). Usual causes: a learning rate too high, fp16 overflow (try bf16), broken "
            "latents (check the cache). The last checkpoint is still good."
        )
