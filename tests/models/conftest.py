"""A run that the tests of the kernels share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.small_run import pair_table

from smpo_fast import cli


@pytest.fixture(scope="module")
def tiny_run(sd15_pipeline: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Settings of one step on two pairs with a network of a few thousand weights; the pairs are prepared."""
    folder = tmp_path_factory.mktemp("prepared")
    table = pair_table(folder / "pairs.parquet", [{"label_0": 1.0}, {"label_0": 0.0}])
    words = [
        f"model.path={sd15_pipeline('epsilon')}", f"data.pairs={table}", f"data.cache={folder / 'cache'}",
        "data.resolution=16", "data.max_pairs=0", "run.device=cpu", "run.steps=1", "eval.prompts=",
        "log.tensorboard=false", "batch.pairs_per_step=2", "batch.micro_pairs=1", "inversion.steps=1",
    ]  # fmt: skip
    assert cli.main(["prepare", *words]) == 0
    return words
