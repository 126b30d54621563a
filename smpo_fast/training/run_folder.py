"""What a run writes about itself into its folder: settings and environment at the start, hashes at the end."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
import platform
import sys
from pathlib import Path
from typing import Any

import torch

from smpo_fast.common.storage import file_facts, remove_drafts, sealed, write_json, write_text
from smpo_fast.config import loading
from smpo_fast.method.label_report import LabelReport
from smpo_fast.models.base_facts import base_facts
from smpo_fast.models.step_ops import Selection
from smpo_fast.training.job import Job

FINISHED = "finished.json"
OWN_FILES = ("config.toml", "environment.json", "ds_config.json", "metrics.jsonl", "curves.png")


def describe_run(job: Job, kernels: Selection, labels: LabelReport) -> None:
    """Write config.toml, environment.json and, with DeepSpeed, ds_config.json; the run is no longer finished.

    labels: of the pairs that it trains with. The process holds the run's lock.
    """
    job.run_dir.mkdir(parents=True, exist_ok=True)
    remove_drafts(job.run_dir)
    (job.run_dir / FINISHED).unlink(missing_ok=True)
    write_text(job.run_dir / "config.toml", loading.dump(job.config))
    if job.ds_settings is not None:
        write_json(job.run_dir / "ds_config.json", job.ds_settings, indent=2)
    names = ["torch", "diffusers", "transformers", "deepspeed", "bitsandbytes", "smpo-fast"]
    names += ["peft"] if job.config.lora.rank else []
    facts = {
        "command": sys.argv,
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in names},
        "device": torch.cuda.get_device_name() if job.world.device.type == "cuda" else platform.processor() or "cpu",
        "ranks": job.world.size,
        "precision": job.precision,
        "kernels": kernels.facts(),
        "speed": job.speed,
        "base": base_facts(job.config.model, job.source),
        "labels": {name: _json_number(value) for name, value in dataclasses.asdict(labels).items()},
    }
    write_json(job.run_dir / "environment.json", facts, indent=2)


def _json_number(value: Any) -> Any:
    """A number as it is, and None for one that is not finite, which JSON has no word for."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def describe_end(run_dir: Path) -> None:
    """Write finished.json: size and SHA-256 of the run's own files, which do not change any more."""
    files = {name: file_facts(run_dir / name) for name in OWN_FILES if (run_dir / name).is_file()}
    write_json(run_dir / FINISHED, sealed({"files": files}), indent=2)
