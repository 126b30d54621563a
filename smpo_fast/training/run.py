"""A run from its job to its export: prepare the cache, load the networks, resume, train, finish."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from smpo_fast.common.launcher import watch_launcher
from smpo_fast.common.runtime import COMPUTE_DTYPES, StopSignal, print0, warn0
from smpo_fast.config.schema import Config
from smpo_fast.data.cache import location, prepare
from smpo_fast.engine import checkpoint, collectives, create
from smpo_fast.engine.checkpoint import Progress
from smpo_fast.engine.protocol import Engine
from smpo_fast.engine.zero import import_deepspeed
from smpo_fast.models import step_ops
from smpo_fast.models.denoiser import Denoiser
from smpo_fast.models.encoders import Encoders
from smpo_fast.models.inference import compilation
from smpo_fast.models.locate import schedule_of
from smpo_fast.training import reference
from smpo_fast.training.facts import average_begins, fact_defaults, trajectory_facts, unrecorded_scores
from smpo_fast.training.finish import finish
from smpo_fast.training.job import Job
from smpo_fast.training.loader import Loader
from smpo_fast.training.loop import check_weights, run_steps
from smpo_fast.training.policy import load_policy
from smpo_fast.training.progress import CallHook
from smpo_fast.training.reference import Reference
from smpo_fast.training.run_folder import describe_run
from smpo_fast.training.run_lock import run_lock
from smpo_fast.training.run_log import RunLog
from smpo_fast.training.step import Trainer
from smpo_fast.training.trajectories import TrajectoryStore


def train(job: Job, completed: Callable[[Job], Job] = lambda job: job) -> Path:
    """Prepare, train, export and evaluate; returns the run folder. Collective over all ranks.

    completed: is given the job when its cache is prepared and the ranks have met, and returns it with the settings that
    ``run.speed`` chooses. Raises EnvironmentProblem, on rank 0, while another process trains in the run folder.
    """
    watch_launcher()
    with run_lock(job.run_dir) if job.world.rank == 0 else nullcontext():
        prepare_cache(job)
        if job.ds_settings is not None:
            import_deepspeed(job.world)  # ranks meet before they load networks, which may take one of them longer
        job = completed(job)
        print0(f"speed      {job.speed}")
        states = train_policy(job)
        collectives.shutdown()
        gc.collect()  # evaluation needs the memory of the networks
        if job.world.rank == 0:
            finish(job, states)
    return job.run_dir


def prepare_cache(job: Job) -> None:
    """Prepare the cache unless it exists. All ranks share the work through its folder, not in a collective."""
    if not location.exists(job.cache_dir):
        encoders = Encoders(job.source, job.world.device)
        prepare.prepare(job.config, encoders, job.world.device, job.cache_dir, world=job.world)
        del encoders
        if job.world.device.type == "cuda":
            torch.cuda.empty_cache()  # training needs blocks of other sizes


def train_policy(job: Job) -> dict[str, dict[str, Tensor]]:
    """Make all remaining steps; returns what ``exported_states`` does. Collective."""
    c, world = job.config, job.world
    loader = Loader(job.open_cache(), c, replace(world, device=torch.device("cpu")))  # the prefetcher copies to CUDA
    print0(loader.labels.report)
    latent, gather = loader.cache.info.latent(), partial(collectives.gather, world)
    kernels = step_ops.resolve(c, world.device, COMPUTE_DTYPES[job.precision], latent, gather)
    policy = load_policy(c, job.source, job.precision, world.device, flattened=job.ds_settings is not None)
    engine = create.make_engine(policy, c, world, job.precision, job.ds_settings)
    defaults = fact_defaults(job.facts)
    progress = checkpoint.restore_latest(job.run_dir, engine, world, job.facts, defaults) or Progress()
    checkpoint.tidy(job.run_dir, world, c.run.keep)
    announce_state(job, progress)
    if world.rank == 0:
        describe_run(job, kernels, loader.labels.report)
    log = RunLog(job.run_dir, c, progress.step, world)
    store = open_store(job)
    schedule = schedule_of(job.source, c.inversion)
    as_denoiser = partial(Denoiser, source=job.source, schedule=schedule, precision=job.precision, device=world.device)
    total = c.run.steps * c.batch.pairs_per_step
    with tqdm(total=total, initial=progress.pairs_seen, unit="pair", desc="train", disable=world.rank != 0) as bar:
        frozen = open_reference(job, engine.unet, as_denoiser, store, progress)
        if c.model.compile == "all":
            with frozen() as network:
                compilation.compile_training(engine.unet, network.unet)
        stop = StopSignal(world)
        trainer = Trainer(
            c, world, schedule, engine, as_denoiser(engine.unet), frozen, loader, store, CallHook(stop, bar),
            step_ops.select_ops(c, kernels.enabled),
        )  # fmt: skip
        try:
            progress = run_steps(job, trainer, progress, log, bar)
        finally:
            log.close()
            stop.restore()
    check_weights(job, engine, progress)  # those of a finished run, too, before they are exported
    loader.cache.finish_checks()
    states = exported_states(engine, c)
    engine.close()
    return states


def exported_states(engine: Engine, config: Config) -> dict[str, dict[str, Tensor]]:
    """The state dicts, on the host, of the weights in ``Config.exported``; complete on rank 0. Collective."""
    state = engine.full_state()
    if config.exported == ("raw",):
        return {"raw": state}
    both = {"ema": state | engine.full_average(), "raw": state}
    return {kind: both[kind] for kind in config.exported}


def announce_state(job: Job, progress: Progress) -> None:
    """Say from where a run continues; nothing for one that starts."""
    steps, folder = job.config.run.steps, job.run_dir
    if not progress.step:
        return
    recorded = checkpoint.read_manifest(checkpoint.list_checkpoints(folder)[-1])["facts"]
    if average_begins(recorded, job.facts):
        print0(f"{folder}: no average of the weights was saved: it begins with those of step {progress.step}")
    if progress.step == steps:
        print0(f"{folder}: all {steps} steps are done; what follows the last step is done again")
    else:
        print0(f"{folder}: the run continues from its checkpoint of step {progress.step} of {steps}")
        if scores := unrecorded_scores(recorded, job.facts):
            warn0(
                f"{folder}: its checkpoint was written by a version that did not record which scores it was trained "
                f"with; the run goes on with {scores}: make sure that these are the same"
            )


def open_store(job: Job) -> TrajectoryStore | None:
    """The stored trajectories that runs share, if the settings name a folder for them."""
    c = job.config
    if not c.inversion.store:
        return None
    facts, defaults = trajectory_facts(job.facts), fact_defaults(job.facts)
    return TrajectoryStore(Path(c.inversion.store), facts, c.drawn_per_step, job.world, defaults)


def open_reference(
    job: Job,
    policy: nn.Module,
    as_denoiser: Callable[[nn.Module], Denoiser],
    store: TrajectoryStore | None,
    progress: Progress,
) -> Reference:
    """The reference where the settings want it; none is loaded when all of its errors are stored."""
    stored = store is not None and store.complete(progress.step, job.config.run.steps)
    where = "cached" if stored else job.reference
    return reference.make_reference(
        where, job.config, job.source, job.world, job.precision, policy, as_denoiser, job.ds_settings
    )
