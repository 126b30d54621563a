"""What the campaign disturbs: each program on the smallest work that still passes through all of its stages.

The programs share one folder: the source ``mine`` becomes ``pairs``, these ``scores`` and a ``cache``, and so on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from helpers import toy
from helpers.paths import CONFIGS

from smpo_fast import cli, train
from smpo_fast.common import programs
from smpo_fast.common.runtime import World
from smpo_fast.config import loading
from smpo_fast.config.schema import EMBEDDED
from smpo_fast.data.cache import pipeline
from smpo_fast.data.ingest import generate, importer
from smpo_fast.data.pairs import reader
from smpo_fast.data.pairs.pair import RawPair
from smpo_fast.data.rewards import scoring_work
from smpo_fast.engine import checkpoint
from smpo_fast.engine.checkpoint import Progress
from smpo_fast.models.export import export_pipeline
from smpo_fast.models.load import load_unet
from smpo_fast.models.locate import find

PAIRS = 9  # of the source, the last of them broken
SETTINGS = [
    "data.pairs=pairs", "data.scores=scores", "data.cache=cache", "run.dir=run", "run.steps=4", "run.save_every=2",
    "run.keep=1", "run.device=cpu", "batch.pairs_per_step=4", "batch.micro_pairs=2", "batch.inversion_pairs=4",
    "inversion.steps=1", "optim.lr=1e-3", "optim.warmup_steps=0", "eval.prompts=", "log.tensorboard=false",
]  # fmt: skip
# what the programs import when they are already at work
IMPORTED_LATE = ("diffusers.loaders.lora_pipeline", "deepspeed", "matplotlib.pyplot", "transformers.models.clip")


@dataclass(frozen=True)
class Program:
    """A program, the folders that it reads, and those that it makes.

    published: patterns of what is complete or absent (or as it was before) whatever happens to the program.
    """

    run: Callable[[], int]
    reads: Sequence[str]
    makes: Sequence[str]
    published: Sequence[str]


def make_parts_small() -> None:
    """Parts of a few rows instead of thousands, in this process."""
    importer.import_pairs.__kwdefaults__["part_bytes"] = 8000
    scoring_work.PART_ROWS = pipeline.PART_ROWS = 4
    pipeline.PROMPT_SHARD = pipeline.PROMPT_BATCH = 4
    generate.PART_IMAGES = 4


def write_source(folder: Path) -> None:
    """``mine``: a JSON manifest with pictures beside it, and a tar of single pictures; from the embedded pairs."""
    pictures = folder / "mine" / "pictures"
    pictures.mkdir(parents=True)
    lines = []
    for number, pair in enumerate(reader.read_pairs(reader.source_path(EMBEDDED), max_pairs=PAIRS)):
        assert isinstance(pair, RawPair)
        for side, content in enumerate(pair.images if pair.label else pair.images[::-1]):
            broken = number == PAIRS - 1
            (pictures / f"{number}-{side}.png").write_bytes(b"no picture" if broken else content)
        files = {"chosen": f"pictures/{number}-0.png", "rejected": f"pictures/{number}-1.png"}
        lines.append(json.dumps({"prompt": pair.prompt, **files}))
    (folder / "mine" / "pairs.jsonl").write_text("\n".join(lines) + "\n")


def _export() -> int:
    """Write ``export``, or replace it by a pipeline with other weights."""
    model = loading.from_dict({"model": {"path": EMBEDDED}}).model
    source = find(model)
    unet = load_unet(source, model, torch.float32, torch.device("cpu"))
    other = 1.0 if Path("export").exists() else 0.0
    state = {name: tensor + other for name, tensor in unet.state_dict().items()}
    export_pipeline(source, state, Path("export"), "float32")
    return 0


def _import_any() -> int:
    """Import what is in ``source``: a file, or a folder of several."""
    found = sorted(Path("source").iterdir())
    return cli.main(["import", str(found[0] if len(found) == 1 else "source"), "imported", "--check"])


def _save() -> int:
    """Train a network of 10,000 weights for six steps, with a checkpoint after each, of which two are kept."""
    settings = toy.settings()
    engine = toy.make(settings)
    done = checkpoint.restore_latest("toy", engine, World(), {"seed": 0}) or Progress()
    checkpoint.tidy("toy", World(), keep=2)
    for step in range(done.step, 6):
        toy.accumulate(engine, settings, step)
        engine.step(1e-2)
        checkpoint.save("toy", engine, Progress(step + 1), World(), {"seed": 0}, keep=2)
    return 0


def _cli(*words: str) -> Callable[[], int]:
    return lambda: cli.main(words)


def _train(*words: str) -> Callable[[], int]:
    return lambda: train.main([*SETTINGS, *words])


EVALUATE = ["eval.prompts=embedded", "eval.scorer=embedded", "eval.count=2", "eval.steps=1", "eval.batch=2"]
STORED = ["run.steps=2", "inversion.network=reference", "inversion.store=store"]
GENERATE = [
    "embedded", "generated", "--model", "embedded", "--count", "3", "--per-prompt", "2", "--steps", "1", "--batch", "2",
    "--scorer", "embedded", "--device", "cpu",
]  # fmt: skip

PROGRAMS: dict[str, Program] = {
    "import": Program(_cli("import", "mine", "pairs"), ["mine"], ["pairs"], ["pairs"]),
    "score": Program(
        _cli("score", "pairs", "scores", "--scorer", "embedded", "--batch", "3", "--device", "cpu"),
        ["pairs"], ["scores"], ["scores/*"],
    ),
    "prepare": Program(_cli("prepare", *SETTINGS), ["pairs", "scores"], ["cache"], ["cache"]),
    "train": Program(
        _train(), ["pairs", "scores", "cache"], ["run"], ["run/checkpoints/step-*", "run/export"],
    ),
    "evaluate": Program(
        _cli("evaluate", *SETTINGS, *EVALUATE), ["run"], ["run"],
        ["run/evaluation/*.*", "run/evaluation/images/*/*.png"],
    ),
    "generate": Program(_cli("generate", *GENERATE), [], ["generated"], ["generated"]),
    "invert": Program(_train(*STORED, "run.dir=first"), ["pairs", "scores", "cache"], ["first", "store"], []),
    "reuse": Program(_train(*STORED, "run.dir=second"), ["pairs", "scores", "cache", "store"], ["second"], []),
    "soak": Program(
        _train("run.dir=soak", "run.steps=200", "run.save_every=7", "run.keep=2", "batch.pairs_per_step=2"),
        ["pairs", "scores", "cache"], ["soak"], [],
    ),
    "two ranks": Program(
        _train("run.dir=two", "--ds_config", str(CONFIGS / "ds_zero2.json")),
        ["pairs", "scores", "cache"], ["two"], ["two/checkpoints/step-*", "two/export"],
    ),
    "verify export": Program(_cli("verify", "run/export"), ["run"], [], []),
    "import any": Program(_import_any, [], ["imported"], ["imported"]),
    "save": Program(lambda: programs.run(_save), [], ["toy"], ["toy/checkpoints/step-*"]),
    "export": Program(lambda: programs.run(_export), ["export"], ["export"], ["export"]),
}  # fmt: skip
