"""From a folder of one's own pictures to training, by the commands of the documentation."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from smpo_fast import cli, train
from smpo_fast.config.commands import COMMANDS
from smpo_fast.config.schema import EMBEDDED
from smpo_fast.data.pairs import reader
from smpo_fast.data.pairs.pair import RawPair
from smpo_fast.training.run_log import read_metrics

SETTINGS = [
    "run.steps=2", "run.save_every=2", "batch.pairs_per_step=6", "batch.micro_pairs=3", "optim.warmup_steps=0",
    "eval.prompts=", "log.tensorboard=false",
]  # fmt: skip


def write_folder(folder: Path, pairs: int, names: int | None = None) -> None:
    """w/ and l/ with prompts beside, from the embedded pairs; visited again under other names beyond their number."""
    table = list(reader.read_pairs(reader.source_path(EMBEDDED), max_pairs=min(pairs, names or pairs)))
    for part in ("w", "l"):
        (folder / part).mkdir(parents=True)
    for i in range(pairs):
        pair = table[i % len(table)]
        assert isinstance(pair, RawPair)
        first = pair.label == 1
        for part, picture in zip(("w", "l"), pair.images if first else pair.images[::-1], strict=True):
            (folder / part / f"{i:05d}.png").write_bytes(picture)
        (folder / f"{i:05d}.txt").write_text(pair.prompt)


def test_three_commands_from_a_folder_of_pictures_to_training(tmp_path: Path) -> None:
    write_folder(tmp_path / "mine", 24)
    (tmp_path / "mine" / "w" / "00007.png").write_bytes(b"no picture")
    assert cli.main(["import", str(tmp_path / "mine"), str(tmp_path / "pairs")]) == 0
    assert cli.main(["score", str(tmp_path / "pairs"), str(tmp_path / "scores"), "--scorer", "embedded"]) == 0
    words = [f"data.pairs={tmp_path / 'pairs'}", f"data.scores={tmp_path / 'scores'}", f"run.dir={tmp_path / 'run'}"]
    assert train.main([*SETTINGS, *words]) == 0
    rows = read_metrics(tmp_path / "run")
    assert len(rows) == 2 and rows[0]["logit_max"] == 0 and rows[1]["logit_max"] > 0
    summary = json.loads((tmp_path / "pairs" / "import.json").read_text())
    assert "23" in json.dumps(summary) and (tmp_path / "pairs" / "rejected.parquet").exists()


@pytest.mark.slow
def test_the_examples_of_the_commands_run_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they are typed, where that would take long with smaller settings after them."""
    monkeypatch.chdir(tmp_path)
    write_folder(Path("my_pictures"), 24)
    assert train.main([*SETTINGS, "run.dir=runs/lora", "lora.rank=4", "data.max_pairs=12"]) == 0  # for smpo merge
    small = ["batch.pairs_per_step=6", "batch.micro_pairs=3", "run.steps=2", "run.save_every=2", "run.device=cpu"]
    for name, command in COMMANDS.items():
        words = shlex.split(command.example.partition(" > ")[0])[1:]
        more = [*small, "optim.warmup_steps=0", "eval.count=4"] if name in ("train", "tune", "evaluate") else []
        status = cli.main([*words, *more])
        # a plan for a run that does not fit and a machine without a GPU are no mistakes
        assert status == 0 or (status == 1 and name in ("plan", "doctor")), (command.example, status)


@pytest.mark.slow
def test_ten_thousand_pairs_walk_the_road_in_flat_memory(tmp_path: Path) -> None:
    """Each command in a process of its own; prints seconds and peak memory."""
    write_folder(tmp_path / "mine", 10_000, names=1280)
    here = str(Path(__file__).parents[1])
    smpo, paths = [sys.executable, "-m", "smpo_fast.cli"], [str(tmp_path / n) for n in ("mine", "pairs", "scores")]
    words = [f"data.pairs={paths[1]}", f"data.scores={paths[2]}", f"run.dir={tmp_path / 'run'}"]
    commands = {
        "import": [*smpo, "import", paths[0], paths[1]],
        "score": [*smpo, "score", paths[1], paths[2], "--scorer", "embedded"],
        "prepare": [*smpo, "prepare", *words],
        "train, 2 steps": [sys.executable, str(Path(here) / "smpo_fast" / "train.py"), *SETTINGS, *words],
    }
    for name, command in commands.items():
        began, peak = time.monotonic(), 0.0
        with (tmp_path / "log").open("w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=here)
            while process.poll() is None:
                peak = max(peak, peak_mb(process.pid))
                time.sleep(0.1)
        assert process.returncode == 0, (tmp_path / "log").read_text()[-3000:]
        print(f"{name}: {time.monotonic() - began:.0f} s, at most {peak:.0f} MB, {os.cpu_count()} cores")
        assert 100 < peak < 1500


def peak_mb(process: int) -> float:
    """The most memory that a process has used so far; 0 once it has ended.

    Not from ``resource``: the figure of a child includes what its parent used when it was forked.
    """
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
    except OSError:
        return 0.0
    return int(found[1]) * 1024 / 1e6 if found else 0.0
