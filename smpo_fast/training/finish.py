"""The end of a run: export, curves, evaluation and summary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from smpo_fast.common import plots, storage
from smpo_fast.common.runtime import World, print0
from smpo_fast.evaluation import compare
from smpo_fast.training.exports import Trained, exported_weights, write_exports
from smpo_fast.training.job import Job
from smpo_fast.training.run_folder import describe_end
from smpo_fast.training.run_log import read_metrics


def finish(job: Job, states: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Export, draw the curves, evaluate, and print where everything is. Called on rank 0.

    states: for each of ``Config.exported``, the weights, of any shapes, by name.
    """
    c = job.config
    title, facts = job.run_dir.resolve().name, storage.as_json(job.facts)
    written: dict[str, str] = {}
    for kind, state in states.items():
        trained = Trained(kind, exported_weights(c, job.source, state), title, c.run.steps, facts)
        written |= write_exports(c, job.source, trained, job.run_dir, c.export.formats, job.world.device)
    plots.draw_curves(read_metrics(job.run_dir), job.run_dir / "curves.png")
    summary = ""
    if c.eval.prompts:
        out = job.run_dir / "evaluation"
        alone = World(device=job.world.device)  # the other ranks have ended
        summary = compare.evaluate(c, job.source, job.run_dir / "export", out, alone).text(c)
    describe_end(job.run_dir)
    folders = "".join(f"  {name + '/':<15} {what}\n" for name, what in written.items())
    print0(
        f"\n{summary}\n{totals(read_metrics(job.run_dir))}\n"
        + (f"speed: {job.speed}\n" if job.speed else "")
        + f"The run is complete: {job.run_dir}/\n"
        + folders
        + "  metrics.jsonl   one line per step; tensorboard/ has the same; curves.png plots them\n"
        "  config.toml     the resolved settings; environment.json has versions and device\n"
        + ("  evaluation/     grid.png (base next to aligned), evaluation.json, scores.csv\n" if summary else "")
    )


def totals(rows: Sequence[dict[str, Any]]) -> str:
    """Steps, seconds, speed and peak memory of a run, from the rows of its log."""
    if not rows:
        return "no step was trained"
    seconds, peak = sum(row["seconds"] for row in rows), max(row["memory_gb"] for row in rows)
    speed = rows[-1]["pairs_seen"] / seconds
    return f"{len(rows)} steps in {seconds:.0f} s ({speed:.1f} pairs/s), peak memory {peak:.2f} GB (rank 0)"
