"""What a run writes about itself into its folder: the resolved settings and the environment."""

from __future__ import annotations

import importlib.metadata
import platform
import sys

import torch

from smpo_fast.common.storage import remove_drafts, write_json, write_text
from smpo_fast.config import loading
from smpo_fast.training.job import Job


def describe_run(job: Job) -> None:
    """Write config.toml, environment.json and, with DeepSpeed, ds_config.json. The process holds the run's lock."""
    job.run_dir.mkdir(parents=True, exist_ok=True)
    remove_drafts(job.run_dir)
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
    }
    write_json(job.run_dir / "environment.json", facts, indent=2)
