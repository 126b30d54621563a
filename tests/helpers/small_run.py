"""A run of four steps on a few pairs of the embedded world: in this process, or in processes of its own."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from helpers.paths import CONFIGS, ROOT
from helpers.ranks import free_port
from smpo_fast import train
from smpo_fast.training.run_log import read_metrics

SMALL = [
    "data.max_pairs=24", "run.steps=4", "run.save_every=2", "batch.pairs_per_step=6", "batch.micro_pairs=2",
    "batch.inversion_pairs=4", "optim.warmup_steps=0", "optim.lr=1e-4", "eval.prompts=", "log.tensorboard=false",
    "model.export_dtype=float32",
]  # fmt: skip


def run(run_dir: Path, *words: str) -> int:
    return train.main([*SMALL, f"run.dir={run_dir}", *words])


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(next((run_dir / "export" / "unet").glob("*.safetensors")))


def numbers(run_dir: Path) -> list[dict[str, Any]]:
    """The logged rows without what depends on the clock."""
    clock = ("second", "memory")
    return [{k: v for k, v in row.items() if not any(c in k for c in clock)} for row in read_metrics(run_dir)]


def launch(run_dir: Path, *words: str, ranks: int = 1, ds: str | None = "ds_zero2.json") -> subprocess.Popen[str]:
    """The program in processes of its own: under the DeepSpeed launcher, or alone without a DeepSpeed file."""
    script = [str(ROOT / "smpo_fast" / "train.py")]
    if ds:
        launcher = str(Path(sys.executable).parent / "deepspeed")
        script = [launcher, "--num_gpus", str(ranks), "--master_port", str(free_port()), *script]
    else:
        script = [sys.executable, *script]
    ds_words = ["--ds_config", str(CONFIGS / ds)] if ds else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    return subprocess.Popen(
        [*script, *ds_words, *SMALL, f"run.dir={run_dir}", *words],
        text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, cwd=ROOT, start_new_session=True,
    )  # fmt: skip


def finish(process: subprocess.Popen[str], status: int = 0) -> str:
    """The output of a process that must end with a status."""
    out, _ = process.communicate(timeout=300)
    assert process.returncode == status, out[-4000:]
    return out


def wait_for_step(run_dir: Path, step: int, process: subprocess.Popen[str]) -> None:
    """Wait until a run has logged a step."""
    deadline = time.monotonic() + 240
    while len(read_metrics(run_dir)) < step:
        assert process.poll() is None and time.monotonic() < deadline, "the run ended early or hangs"
        time.sleep(0.02)


def assert_same_run(a: Path, b: Path, tolerance: float = 0.0) -> None:
    """Two runs with the same log and weights, bit for bit unless a tolerance is given."""
    rows_a, rows_b = numbers(a), numbers(b)
    assert [r["step"] for r in rows_a] == [r["step"] for r in rows_b]
    for row_a, row_b in zip(rows_a, rows_b, strict=True):
        assert row_a.keys() == row_b.keys()
        for name, value in row_a.items():
            assert value == pytest.approx(row_b[name], rel=tolerance, abs=tolerance), (row_a["step"], name)
    ours, theirs = weights(a), weights(b)
    assert ours.keys() == theirs.keys()
    assert all((ours[n] - theirs[n]).abs().max() <= tolerance for n in ours)


def pair_table(file: Path, rows: Sequence[dict[str, float | None]], columns: Sequence[str] = ("label_0",)) -> Path:
    """A table in Pick-a-Pic columns with random images."""
    seeded = np.random.default_rng(0)

    def image() -> bytes:
        stream = io.BytesIO()
        Image.fromarray(seeded.integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(stream, "PNG")
        return stream.getvalue()

    values = {
        "caption": ["a cat"] * len(rows),
        "jpg_0": [image() for _ in rows],
        "jpg_1": [image() for _ in rows],
    } | {name: pa.array([row.get(name) for row in rows], pa.float64()) for name in columns}
    pq.write_table(pa.table(values), file)
    return file
