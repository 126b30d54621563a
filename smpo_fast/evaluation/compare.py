"""Sample, score and compare base and aligned: at the end of a run, and as the program ``smpo evaluate``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from smpo_fast.common.errors import ConfigError, ModelError
from smpo_fast.common.json_report import json_report
from smpo_fast.common.runtime import print0
from smpo_fast.config.schema import Config
from smpo_fast.data.rewards.scorers import check_scorer, load_scorer
from smpo_fast.evaluation.report import write_report
from smpo_fast.evaluation.sampling import aligned_pipeline, extracted_lora, read_prompts, sample
from smpo_fast.evaluation.statistics import Comparison, compare_all
from smpo_fast.models import lora
from smpo_fast.models.load import load_pipeline
from smpo_fast.models.locate import ModelSource, find


def check(config: Config) -> None:
    """Check ``[eval]`` before anything is loaded; raises the UserError that names what is missing or wrong."""
    if config.eval.prompts:
        read_prompts(config)
    if config.eval.scorer:
        check_scorer(config.eval.scorer, "eval.scorer")


def evaluate(config: Config, source: ModelSource, export: Path, out: Path, device: torch.device) -> list[Comparison]:
    """Sample, score and compare base and export; writes grid.png, evaluation.json and scores.csv to ``out``.

    Where the run has extracted a LoRA, the base with it is sampled and compared as well. Returns a comparison for each
    score; none without a scorer.
    """
    out.mkdir(parents=True, exist_ok=True)
    prompts = read_prompts(config)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    images = {"base": sample(load_pipeline(source, dtype).to(device), prompts, config, "sample base")}
    extracted = extracted_lora(config)
    for name, place in {"aligned": export, **({"lora": extracted} if extracted else {})}.items():
        # a pipeline is loaded when the one before is gone: one at a time is on the device
        pipeline = aligned_pipeline(config, place, source, dtype).to(device)
        images[name] = sample(pipeline, prompts, config, f"sample {name}")
        del pipeline
    scores = score(config, images, prompts, device)
    comparisons = compare_all({name: (found["base"], found["aligned"]) for name, found in scores.items()})
    if extracted:
        comparisons += compare_all({f"{name} (lora)": (x["base"], x["lora"]) for name, x in scores.items()})
    write_report(out, config, prompts, images, scores, comparisons)
    return comparisons


def score(
    config: Config, images: Mapping[str, list[Image.Image]], prompts: Sequence[str], device: torch.device
) -> dict[str, dict[str, np.ndarray]]:
    """Scores by name ('reward' first, then the scorer's parts) of all images; empty without a scorer."""
    if not config.eval.scorer:
        return {}
    scorer = load_scorer(config.eval.scorer, device)
    found: dict[str, dict[str, np.ndarray]] = {}
    for which, of_model in images.items():
        for name, values in scorer.parts(of_model, list(prompts)).items():
            found.setdefault(name, {})[which] = values
    return found


def run(config: Config, device: torch.device, *, as_json: bool = False) -> None:
    """The program ``smpo evaluate``: compare a finished run's export with its base again.

    as_json: the facts on standard output, the text on standard error.
    Raises ModelError when the run has no export, and ConfigError when no prompts are given.
    """
    run_dir = Path(config.run.dir)
    if not any((run_dir / "export" / name).is_file() for name in ("model_index.json", lora.FILE)):
        raise ModelError(f"run.dir = '{run_dir}' has no export/ yet: train first")
    if not config.eval.prompts:
        raise ConfigError("eval.prompts is empty: give 'embedded' or a text file with one prompt per line")
    check(config)
    with json_report(as_json) as facts:
        comparisons = evaluate(config, find(config.model), run_dir / "export", run_dir / "evaluation", device)
        facts |= {"out": run_dir / "evaluation", "comparisons": comparisons}
        print0("\n".join(map(str, comparisons)))
