"""What a run is going to do, in a few lines for the user."""

from __future__ import annotations

import json

from smpo_fast.config.schema import Lora
from smpo_fast.engine.batch_size import pairs_per_rank
from smpo_fast.method import inversion
from smpo_fast.models.locate import schedule_of
from smpo_fast.training.job import Job


def overview(job: Job) -> dict[str, str]:
    """The model, the objective, the optimizer step, the optimizer, the weights that are trained, the run folder."""
    c = job.config
    engine = f"DeepSpeed {job.ds_file} (filled in: {json.dumps(job.filled)})" if job.ds_file else "plain PyTorch"
    return {
        "model": job.source.describe(),
        "objective": f"{c.objective.name}, beta {c.objective.beta:g}; x_t by {c.inversion.source} "
        f"({c.inversion.fidelity}, {c.inversion.solver}), {_calls_per_image(job):.2f} no-gradient calls per image",
        "step": f"{c.batch.pairs_per_step} pairs = {job.world.size} ranks x {pairs_per_rank(c, job.world.size)} "
        f"pairs in micro-batches of {c.batch.micro_pairs}; {c.run.steps} steps",
        "optimizer": f"{c.optim.name}, lr {c.optim.lr:g}, {job.precision}, {engine}",
        "weights": f"{_trained_weights(c.lora)}; reference: {job.reference}",
        "run": str(job.run_dir),
    }


def _calls_per_image(job: Job) -> float:
    """The mean over all timesteps."""
    settings = job.config.inversion
    schedule = schedule_of(job.source, settings)
    depths = [schedule.path(t, settings).depth for t in range(len(schedule))]
    return sum(inversion.network_calls(depth, settings) for depth in depths) / len(depths)


def _trained_weights(adapters: Lora) -> str:
    if not adapters.rank:
        return "all are trained"
    kind = "DoRA" if adapters.use_dora else "LoRA"
    return f"{kind} of rank {adapters.rank} on {', '.join(adapters.targets)}, the base frozen"
