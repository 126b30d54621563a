"""Program: train on preference pairs.

``deepspeed smpo_fast/train.py --ds_config configs/ds_zero2.json`` trains the embedded default; with
``--config FILE`` it trains what the file describes. The same command started again continues the run.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # started as a script: neither this folder's modules nor kernels/ beside it may hide a library's
    _HERE = Path(__file__).resolve().parent
    sys.path = [p for p in sys.path if Path(p or ".").resolve() not in (_HERE, _HERE.parent)]

import argparse
import gc
import importlib.metadata
import importlib.util
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from smpo_fast import (
    cache,
    calls,
    checkpoint,
    config,
    data,
    evaluate,
    inversion,
    lora,
    metrics,
    patch,
    prepare,
    reference,
    report,
)
from smpo_fast import engine as engines
from smpo_fast.cache import CachedPairs
from smpo_fast.config import Config, SettingsError
from smpo_fast.loader import Loader
from smpo_fast.model import (
    Denoiser,
    Encoders,
    Source,
    encoders_identity,
    export_pipeline,
    find,
    schedule_of,
    weights_identity,
)
from smpo_fast.runtime import Stopped, StopSignal, print0, warn0, world_from_environment
from smpo_fast.trajectories import Trajectories
from smpo_fast.window import Trainer, learning_rate


class TrainingFailed(RuntimeError):
    """The run cannot go on: too many steps had a non-finite loss or gradient."""


class Job:
    """A run before anything heavy is loaded: everything that can be refused is refused here."""

    def __init__(self, settings: Config, ds_file: Path | None) -> None:
        self.config, self.ds_file = settings, ds_file
        self.world = world_from_environment(settings.run.device)
        self.source: Source = find(settings.model)
        raw = engines.read_ds_file(ds_file) if ds_file else None
        self.precision = engines.resolve_precision(settings, raw, self.world.device)
        self.ds_settings: dict[str, Any] | None = None
        self.filled: dict[str, Any] = {}
        if raw is not None:
            self.ds_settings, self.filled = engines.resolve_ds_settings(
                raw, str(ds_file), settings, self.world.size, self.precision
            )
        engines.check_combination(settings, self.precision, self.world, self.ds_settings)
        stage = -1 if self.ds_settings is None else engines.zero_stage(self.ds_settings)
        calls.check(settings, self.world.device, stage)
        lora.check(settings, self.source)
        self.reference = reference.resolve(settings, self.ds_settings)
        engines.pairs_per_rank(settings, self.world.size)
        if settings.drawn_per_step % self.world.size:
            raise SettingsError(
                f"batch.pairs_per_step = {settings.batch.pairs_per_step} at inversion.per_trajectory = "
                f"{settings.inversion.per_trajectory} draws {settings.drawn_per_step} pairs, which do not divide among "
                f"{self.world.size} ranks"
            )
        for module, project in (("wandb", settings.log.wandb), ("trackio", settings.log.trackio)):
            if project and importlib.util.find_spec(module) is None:
                raise SettingsError(f"log.{module} = '{project}', but {module} is not installed: pip install {module}")
        evaluate.check(settings)
        patch.check(settings, self.world.device)
        self.run_dir = Path(settings.run.dir)
        self.cache_dir = prepare.locate(settings)
        self.encoders = encoders_identity(self.source)
        if cache.exists(self.cache_dir):
            self.open_cache()
        else:
            data.columns(data.source_path(settings.data.pairs))

    def open_cache(self) -> CachedPairs:
        """The prepared cache; raises CacheError when it is damaged or made for other settings or networks."""
        return prepare.open_cache(self.config, self.cache_dir, encoders=self.encoders, kind=self.source.kind)

    def plan(self) -> str:
        """What the run will do, in a few lines."""
        c, per_rank = self.config, engines.pairs_per_rank(self.config, self.world.size)
        schedule = schedule_of(self.source, c.inversion)
        depths = [schedule.path(t, c.inversion).depth for t in range(len(schedule))]
        asked = sum(inversion.evaluations(d, c.inversion) for d in depths) / len(depths)
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
        c, prepared = self.config, cache.read_info(self.cache_dir).identity
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


def train(job: Job) -> Path:
    """Prepare, train, export and evaluate; returns the run's folder. Collective over all ranks."""
    prepare_cache(job)
    state = train_policy(job)
    engines.shutdown()
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
    engine = engines.make_engine(policy, c, world, job.precision, job.ds_settings)
    progress = checkpoint.restore_latest(run_dir, engine, world, job.facts) or checkpoint.Progress()
    if world.rank == 0:
        describe_run(job)
    log = metrics.RunLog(run_dir, c, progress.step, world)
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
                calls.compile_training(engine.unet, network.unet)
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


