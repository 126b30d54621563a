"""One small artefact of every kind that the programs write, and ways to damage a file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.torch import save_file

from helpers import toy
from helpers.encoders import FakeEncoders
from helpers.import_sources import chosen_table
from smpo_fast.common import storage
from smpo_fast.common.runtime import World
from smpo_fast.common.verification import BAD
from smpo_fast.config import loading
from smpo_fast.config.commands import ImportOptions, ScoreOptions
from smpo_fast.config.schema import Config
from smpo_fast.data.cache.prepare import prepare
from smpo_fast.data.ingest.importer import import_pairs
from smpo_fast.data.rewards.scoring import score
from smpo_fast.engine import checkpoint
from smpo_fast.engine.checkpoint import Progress
from smpo_fast.evaluation.image_store import IMAGES, ImageStore
from smpo_fast.evaluation.report import Evaluation, write_report
from smpo_fast.models.export import export_pipeline
from smpo_fast.models.load import empty_unet
from smpo_fast.models.locate import find
from smpo_fast.models.pipeline_folder import LORA_FILE, begin_export, publish_export
from smpo_fast.training.run_folder import describe_end
from smpo_fast.training.trajectories import TrajectoryStore
from smpo_fast.verification.artifacts import Request, recognise

CPU = torch.device("cpu")
ROWS = 6  # of the embedded pairs, that are scored and cached


def table(parent: Path) -> Path:
    pq.write_table(chosen_table(), parent / "source.parquet")
    import_pairs(str(parent / "source.parquet"), parent / "pairs", ImportOptions())
    return parent / "pairs"


def scores(parent: Path) -> Path:
    options = ScoreOptions(scorer="embedded", max_pairs=ROWS)
    score("embedded", parent / "scores", options, World(), loading.from_dict({}).labels)
    return parent / "scores"


def cache(parent: Path) -> Path:
    settings = loading.from_dict({"data": {"max_pairs": ROWS, "resolution": 32}})
    prepare(settings, FakeEncoders(), CPU, parent / "cache")
    return parent / "cache"


def checkpoint_folder(parent: Path, **optim: Any) -> Path:
    settings = toy.settings(**optim)
    engine = toy.make(settings)
    toy.train(engine, settings, range(1))
    return checkpoint.save(parent, engine, Progress(step=1, pairs_seen=10), World(), {"seed": 3}, keep=2)


def pipeline(parent: Path) -> Path:
    """SDXL's parts, with UNet and VAE of the embedded pipeline and as few tensors as that has."""
    source = find(loading.from_dict({}).model)
    weights = {name: torch.full(t.shape, 0.01) for name, t in empty_unet(source).state_dict().items()}
    export_pipeline(source, weights, parent / "export", "float16")
    return parent / "export"


def adapters(parent: Path) -> Path:
    building = begin_export(parent / "export")
    save_file({"unet.a.lora_A.weight": torch.ones(2, 3)}, building / LORA_FILE)
    publish_export(building, parent / "export")
    return parent / "export"


def store(parent: Path) -> Path:
    """Three steps of two ranks with a pair each."""
    folder = parent / "store"
    for rank in range(2):
        written = TrajectoryStore(folder, {"seed": 3}, 2, World(rank, 2))
        for step in range(3):
            written.write(step, [((0,), torch.full((1, 1, 2, 4, 2, 2), 0.5), torch.ones(1, 1, 2))])
    return folder


def evaluation(parent: Path) -> Path:
    folder = parent / "evaluation"
    folder.mkdir()
    keys = {"base": ["a" * 64], "aligned": ["b" * 64]}
    store = ImageStore(folder / IMAGES)
    for (key,) in keys.values():
        store.add(key, Image.new("RGB", (32, 32)))
        store.add_scores(key, "embedded", {"reward": 1.0})
    values = {"reward": {which: np.ones(1) for which in keys}}
    write_report(folder, loading.from_dict({}), ["a circle"], store, Evaluation([], [], values, {}, keys))
    return folder


def run(parent: Path) -> Path:
    """A finished run, whose checkpoint and evaluation are in its folder."""
    folder = parent / "run"
    folder.mkdir()
    checkpoint_folder(folder)
    evaluation(folder)
    (folder / "config.toml").write_text(loading.dump(loading.from_dict({"run": {"steps": 2}})))
    (folder / "environment.json").write_text(json.dumps({"python": "3"}))
    rows = [{"step": step, "train_loss": 0.7, "applied": True} for step in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copyfile(folder / "evaluation" / "grid.png", folder / "curves.png")
    describe_end(folder)
    return folder


MAKERS: dict[str, Callable[[Path], Path]] = {
    "table": table, "scores": scores, "cache": cache, "checkpoint": checkpoint_folder, "pipeline": pipeline,
    "adapters": adapters, "store": store, "evaluation": evaluation, "run": run,
}  # fmt: skip


def flipped(content: bytes, place: float) -> bytes:
    """Content with one bit changed, at a place from 0 (the first byte) to 1 (the last)."""
    i = round(place * (len(content) - 1))
    return content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :]


def problems(path: Path, settings: Config | None = None, *, deep: bool = False) -> list[str]:
    """What ``smpo verify`` finds wrong, a line for each thing."""
    found = recognise(path).verify(path, Request(settings, CPU, deep))
    return [f"{finding.place}: {finding.text}" for finding in found if finding.grade == BAD]


def reseal(file: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change the values of a sealed description, and seal them again."""
    values = storage.unsealed(json.loads(file.read_text()))
    edit(values)
    storage.write_json(file, storage.sealed(values))
