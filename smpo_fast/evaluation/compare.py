"""Base against aligned: pictures from the same prompts and noise, scores with intervals, one grid to look at."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from smpo_fast.common import plots
from smpo_fast.common.errors import UserError
from smpo_fast.common.runtime import print0
from smpo_fast.config.schema import EMBEDDED, Config
from smpo_fast.data.rewards.scorers import check_scorer, load_scorer
from smpo_fast.embedded import shapes
from smpo_fast.models import lora
from smpo_fast.models.load import load_pipeline
from smpo_fast.models.locate import ModelSource, find

GRID_ROWS = 12
BOOTSTRAP = 2000


@dataclass(frozen=True)
class Comparison:
    """One score of base and aligned pictures over the same prompts and noise."""

    name: str
    base: float
    aligned: float
    gain: float
    gain_low: float  # 95 % interval of the mean gain, over prompts
    gain_high: float
    win_rate: float  # share of prompts whose aligned picture scores higher; ties count half
    prompts: int

    def line(self) -> str:
        return (
            f"{self.name:<12} base {self.base:.3f}  aligned {self.aligned:.3f}  "
            f"gain {self.gain:+.3f} (95 % {self.gain_low:+.3f} to {self.gain_high:+.3f})  "
            f"same-noise win-rate {self.win_rate:.1%}  n = {self.prompts}"
        )


def compare(name: str, base: np.ndarray, aligned: np.ndarray, seed: int = 0) -> Comparison:
    """Compare scores [n] of paired pictures; the interval is a percentile bootstrap over prompts."""
    gain = aligned.astype(np.float64) - base
    picks = np.random.default_rng(seed).integers(0, len(gain), (BOOTSTRAP, len(gain)))
    low, high = np.percentile(gain[picks].mean(axis=1), [2.5, 97.5])
    wins = (gain > 0).mean() + 0.5 * (gain == 0).mean()
    return Comparison(
        name,
        base=float(base.mean()),
        aligned=float(aligned.mean()),
        gain=float(gain.mean()),
        gain_low=float(low),
        gain_high=float(high),
        win_rate=float(wins),
        prompts=len(gain),
    )


def check(config: Config) -> None:
    """Raise SettingsError for prompts or a scorer that cannot be had, before anything is loaded."""
    if config.eval.prompts:
        prompts(config)
    if config.eval.scorer:
        check_scorer(config.eval.scorer, "eval.scorer")


def prompts(config: Config) -> list[str]:
    """The prompts of ``[eval]``: held-out ones of the embedded world, or the lines of a text file."""
    count = config.eval.count
    if config.eval.prompts == EMBEDDED:
        return shapes.prompts("held-out", count, config.eval.seed)
    try:
        lines = [line.strip() for line in Path(config.eval.prompts).read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"eval.prompts = '{config.eval.prompts}': cannot be read ({error})") from error
    found = [line for line in lines if line]
    if not found:
        raise UserError(f"eval.prompts = '{config.eval.prompts}': the file has no prompt")
    return found[:count]


def evaluate(config: Config, source: ModelSource, export: Path, out: Path, device: torch.device) -> str:
    """Sample, score and compare base and export; writes grid.png, evaluation.json and scores.csv below ``out``.

    Returns the comparison as text. Picture i starts from noise drawn with seed ``eval.seed + i`` in both.
    """
    out.mkdir(parents=True, exist_ok=True)
    words = prompts(config)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    make: dict[str, Callable[[ModelSource, torch.dtype], Any]] = {
        "base": load_pipeline,
        "aligned": partial(aligned_pipeline, config, export),
    }
    pictures = {
        name: sample(pipe(source, dtype).to(device), words, config, f"sample {name}") for name, pipe in make.items()
    }
    scores = score(config, pictures, words, device)
    comparisons = [compare(name, both["base"], both["aligned"]) for name, both in scores.items()]
    write_scores(out / "scores.csv", words, scores)
    text = "\n".join(c.line() for c in comparisons)
    facts = {"eval": config.eval.model_dump(), "comparisons": [asdict(c) for c in comparisons]}
    (out / "evaluation.json").write_text(json.dumps(facts, indent=2))
    shown = next(iter(scores.values())) if scores else None
    plots.draw_grid(pictures["base"], pictures["aligned"], words, shown, out / "grid.png", rows=GRID_ROWS)
    return text


def aligned_pipeline(config: Config, export: Path, source: ModelSource, dtype: torch.dtype) -> Any:
    """What a run exported: a pipeline of its own, or the base with the run's adapters."""
    if not (export / lora.FILE).is_file():
        here = config.model.model_copy(update={"path": str(export), "vae": "", "unet": "", "variant": ""})
        return load_pipeline(find(here), dtype)
    pipe = load_pipeline(source, dtype)
    pipe.load_lora_weights(export, weight_name=lora.FILE)
    return pipe


@torch.no_grad()
def sample(pipe: Any, words: Sequence[str], config: Config, label: str) -> list[Image.Image]:
    """One picture a prompt by the pipeline's own sampler."""
    pipe.set_progress_bar_config(disable=True)
    pictures: list[Image.Image] = []
    for first in tqdm(range(0, len(words), config.eval.batch), desc=label, unit="batch"):
        batch = list(words[first : first + config.eval.batch])
        seeds = [config.eval.seed + first + i for i in range(len(batch))]
        pictures += pipe(
            batch,
            num_inference_steps=config.eval.steps,
            guidance_scale=config.eval.guidance,
            generator=[torch.Generator("cpu").manual_seed(s) for s in seeds],
        ).images
    return pictures


def score(
    config: Config, pictures: dict[str, list[Image.Image]], words: Sequence[str], device: torch.device
) -> dict[str, dict[str, np.ndarray]]:
    """Scores by name ('reward' first, then the scorer's parts) of base and aligned pictures; empty without a scorer."""
    if not config.eval.scorer:
        return {}
    scorer = load_scorer(config.eval.scorer, device)
    found: dict[str, dict[str, np.ndarray]] = {}
    for which, images in pictures.items():
        for name, values in scorer.parts(images, list(words)).items():
            found.setdefault(name, {})[which] = values
    return found


def write_scores(file: Path, words: Sequence[str], scores: dict[str, dict[str, np.ndarray]]) -> None:
    """A row a prompt."""
    columns = [(f"{name}_{which}", both[which]) for name, both in scores.items() for which in ("base", "aligned")]
    with file.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["prompt", *(name for name, _ in columns)])
        writer.writerows([word, *(f"{values[i]:.6g}" for _, values in columns)] for i, word in enumerate(words))


def run(config: Config, device: torch.device) -> None:
    """Program ``smpo evaluate``: compare a finished run's export with its base again."""
    run_dir = Path(config.run.dir)
    if not any((run_dir / "export" / name).is_file() for name in ("model_index.json", lora.FILE)):
        raise UserError(f"run.dir = '{run_dir}': it has no export/ yet: train first")
    if not config.eval.prompts:
        raise UserError("eval.prompts is empty: give 'embedded' or a text file with a prompt a line")
    check(config)
    print0(evaluate(config, find(config.model), run_dir / "export", run_dir / "evaluation", device))