def open_store(job: Job) -> Trajectories | None:
    """The trajectories that runs share, if the settings name a folder for them."""
    c = job.config
    if not c.inversion.store:
        return None
    facts = {name: value for name, value in job.facts.items() if name not in ("objective", "optim", "lora")}
    facts["labels"] = {name: facts["labels"][name] for name in ("source", "drop_ties")}  # which pairs, who wins
    return Trajectories(Path(c.inversion.store), facts, c.drawn_per_step, job.world)


def open_reference(
    job: Job,
    policy: nn.Module,
    as_denoiser: Callable[[nn.Module], Denoiser],
    store: Trajectories | None,
    progress: checkpoint.Progress,
) -> reference.Reference:
    """The reference where the settings want it; none is loaded when all that it would say is stored."""
    stored = store is not None and store.complete(progress.step, job.config.run.steps)
    where = "cached" if stored else job.reference
    return reference.make_reference(
        where, job.config, job.source, job.world, job.precision, policy, as_denoiser, job.ds_settings
    )


def prepare_cache(job: Job) -> None:
    """Make the cache where there is none: all ranks share the work through its folder, not in a collective."""
    if not cache.exists(job.cache_dir):
        encoders = Encoders(job.source, job.world.device)
        prepare.prepare(job.config, encoders, job.world.device, job.cache_dir, world=job.world)


def run_steps(job: Job, trainer: Trainer, progress: checkpoint.Progress, log: metrics.RunLog) -> checkpoint.Progress:
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
    progress: checkpoint.Progress,
    result: engines.StepResult,
    table: metrics.StepTable,
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


def complain(job: Job, progress: checkpoint.Progress, table: metrics.StepTable) -> None:
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
    (job.run_dir / "config.toml").write_text(config.dump(job.config))
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


def finish(job: Job, state: dict[str, Tensor]) -> None:
    """Export, draw the curves, evaluate, and say where everything lies (rank 0)."""
    c, export = job.config, job.run_dir / "export"
    if c.lora.rank:
        lora.save(c, job.source, state, export)
    else:
        export_pipeline(job.source, state, export, c.model.export_dtype)
    if c.lora.merge:
        lora.merge(c, job.source, export, job.run_dir / "merged")
    report.draw_curves(metrics.read_metrics(job.run_dir), job.run_dir / "curves.png")
    summary = ""
    if c.eval.prompts:
        summary = evaluate.evaluate(c, job.source, export, job.run_dir / "evaluation", job.world.device)
    exported = f"the {'adapters' if c.lora.rank else 'aligned pipeline'}, for diffusers'"
    exported += " load_lora_weights" if c.lora.rank else " from_pretrained"
    print0(
        f"\n{summary}\n{totals(metrics.read_metrics(job.run_dir))}\nThe run is complete: {job.run_dir}/\n"
        f"  export/         {exported}\n"
        + ("  merged/         the aligned pipeline, adapters in its weights\n" if c.lora.merge else "")
        + "  metrics.jsonl   one line a step; tensorboard/ has the same; curves.png shows them\n"
        "  config.toml     the resolved settings; environment.json has versions and device\n"
        + ("  evaluation/     grid.png (base beside aligned), evaluation.json, scores.csv\n" if summary else "")
    )


def totals(rows: Sequence[dict[str, Any]]) -> str:
    """Steps, seconds, speed and peak memory of a run, from its log."""
    if not rows:
        return "no step was trained"
    seconds, peak = sum(row["seconds"] for row in rows), max(row["memory_gb"] for row in rows)
    speed = rows[-1]["pairs_seen"] / seconds
    return f"{len(rows)} steps in {seconds:.0f} s ({speed:.1f} pairs/s), peak memory {peak:.2f} GB (rank 0)"


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done or stopped by a signal with a checkpoint saved, 2 a mistake in settings or data, 3 failed."""
    parser = argparse.ArgumentParser(description="Align SDXL or SD1.5 with preference pairs (SmPO-Diffusion).")
    config.add_arguments(parser)
    parser.add_argument("--ds_config", type=Path, metavar="FILE", help="DeepSpeed JSON: sharding, offload, precision")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # given by the launcher
    parser.add_argument("--print-config", action="store_true", help="print the resolved settings and stop")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the plan, load nothing heavy")
    args = parser.parse_args(argv)
    try:
        settings = config.from_arguments(args)
        if args.print_config:
            print0(config.dump(settings))
            return 0
        job = Job(settings, args.ds_config)
        print0(job.plan())
        if not args.dry_run:
            train(job)
    except Stopped as stopped:
        print0(
            f"\nstopped by {stopped}; the state is saved below {settings.run.dir}: the same command continues the run"
        )
        return 0
    except (SettingsError, TrainingFailed) as error:
        # on every rank: a file may be missing on one node only
        print(f"error (rank {os.environ.get('RANK', 0)}): {error}", file=sys.stderr, flush=True)
        return 2 if isinstance(error, SettingsError) else 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
