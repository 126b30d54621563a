"""Sample, score and compare models with the base: at the end of a run, and as the program ``smpo evaluate``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from smpo_fast.common.errors import ConfigError, ModelError
from smpo_fast.common.json_report import json_report
from smpo_fast.common.runtime import World, print0
from smpo_fast.config.schema import Config
from smpo_fast.data.rewards.scorers import Scorer, check_scorer, load_scorer, scorer_identity
from smpo_fast.evaluation.contenders import BASE, check_contenders, contenders
from smpo_fast.evaluation.image_store import IMAGES, ImageStore
from smpo_fast.evaluation.measures import DIVERSITY, MEASURES, diversity, measure
from smpo_fast.evaluation.report import Evaluation, Values, write_report
from smpo_fast.evaluation.sampling import PART_IMAGES, Shot, draw, read_prompts, share, shots, work_folder
from smpo_fast.evaluation.statistics import Comparison, compare_all
from smpo_fast.models import lora
from smpo_fast.models.locate import ModelSource, find


def check(config: Config) -> None:
    """Check ``[eval]`` before anything is loaded; raises the UserError that names what is missing or wrong."""
    if config.eval.prompts:
        read_prompts(config)
        check_contenders(config)
    for name in _scorers(config):
        check_scorer(name, "eval.scorer")


def evaluate(config: Config, source: ModelSource, export: Path, out: Path, world: World) -> Evaluation:
    """Sample, score and compare base, export and ``eval.contenders``; writes the files of ``report`` to ``out``.

    Images and scores that exist already are used; processes of ``world`` share the others, and rank 0 writes. Where
    the run has extracted a LoRA, the base with it is compared as well.
    """
    out.mkdir(parents=True, exist_ok=True)
    store = ImageStore(Path(config.eval.images) if config.eval.images else out / IMAGES)
    wanted = shots(config)
    keys = {c.name: draw(c, wanted, config, store, world) for c in contenders(config, source, export)}
    scores = score(config, store, wanted, keys, world)
    done = Evaluation([], [], scores, {}, keys)
    if world.rank == 0:
        measures = _measures(store, keys, config.eval.per_prompt)
        done = replace(done, comparisons=_against_base(scores), drifts=_against_base(measures), measures=measures)
        write_report(out, config, read_prompts(config), store, done)
    return done


def score(
    config: Config, store: ImageStore, wanted: Sequence[Shot], keys: Mapping[str, list[str]], world: World
) -> Values:
    """Scores by their name and the model's, a mean over the images of each prompt.

    The names of a single scorer are 'reward' and those of its parts; those of several begin with the scorer's.
    """
    found: Values = {}
    scorers = _scorers(config)
    for name in scorers:
        identity = f"{name}/{scorer_identity(name)}"
        _score_missing(name, identity, config, store, wanted, keys, world)
        for model, of_model in keys.items():
            rows = [store.scores(key)[identity] for key in of_model]
            for part in rows[0]:
                column = part if len(scorers) == 1 else name if part == "reward" else f"{name}: {part}"
                found.setdefault(column, {})[model] = _per_prompt(config, [row[part] for row in rows])
    return found


def _score_missing(
    name: str,
    identity: str,
    config: Config,
    store: ImageStore,
    wanted: Sequence[Shot],
    keys: Mapping[str, list[str]],
    world: World,
) -> None:
    prompts = {key: shot.prompt for of_model in keys.values() for key, shot in zip(of_model, wanted, strict=True)}
    tasks = list(prompts.items())
    missing = sum(identity not in store.scores(key) for key in prompts)
    work = {"score": [identity, *prompts]}
    if not missing and not work_folder(store, work).exists():
        return
    loaded: list[Scorer] = []

    def part(part_name: str) -> dict[str, int]:
        first = PART_IMAGES * int(part_name.rpartition("-")[2])
        rows = [row for row in tasks[first : first + PART_IMAGES] if identity not in store.scores(row[0])]
        if rows and not loaded:
            loaded.append(load_scorer(name, world.device))
        for start in range(0, len(rows), config.eval.batch):
            batch = rows[start : start + config.eval.batch]
            parts = loaded[0].parts([store.image(key) for key, _ in batch], [prompt for _, prompt in batch])
            for i, (key, _) in enumerate(batch):
                store.add_scores(key, identity, {part: float(values[i]) for part, values in parts.items()})
            bar.update(len(batch))
        return {"images": len(rows)}

    total = missing if world.size == 1 else None
    with tqdm(total=total, desc=f"score by {name}", unit="image", disable=world.rank != 0) as bar:
        share(store, work, len(tasks), world, part)


def _measures(store: ImageStore, keys: Mapping[str, list[str]], each: int) -> Values:
    found: Values = {name: {} for name in (*MEASURES, *([DIVERSITY] if each > 1 else []))}
    for model, of_model in keys.items():
        rows = [measure(store.image(key)) for key in of_model]
        for name in MEASURES:
            found[name][model] = np.array([row[name] for row in rows]).reshape(-1, each).mean(axis=1)
        if each > 1:
            groups = (of_model[i : i + each] for i in range(0, len(of_model), each))
            found[DIVERSITY][model] = np.array([diversity([store.image(key) for key in group]) for group in groups])
    return found


def _per_prompt(config: Config, values: Sequence[float]) -> np.ndarray:
    return np.array(values, np.float64).reshape(-1, config.eval.per_prompt).mean(axis=1)


def _against_base(values: Values) -> list[Comparison]:
    """Every model but the base, by every score; p-values are corrected for all of them together."""
    models = [model for model in next(iter(values.values()), {}) if model != BASE]
    return compare_all({
        (model, name): (found[BASE], found[model]) for model in models for name, found in values.items()
    })  # fmt: skip


def _scorers(config: Config) -> list[str]:
    return [name.strip() for name in config.eval.scorer.split(",") if name.strip()]


def run(config: Config, world: World, *, as_json: bool = False) -> None:
    """The program ``smpo evaluate``: compare a finished run's export, and other models, with its base.

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
        done = evaluate(config, find(config.model), run_dir / "export", run_dir / "evaluation", world)
        facts |= {"out": run_dir / "evaluation", "comparisons": done.comparisons, "drifts": done.drifts}
        print0(done.text(config))
