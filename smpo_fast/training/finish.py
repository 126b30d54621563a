"""The end of a run: export, curves, evaluation and summary."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from smpo_fast.common import plots, storage
from smpo_fast.common.runtime import print0, warn0
from smpo_fast.evaluation import compare
from smpo_fast.models import lora
from smpo_fast.models.export import export_pipeline, exported_model
from smpo_fast.models.locate import find
from smpo_fast.models.single_file.write import write_single_file
from smpo_fast.training.job import Job
from smpo_fast.training.run_folder import describe_end
from smpo_fast.training.run_log import read_metrics


def finish(job: Job, state: dict[str, Tensor]) -> None:
    """Export, draw the curves, evaluate, and print where everything is. Called on rank 0.

    state: the trained weights, of any shapes, by name.
    """
    c, export = job.config, job.run_dir / "export"
    merged = job.run_dir / "merged"
    if c.lora.rank:
        before = _hash(export / lora.FILE)
        lora.save(c, job.source, state, export)
        if merged.exists() and not c.lora.merge and _hash(export / lora.FILE) != before:
            warn0(f"{merged} has the adapters of an earlier export: smpo merge writes it again")
    else:
        export_pipeline(job.source, state, export, c.model.export_dtype)
    if c.lora.merge:
        lora.merge(c, job.source, export, merged)
    if "single-file" in c.export.formats:
        write_single_file(
            find(exported_model(c.model, merged if c.lora.rank else export)),
            job.run_dir / "single-file",
            title=job.run_dir.resolve().name,
            resolution=c.data.resolution,
            dtype=c.model.export_dtype,
        )
    plots.draw_curves(read_metrics(job.run_dir), job.run_dir / "curves.png")
    summary = ""
    if c.eval.prompts:
        summary = compare.evaluate(c, job.source, export, job.run_dir / "evaluation", job.world.device)
    describe_end(job.run_dir)
    exported = f"the {'adapters' if c.lora.rank else 'aligned pipeline'}, for diffusers'"
    exported += " load_lora_weights" if c.lora.rank else " from_pretrained"
    print0(
        f"\n{summary}\n{totals(read_metrics(job.run_dir))}\n"
        + (f"speed: {job.speed}\n" if job.speed else "")
        + f"The run is complete: {job.run_dir}/\n"
        f"  export/         {exported}\n"
        + (
            "  merged/         the aligned pipeline, with the adapters merged into its weights\n"
            if c.lora.merge
            else ""
        )
        + (
            "  single-file/    the aligned pipeline as one file, for ComfyUI, A1111, Forge and InvokeAI\n"
            if "single-file" in c.export.formats
            else ""
        )
        + "  metrics.jsonl   one line per step; tensorboard/ has the same; curves.png plots them\n"
        "  config.toml     the resolved settings; environment.json has versions and device\n"
        + ("  evaluation/     grid.png (base next to aligned), evaluation.json, scores.csv\n" if summary else "")
    )


def _hash(file: Path) -> str:
    """sha256 of a file; empty if there is none."""
    return storage.sha256(file) if file.is_file() else ""


def totals(rows: Sequence[dict[str, Any]]) -> str:
    """Steps, seconds, speed and peak memory of a run, from the rows of its log."""
    if not rows:
        return "no step was trained"
    seconds, peak = sum(row["seconds"] for row in rows), max(row["memory_gb"] for row in rows)
    speed = rows[-1]["pairs_seen"] / seconds
    return f"{len(rows)} steps in {seconds:.0f} s ({speed:.1f} pairs/s), peak memory {peak:.2f} GB (rank 0)"
